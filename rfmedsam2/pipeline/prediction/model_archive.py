"""Exporting a trained model to a zip file, and importing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rfmedsam2.arguments import option
from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.pipeline.prediction.checkpoints import FOLD, TrainedModel, Which, checkpoints_of
from rfmedsam2.pipeline.prediction.postprocessing import rule_of_model
from rfmedsam2.records.archive import Manifest
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.prediction import POSTPROCESSING, PredictingModel
from rfmedsam2.store.archive import describe, unpack_archive, write_archive
from rfmedsam2.store.checkpoint_header import FINAL, read_record_of
from rfmedsam2.store.checkpoints import read_all, read_weights, write_checkpoint
from rfmedsam2.store.layout import DATASET_FOLDER
from rfmedsam2.store.lock import exclusive_lock, workplace
from rfmedsam2.system.atomic import writing_to
from rfmedsam2.version import __version__

EXTRAS = ("metrics.json", "summary.json")
"""Files of a fold that are exported with its checkpoint if they exist."""
IMPORTING, EXPORTING = ".import-", ".export-"
"""How names of folders begin that hold an unfinished model."""
PLACING_SECONDS = 60.0
"""How long to wait for another run that moves a model into place."""


def export_model(
    model_folder: Path, out: Path, *, folds: Sequence[str] | None = None, checkpoint: Which = "final"
) -> Manifest:
    """Pack the weights and the postprocessing rule of a model into a zip file, without optimizer, RNG and ids of cases.

    Args:
        model_folder: results/DATASET/PLAN__STAGE.
        out: the zip file; replaced if it exists. Equal models give equal bytes.
        folds: names of folds; None: all.
        checkpoint: final (latest if training has not ended), best or latest.

    Raises:
        UsageError: the model or a fold does not exist.
        CheckpointError: a checkpoint is damaged, or folds are of different trainings.
        StoreError: `out` cannot be written.
    """
    paths = checkpoints_of(model_folder, folds=folds, checkpoint=checkpoint)
    records = [read_record_of(path) for path in paths]
    names = {(record.plan.dataset, record.plan.name, record.stage) for record in records}
    if len(names) > 1:
        raise CheckpointError(
            "The folds are of different models", where=model_folder, found="; ".join(" ".join(n) for n in sorted(names))
        )
    with workplace(out.parent, EXPORTING) as work:
        files: dict[str, Path] = {}
        stored: list[CheckpointRecord] = []
        for path in paths:
            record, weights = read_weights(path)  # a training may have gone on since the records were compared
            stored.append(record)
            fold = f"{FOLD}{record.fold}"
            name = f"{fold}/{FINAL}"
            files[name] = work / name
            tensors = {f"model/{key}": tensor for key, tensor in weights.items()}
            # ids of cases may tell whose they are
            write_checkpoint(files[name], record.model_copy(update={"cases": None}), tensors, {})
            extras = [path.parent / extra for extra in EXTRAS]
            files |= {f"{fold}/{extra.name}": extra for extra in extras if extra.is_file()}
        if rule_of_model(model_folder, stored[0].plan.labels) is not None:
            files[POSTPROCESSING] = model_folder / POSTPROCESSING
        manifest = _manifest(stored, files)
        write_archive(out, manifest, files)
    return manifest


def import_model(archive: Path, results: Path, *, force: bool = False) -> TrainedModel:
    """Unpack a model below a results folder, atomically.

    Every checkpoint, and the postprocessing rule, is read and checked before anything is moved into place.

    Args:
        archive: a zip file made by `export_model`.
        results: root/results.
        force: replace an existing model (which is kept if anything fails).

    Raises:
        CheckpointError: the archive is damaged, not one of ours or unsafe, or a checkpoint does not match the manifest.
        UsageError: the model already exists.
        StoreError: the folder cannot be written, the disk is full.
    """
    with workplace(results, IMPORTING) as work:
        unpacked = work / "model"
        unpacked.mkdir()
        manifest = unpack_archive(archive, unpacked)
        records = _checked_folds(archive, manifest, unpacked)
        first = records[0]
        rule_of_model(unpacked, first.plan.labels)
        return placed(unpacked, first, folds=[record.fold for record in records], results=results, force=force)


def placed(
    unpacked: Path, record: CheckpointRecord, *, folds: Sequence[str], results: Path, force: bool
) -> TrainedModel:
    """Move a checked model folder to its place below a results folder; a model that it replaces is kept on failure.

    Args:
        unpacked: folder with the folds, on the same disk.
        record: record of one of its checkpoints.
        folds: names of the folds.
        results: root/results.
        force: replace an existing model.

    Raises:
        UsageError: the model already exists.
        StoreError: the folder cannot be written.
    """
    target = results / record.plan.dataset / f"{record.plan.name}__{record.stage}"
    with exclusive_lock(target.parent, wait_seconds=PLACING_SECONDS):
        require_place(record, results=results, force=force)
        move_into_place(unpacked, target)
    return TrainedModel(
        dataset=record.plan.dataset,
        plan=record.plan.name,
        stage=record.stage,
        folds=tuple(sorted(folds)),
        folder=target,
    )


def move_into_place(folder: Path, target: Path) -> None:
    """Move a folder to its place on the same disk; what it replaces ends up beside its old place, or stays on failure.

    Raises:
        StoreError: the folder cannot be written.
    """
    replaced = folder.parent / "replaced"
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(replaced)
        try:
            folder.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise


def require_place(record: CheckpointRecord, *, results: Path, force: bool) -> Path:
    """The folder of a model, which may be there only if it is to be replaced.

    Raises:
        UsageError: the model already exists.
    """
    target = results / record.plan.dataset / f"{record.plan.name}__{record.stage}"
    if target.exists() and not force:
        raise UsageError(
            "The model already exists",
            where=target,
            remedy=f"Replace it with {option('force', True)}, or move it away first",
        )
    return target


def _manifest(records: Sequence[CheckpointRecord], files: dict[str, Path]) -> Manifest:
    first = records[0]
    return Manifest(
        dataset=first.plan.dataset,
        plan=first.plan.name,
        stage=first.stage,
        models=tuple(_identity(record) for record in records),
        code_version=__version__,
        created=max(record.created for record in records),
        files=describe(files),
    )


def _identity(record: CheckpointRecord) -> PredictingModel:
    return PredictingModel(
        fold=record.fold,
        step=record.step,
        weights_sha256=record.weights_sha256,
        checkpoint=FINAL,
    )


def _checked_folds(archive: Path, manifest: Manifest, folder: Path) -> list[CheckpointRecord]:
    """Read all checkpoints and check that each is valid, in its fold's folder, and the one in the manifest."""
    wanted = {f"{FOLD}{model.fold}/{model.checkpoint}": model for model in manifest.models}
    found = {file.name for file in manifest.files if file.name.endswith(".safetensors")}
    if not found or set(wanted) != found:
        raise CheckpointError(
            "The archive's checkpoints do not match its manifest",
            where=archive,
            expected=", ".join(sorted(wanted)) or "at least one checkpoint",
            found=", ".join(sorted(found)) or "none",
        )
    records = []
    for name, model in wanted.items():
        record, _, _ = read_all(folder / name)
        plan = record.plan
        said = (manifest.dataset, manifest.plan, manifest.stage, model.fold, model.weights_sha256)
        if said != (plan.dataset, plan.name, record.stage, record.fold, record.weights_sha256):
            raise CheckpointError("A checkpoint does not match the manifest", where=f"{archive}: {name}")
        records.append(record)
    require_dataset_name(archive, records[0].plan.dataset)
    return records


def require_dataset_name(archive: Path, name: str) -> None:
    """Check that the model appears where models are looked for; that names are plain is checked by their records."""
    if DATASET_FOLDER.fullmatch(name) is None:
        raise CheckpointError(
            "The model's dataset is not named like a dataset",
            where=archive,
            expected="a name like Dataset123_Liver",
            found=name,
        )
