"""Importing models that nnU-Net v2 trained, from a folder or from an archive of nnUNetv2_export_model_to_zip."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from rfmedsam2.errors import CheckpointError, PlanError, UsageError
from rfmedsam2.pipeline.nnunet.models import copy_fingerprint, read_fold, same_model
from rfmedsam2.pipeline.prediction.checkpoints import (
    FOLD,
    IMPORTING,
    TrainedModel,
    folds_of,
    is_nnunet_model,
    place,
    place_of,
    require_dataset_name,
    require_place,
)
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.store.archive import unpack_nnunet_archive
from rfmedsam2.store.checkpoint_header import BEST, FINAL, NNUNET_BEST, NNUNET_FINAL
from rfmedsam2.store.checkpoints import write_checkpoint
from rfmedsam2.store.lock import workplace
from rfmedsam2.system.progress import Track, silent

LOGGER = logging.getLogger(__name__)
IMPORTED = {NNUNET_FINAL: FINAL, NNUNET_BEST: BEST}
DEPTHS = ("", "*", "*/*", "*/*/*")
"""Where models lie: the folder of one, of a dataset, nnUNet_results, or what holds that, as in a zip of it."""


def import_nnunet_models(
    source: Path, results: Path, *, force: bool = False, track: Track = silent
) -> list[TrainedModel]:
    """Import all models of nnU-Net in a folder or zip file: every fold's final and best weights, and the fingerprint.

    All of them are read and checked before any is moved into place. Beside others, those that cannot be imported by
    their kind (plans with features that this package does not support, trainings that have saved no final or best
    weights) are left out with a warning; a damaged one stops the import.

    Args:
        source: a model folder (with plans.json and fold_0 ...), a folder of such up to nnUNet_results, or a zip file.
        results: root/results.
        force: replace existing models (which are kept if anything fails).
        track: shows the folds.

    Raises:
        UsageError: there is no such model, or it already exists.
        CheckpointError: an archive or a checkpoint is damaged or unsafe, or of another network than its plans.
        PlanError: the plans of all models use features that this package does not support.
        StoreError: the folder cannot be written, the disk is full.
    """
    with ExitStack() as working:
        folder = source
        if source.is_file():
            folder = working.enter_context(workplace(results, IMPORTING))
            unpack_nnunet_archive(source, folder)
        models, left_out = [], []
        for model in _models_in(folder, source):
            converted = working.enter_context(workplace(results, IMPORTING)) / "model"
            try:
                models.append((converted, _converted(model, converted, track)))
            except PlanError as error:
                left_out.append(error)
        if not models:
            raise left_out[0]
        for error in left_out:
            LOGGER.warning("Left out: %s", error)
        places = [place_of(records[0], results) for _, records in models]
        for target in places:
            require_place(target, force=force)
        if len(set(places)) < len(places):
            raise UsageError("Two models would have the same name", where=source, found=f"{sorted(places)[0].name}")
        for (converted, _), target in zip(models, places, strict=True):
            place(converted, target, force=force)
        return [
            TrainedModel(
                dataset=records[0].plan.dataset,
                plan=records[0].plan.name,
                stage=records[0].stage,
                folds=tuple(sorted(record.fold for record in records)),
                folder=target,
            )
            for (_, records), target in zip(models, places, strict=True)
        ]


def _models_in(folder: Path, source: Path) -> list[Path]:
    found = [path for depth in DEPTHS for path in sorted([folder] if not depth else folder.glob(depth))]
    models = [path for path in found if path.is_dir() and is_nnunet_model(path)]
    if not models and any(folds_of(path) for path in (source, source.parent) if path.is_dir()):
        raise UsageError(
            "This is not a model of nnU-Net, but one of this package",
            where=source,
            remedy="Predict with it where it is (rfmed_predict -m), or move it as a zip (rfmed_export_model)",
        )
    if not models:
        raise UsageError(
            "Found no trained model of nnU-Net" if source.exists() else "The file or folder does not exist",
            where=source,
            expected="a folder with plans.json, dataset.json and fold_0/checkpoint_final.pth, or a zip file of it",
        )
    finished = [model for model in models if folds_of(model, tuple(IMPORTED))]
    if not finished:
        raise CheckpointError(
            "The model has only checkpoints of a training that goes on",
            where=models[0],
            expected=f"fold_0/{NNUNET_FINAL} or fold_0/{NNUNET_BEST}",
        )
    if unfinished := [str(model) for model in models if model not in finished]:
        LOGGER.warning("Left out, as their trainings go on: %s", ", ".join(unfinished))
    return finished


def _converted(model: Path, folder: Path, track: Track) -> list[CheckpointRecord]:
    """Write our checkpoints of all folds; gives a record per fold."""
    records: dict[str, CheckpointRecord] = {}
    folds = folds_of(model, tuple(IMPORTED))
    for fold in track(folds, "folds imported", len(folds)):
        for name, ours in IMPORTED.items():
            path = model / f"{FOLD}{fold}" / name
            if path.is_file():
                record, weights = read_fold(path)
                if records:
                    record = same_model(record, next(iter(records.values())), where=path)
                tensors = {f"model/{key}": tensor for key, tensor in weights.items()}
                write_checkpoint(folder / f"{FOLD}{fold}" / ours, record, tensors, {})
                records.setdefault(fold, record)
    copy_fingerprint(model, folder)
    require_dataset_name(model, next(iter(records.values())).plan.dataset)
    return list(records.values())
