"""Finding trained models and their checkpoints below a results folder, and moving checked models into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rfmedsam2.arguments import option
from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.plan import is_plan_name
from rfmedsam2.records.prediction import ENSEMBLE, EnsembleRecord
from rfmedsam2.store.checkpoint_header import (
    BEST,
    CHECKPOINTS,
    FINAL,
    LATEST,
    NNUNET_BEST,
    NNUNET_CHECKPOINTS,
    NNUNET_FINAL,
    NNUNET_LATEST,
)
from rfmedsam2.store.layout import DATASET_FOLDER
from rfmedsam2.store.lock import move_into_place, placing
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.ordinary_files import require_ordinary

Which = Literal["final", "best", "latest"]
FOLD = "fold_"
ENSEMBLE_PLAN = "ensemble"
"""What stands for the plan in the name of an ensemble's folder: ensemble__NAME."""
IMPORTING = ".import-"
"""How names of folders begin that hold an unfinished import."""
VALIDATED = "validation"
"""Folder of a fold with label maps and scores of its validation cases."""
NAMES = {"final": (FINAL, LATEST, BEST), "best": (BEST,), "latest": (LATEST,)}
NNUNET_NAMES = {"final": (NNUNET_FINAL, NNUNET_LATEST, NNUNET_BEST), "best": (NNUNET_BEST,), "latest": (NNUNET_LATEST,)}
"""Files that may be meant by a word, in order of preference; those of nnU-Net in its models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A trained stage of a plan, with at least one fold.

    Attributes:
        dataset: folder name of the dataset, such as Dataset004_Hippocampus.
        plan: name of the plan.
        stage: name of the stage.
        folds: names of the folds with a checkpoint, sorted.
        folder: folder of the fold folders.
    """

    dataset: str
    plan: str
    stage: str
    folds: tuple[str, ...]
    folder: Path


def find_models(results: Path, dataset: str | None = None) -> list[TrainedModel]:
    """All trained models below a results folder, sorted; only those of `dataset` (full folder name) if given.

    Models without checkpoints are left out. A results folder that does not exist is treated as empty.
    """
    models = []
    for folder in _model_folders(results, dataset):
        plan, _, stage = folder.name.partition("__")
        folds = tuple(folds_of(folder))
        if is_plan_name(plan) and stage and folds:  # what is just being replaced begins with a dot
            home = folder.parent.name
            models.append(TrainedModel(dataset=home, plan=plan, stage=stage, folds=folds, folder=folder))
    return models


def find_ensembles(results: Path, dataset: str | None = None) -> list[TrainedModel]:
    """All ensembles below a results folder, as `find_models` does; their folds are those of their models.

    Raises:
        RecordError: an ensemble.json is damaged.
    """
    files = [
        folder / ENSEMBLE
        for folder in _model_folders(results, dataset)
        if folder.name.startswith(f"{ENSEMBLE_PLAN}__") and (folder / ENSEMBLE).is_file()
    ]
    return [
        TrainedModel(
            dataset=file.parent.parent.name,
            plan=ENSEMBLE_PLAN,
            stage=file.parent.name.removeprefix(f"{ENSEMBLE_PLAN}__"),
            folds=read_record(file, EnsembleRecord).folds,
            folder=file.parent,
        )
        for file in files
    ]


def find_nnunet_models(results: Path) -> list[TrainedModel]:
    """All models below a results folder that nnU-Net trained (TRAINER__PLANS__CONFIGURATION), sorted."""
    models = []
    for folder in _model_folders(results, None):
        _, plans, stage = [*folder.name.split("__"), "", ""][:3]
        if stage and is_nnunet_model(folder):
            folds = tuple(folds_of(folder, NNUNET_CHECKPOINTS))
            home = folder.parent.name
            models.append(TrainedModel(dataset=home, plan=plans, stage=stage, folds=folds, folder=folder))
    return models


def _model_folders(results: Path, dataset: str | None) -> Iterator[Path]:
    for home in sorted(results.iterdir()) if results.is_dir() else ():
        if home.is_dir() and DATASET_FOLDER.fullmatch(home.name) and dataset in (None, home.name):
            yield from sorted(p for p in home.iterdir() if p.is_dir() and "__" in p.name)


def folds_of(model_folder: Path, names: Sequence[str] = CHECKPOINTS) -> list[str]:
    """Names of the folds (`fold_NAME`) with a checkpoint of one of these file names, sorted."""
    if not model_folder.is_dir():
        return []
    folders = sorted(p for p in model_folder.iterdir() if p.is_dir() and p.name.startswith(FOLD))
    return [p.name[len(FOLD) :] for p in folders if any((p / name).is_file() for name in names)]


def is_nnunet_model(folder: Path) -> bool:
    """Whether a folder holds a model that nnU-Net trained: its plans and a fold with a checkpoint."""
    return (folder / "plans.json").is_file() and bool(folds_of(folder, NNUNET_CHECKPOINTS))


def checkpoints_of(
    model_folder: Path, *, folds: Sequence[str | int] | str | int | None = None, checkpoint: Which = "final"
) -> list[Path]:
    """One checkpoint file per fold.

    Args:
        model_folder: results/DATASET/PLAN__STAGE, or a model that nnU-Net trained.
        folds: names of folds; None: all found, except "all" (trained on every case) if there are others.
        checkpoint: final (latest if training has not ended, best if that alone was kept), best, or latest.

    Raises:
        UsageError: the folder or a fold does not exist; lists the existing ones.
        CheckpointError: a fold does not have the requested checkpoint.
    """
    if checkpoint not in get_args(Which):
        raise UsageError("Unknown checkpoint", where=checkpoint, expected=f"one of {', '.join(get_args(Which))}")
    known = folds_of(model_folder)
    names = NAMES
    if not known and is_nnunet_model(model_folder):
        known, names = folds_of(model_folder, NNUNET_CHECKPOINTS), NNUNET_NAMES
    if not known:
        if folds_of(model_folder, NNUNET_CHECKPOINTS):
            raise UsageError(
                "The model lacks the plans that nnU-Net wrote beside its folds",
                where=model_folder,
                expected="plans.json and dataset.json",
                remedy="Copy the whole folder of the model, as nnU-Net left it in nnUNet_results",
            )
        if not model_folder.exists():
            raise UsageError("The model does not exist", where=model_folder, remedy="Check the path")
        try:
            require_ordinary(model_folder)
        except OSError as error:
            raise UsageError(f"The model cannot be read ({error.strerror})", where=model_folder) from None
        is_fold = any((model_folder / name).is_file() for name in (*CHECKPOINTS, *NNUNET_CHECKPOINTS))
        raise UsageError(
            "This is the folder of one fold, not of a model" if is_fold else "The folder holds no trained model",
            where=model_folder,
            expected=f"a file such as {FOLD}0/{CHECKPOINTS[0]}",
            remedy=f"Name the folder above it, {model_folder.parent}, and choose the fold there"
            if is_fold
            else "Train with rfmed_train, or import a model with rfmed_import_model",
        )
    several = [folds] if isinstance(folds, str) or not isinstance(folds, Iterable | None) else folds
    wanted = _default_folds(known) if several is None else [str(fold) for fold in several]
    missing = [fold for fold in wanted if fold not in known]
    if missing or not wanted:
        raise UsageError(
            "The fold has not been trained",
            where=model_folder,
            expected=f"one or several of {', '.join(known)}",
            found=", ".join(missing) or "none",
        )
    return [_checkpoint(model_folder / f"{FOLD}{fold}", checkpoint, names) for fold in dict.fromkeys(wanted)]


def checkpoint_of(source: Path, *, fold: str | None = None) -> Path:
    """The checkpoint of one trained network, ours or nnU-Net's.

    Args:
        source: a checkpoint, the folder of a fold, or a model folder.
        fold: of a model folder, this one if it was trained, else the first; None: the first.

    Raises:
        UsageError: there is no model.
        CheckpointError: the fold has no checkpoint of a training that has ended, or goes on.
    """
    if source.is_file():
        if source.suffix == ".zip":
            raise UsageError(
                "A model archive is not a checkpoint",
                where=source,
                remedy="Import it with rfmed_import_model, and give the folder of the imported model",
            )
        return source
    if source.is_dir() and source.name.startswith(FOLD):
        return checkpoints_of(source.parent, folds=[source.name.removeprefix(FOLD)])[0]
    every = checkpoints_of(source)
    return next((path for path in every if path.parent.name == f"{FOLD}{fold}"), every[0])


def _default_folds(known: list[str]) -> list[str]:
    numbered = [fold for fold in known if fold.isdigit()]
    return numbered or [fold for fold in known if fold != "all"] or known


def _checkpoint(folder: Path, which: Which, names: Mapping[str, Sequence[str]]) -> Path:
    for name in names[which]:
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(name for every in names.values() for name in every[:1] if (folder / name).is_file())
    remedy = f"Choose another checkpoint than {which}"
    raise CheckpointError(f"The fold has no {which} checkpoint", where=folder, found=there, remedy=remedy)


def place(unpacked: Path, target: Path, *, force: bool) -> None:
    """Move a checked model folder to its place; a model that it replaces is kept on failure.

    Args:
        unpacked: folder with the folds, on the same disk.
        target: results/DATASET/PLAN__STAGE.
        force: replace an existing model.

    Raises:
        UsageError: the model already exists.
        StoreError: the folder cannot be written.
    """
    with placing(target):
        require_place(target, force=force)
        move_into_place(unpacked, target)


def require_place(target: Path, *, force: bool) -> None:
    """Check that a model is there only if it is to be replaced.

    Raises:
        UsageError: the model already exists.
    """
    if target.exists() and not force:
        raise UsageError(
            "The model already exists",
            where=target,
            remedy=f"Replace it with {option('force', True)}, or move it away first",
        )


def place_of(record: CheckpointRecord, results: Path) -> Path:
    """The folder of a model below a results folder."""
    return results / record.plan.dataset / f"{record.plan.name}__{record.stage}"


def require_dataset_name(archive: Path, name: str) -> None:
    """Check that the model appears where models are looked for; that names are plain is checked by their records."""
    if DATASET_FOLDER.fullmatch(name) is None:
        raise CheckpointError(
            "The model's dataset is not named like a dataset",
            where=archive,
            expected="a name like Dataset123_Liver",
            found=name,
        )
