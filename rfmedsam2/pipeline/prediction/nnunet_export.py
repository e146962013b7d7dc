"""Exporting a trained model into a folder that nnU-Net v2 predicts with, in the layout of nnUNet_results."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rfmedsam2.arguments import option
from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.inference.volume import mirror_axes
from rfmedsam2.nn.unet import nnunet_weights
from rfmedsam2.pipeline.nnunet.models import DATASET, DEFAULT_TRAINER, PLANS, copy_fingerprint
from rfmedsam2.pipeline.nnunet.written_plans import PLANNER, nnunet_dataset, nnunet_plans
from rfmedsam2.pipeline.prediction.checkpoints import FOLD, NNUNET_NAMES, checkpoints_of, folds_of
from rfmedsam2.pipeline.prediction.model_archive import EXPORTING
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.prediction import POSTPROCESSING
from rfmedsam2.store.checkpoint_header import BEST, NNUNET_BEST, NNUNET_FINAL, read_record_of
from rfmedsam2.store.checkpoints import read_weights
from rfmedsam2.store.lock import move_into_place, placing, workplace
from rfmedsam2.store.nnunet_checkpoint import NnunetCheckpoint, write_nnunet_checkpoint
from rfmedsam2.system.atomic import is_taken, write_text
from rfmedsam2.system.json_text import JsonError, parse_json
from rfmedsam2.system.ordinary_files import read_whole
from rfmedsam2.system.progress import Track, silent

LOGGER = logging.getLogger(__name__)
WITHOUT_MIRRORING = "nnUNetTrainerNoMirroring"
FOLDS = re.compile("all|0|[1-9][0-9]*")
STEP_SIZE = 0.5
"""Distance of tiles that nnUNetv2_predict takes without -step_size."""


def export_nnunet_model(
    model_folder: Path,
    results: Path,
    *,
    folds: Sequence[str] | None = None,
    overwrite: bool = False,
    track: Track = silent,
) -> Path:
    """Write a model as nnU-Net v2 does: DATASET/TRAINER__PLAN__STAGE with plans.json, dataset.json and fold_0 ...

    Args:
        model_folder: results/DATASET/PLAN__STAGE.
        results: such as nnUNet_results.
        folds: names of folds; None: all.
        overwrite: replace a model that nnU-Net trained, too.
        track: shows the checkpoints.

    Returns:
        The folder of the model.

    Raises:
        UsageError: the model or a fold does not exist, or a model of somebody else is in its place.
        PlanError: nnU-Net cannot express the model; names the fields.
        CheckpointError: a checkpoint is damaged, or folds are of different trainings.
        StoreError: the folder cannot be written, the disk is full.
    """
    checkpoints = _checkpoints(model_folder, folds)
    records = [read_record_of(path) for path, _ in checkpoints]
    first = records[0]
    if strange := [record.fold for record in records if not FOLDS.fullmatch(record.fold)]:
        raise UsageError(
            "nnU-Net has no fold of this name", where=model_folder, expected="a number, or all", found=strange[0]
        )
    plans, dataset = nnunet_plans(first.plan, first.stage), nnunet_dataset(first.plan)
    for (path, _), record in zip(checkpoints, records, strict=True):
        if (nnunet_plans(record.plan, record.stage), _mirrored(record)) != (plans, _mirrored(first)):
            raise CheckpointError(
                "The folds are of different models", where=path, found=f"{record.plan.name} {record.stage}"
            )
    trainer = DEFAULT_TRAINER if _mirrored(first) else WITHOUT_MIRRORING
    target = results / first.plan.dataset / f"{trainer}__{first.plan.name}__{first.stage}"
    _require_replaceable(target, overwrite=overwrite)
    with workplace(results, EXPORTING) as work:
        folder = work / "model"
        write_text(folder / PLANS, json.dumps(plans, indent=4))
        write_text(folder / DATASET, json.dumps(dataset, indent=4))
        copy_fingerprint(model_folder, folder)
        settings = {"plans": plans, "dataset_json": dataset}
        for path, name in track(checkpoints, "checkpoints exported", len(checkpoints)):
            record, weights = read_weights(path)  # a training may have gone on since the records were compared
            fold = record.fold if record.fold == "all" else int(record.fold)
            checkpoint = _as_nnunet(record, weights, trainer)
            write_nnunet_checkpoint(folder / f"{FOLD}{fold}" / name, checkpoint, {**settings, "fold": fold})
        with placing(target):
            _require_replaceable(target, overwrite=overwrite)
            move_into_place(folder, target)
    if (step := first.plan.stages[first.stage].inference.step_size) != STEP_SIZE:
        LOGGER.warning("The plan predicts with other tiles than nnU-Net: use nnUNetv2_predict -step_size %s", step)
    if is_taken(rule := model_folder / POSTPROCESSING):
        LOGGER.warning("The postprocessing rule is left out: apply it with rfmed_postprocess --rule %s", rule)
    return target


def _checkpoints(model_folder: Path, folds: Sequence[str] | None) -> list[tuple[Path, str]]:
    """Checkpoints of the folds, each with its name in nnU-Net: the final and the best one, where they are kept."""
    if folds_of(model_folder, tuple(name for names in NNUNET_NAMES.values() for name in names)):
        raise UsageError(
            "This model is nnU-Net's already", where=model_folder, remedy="Copy its folder into nnUNet_results"
        )
    found: list[tuple[Path, str]] = []
    for path in checkpoints_of(model_folder, folds=folds):
        best = path.with_name(BEST)
        found += [(path, NNUNET_FINAL)] if path != best else []
        found += [(best, NNUNET_BEST)] if best.is_file() else []
    return found


def _mirrored(record: CheckpointRecord) -> tuple[int, ...]:
    stage = record.plan.stages[record.stage]
    return mirror_axes(stage) if stage.inference.mirror else ()


def _as_nnunet(record: CheckpointRecord, weights: Mapping[str, Tensor], trainer: str) -> NnunetCheckpoint:
    plan, stage = record.plan, record.plan.stages[record.stage]
    assert isinstance(stage.model, UNetConfig)
    return NnunetCheckpoint(
        weights=nnunet_weights(stage.model, weights, channels=plan.inputs_of(stage), outputs=plan.labels.num_outputs),
        configuration=record.stage,
        trainer=trainer,
        mirror_axes=_mirrored(record),
        epochs=record.step // stage.train.iterations_per_epoch,
    )


def _require_replaceable(target: Path, *, overwrite: bool) -> None:
    """Check that what is in the model's place, if anything, is an earlier export."""
    if overwrite or not is_taken(target):
        return
    try:
        made_by = parse_json(read_whole(target / PLANS))["experiment_planner_used"]
    except (OSError, JsonError, KeyError, TypeError):
        made_by = None
    if made_by != PLANNER:
        raise UsageError(
            "This would replace what the command did not make",
            where=target,
            remedy=f"Choose another place, or replace it with {option('overwrite', True)}",
        )
