"""Train a refiner from a plan, image sets and a base's weights; writes a folder of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rfmedsam2.arguments import option
from rfmedsam2.choices import TrackerName
from rfmedsam2.engine.checkpoint import provenance
from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.monitoring.trackers import Tracking
from rfmedsam2.engine.run_folder import training_folder
from rfmedsam2.engine.runtime import start_runtime
from rfmedsam2.engine.task import Progress, Run
from rfmedsam2.errors import RecordError, RfMedSamError, UsageError
from rfmedsam2.reporting.training_curves import progress_png
from rfmedsam2.store.checkpoint_header import newest_checkpoint, read_header
from rfmedsam2.system.atomic import read_record, write_text
from rfmedsam2.system.progress import Track, silent
from segment_anything_hq import models
from segment_anything_hq.data.content import digests_of, seen_images
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.data.looks import looks_of, saved_again
from segment_anything_hq.records import RefinerPlan, RefinerRecord, trained_images
from segment_anything_hq.tasks.refiner import RefinerTask

logger = logging.getLogger(__name__)
PLAN = "plan.json"
LOOKED_AT = 16
"""Masks of a set that are looked at before the first step."""
UNKNOWN_IMAGES = (
    "A version before 0.2 began this training, and did not record its images. It held out images by name, this one by "
    "content: held-out images may have been trained on before"
)
UNKNOWN_DECODER = (
    "The decoder's checkpoint does not say which images it was trained on: held-out images may be among them"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinerTrainOptions:
    """How to run a training.

    Attributes:
        device: auto, cpu, cuda, cuda:1 or mps.
        weights: published weights of the base; None: random weights, allowed only for the nano backbones.
        decoder: checkpoint of the base's fine-tuned mask decoder, for SAM-REF, SAM2-REF and SAM2Refiner.
        cache: folder of the embedding cache; None: no cache.
        score_base: evaluate the network before its first step, which gives the score of the base.
        restart: start from the beginning; the existing folder is kept under another name.
        trackers: tensorboard, wandb, mlflow, which get the metrics too.
        track: shows steps, and objects that are validated.
    """

    device: str = "auto"
    weights: Path | None = None
    decoder: Path | None = None
    cache: Path | None = None
    score_base: bool = True
    restart: bool = False
    trackers: tuple[TrackerName, ...] = ()
    track: Track = silent


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinerTrainResult:
    """The outcome of a training.

    Attributes:
        progress: the engine's final state: steps, seconds, scores.
        before: scores before the first step; None if not requested, or if the training was resumed.
    """

    progress: Progress
    before: dict[str, float] | None


def train_refiner(
    plan: RefinerPlan,
    training: Sequence[ImageSet],
    validation: Sequence[ImageSet],
    folder: Path,
    options: RefinerTrainOptions | None = None,
) -> RefinerTrainResult:
    """Train a method, or resume an interrupted training with the same plan and base.

    Writes plan.json, checkpoints of the trained part (without the frozen base), metrics.jsonl, metrics.csv and
    progress.png.

    Args:
        plan: all settings except data and weights.
        training: sets to train on, each with samples.
        validation: held-out sets; empty: no validation.
        folder: output folder.
        options: how to run.

    Raises:
        PlanError: the method does not support the plan's frame size or backbone.
        CheckpointError: the weights belong to another model, or the folder's checkpoint to another training.
        UsageError: weights are missing, a cache is given for frames that never repeat, or another process is training
            in the folder.
        RfMedSamError: errors of the engine and the data.
    """
    options = options or RefinerTrainOptions()
    _check(plan, options)
    tracking = Tracking(names=options.trackers, title=Path(folder).name, settings=plan.model_dump(mode="json"))
    torch.manual_seed(plan.train.seed)  # the same initial weights on every rank
    network = models.build(
        plan.method, plan.backbone, frame_size=plan.frame_size, weights=options.weights, decoder=options.decoder
    )
    known = _what_is_known(plan, network, training, options)
    with (
        start_runtime(options.device, precision=plan.train.precision) as runtime,
        training_folder(folder, runtime, restart=options.restart),
    ):
        if runtime.is_main:
            _note_doubts(training)
            _note_seen(validation, training, known)
        task = RefinerTask(
            plan,
            network,
            training=training,
            validation=validation,
            runtime=runtime,
            cache=options.cache,
            track=options.track,
        )
        begun = runtime.any(newest_checkpoint(folder) is not None)
        if begun and not _records_images(folder):
            known["training_images"], known["training_looks"] = None, ()
            logger.warning(UNKNOWN_IMAGES)
        if not begun:
            _require_own_plan(folder / PLAN, plan)
        before = None
        if options.score_base and validation and not begun:
            with torch.no_grad(), runtime.autocast():
                before = task.validate()

        def record(step: int, scores: dict[str, float]) -> RefinerRecord:
            return RefinerRecord(**known, step=step, scores=scores, **provenance())

        run = Run(folder=folder, record=record, runtime=runtime, track=options.track, tracking=tracking)
        progress = fit(task, plan.train, run, resume=True)
        if runtime.is_main:
            write_text(folder / PLAN, plan.to_json())
            progress_png(folder)
    return RefinerTrainResult(progress=progress, before=before)


def _what_is_known(
    plan: RefinerPlan, network: models.Network, training: Sequence[ImageSet], options: RefinerTrainOptions
) -> dict[str, Any]:
    """Fields of a checkpoint's record that are the same at every step; the decoder's images were trained on, too."""
    images, looks = set(digests_of(training).values()), set(looks_of(training).values())
    complete = True
    if options.decoder is not None:
        before, alike = trained_images([read_header(options.decoder, RefinerRecord).record])
        complete, images, looks = before is not None, images.union(before or ()), looks.union(alike)
    return {
        "plan": plan,
        "base": "new" if options.weights is None else options.weights.name,
        "base_sha256": models.base_sha256(network),
        "training_images": tuple(sorted(images)) if complete else None,
        "training_looks": tuple(sorted(looks)),
    }


def _note_doubts(training: Sequence[ImageSet]) -> None:
    """Read some masks of every set here, to warn of what they may mean: workers that load batches do not."""
    for images in training:
        for sample in images.samples[:: max(1, len(images.samples) // LOOKED_AT)]:
            sample.ground_truth()


def _note_seen(validation: Sequence[ImageSet], training: Sequence[ImageSet], known: dict[str, Any]) -> None:
    """Warn of validation images that are training images, or look like them, and if the decoder's are unknown."""
    images, looks = known["training_images"], known["training_looks"]
    if images is None:
        logger.warning(UNKNOWN_DECODER)
        images = digests_of(training).values()
    for name, (seen, every) in seen_images(validation, images).items():
        logger.warning("%d of %d validation images of %s are also training images", seen, every, name)
    for name, (alike, every) in saved_again(validation, looks, images).items():
        logger.warning("%d of %d validation images of %s look like training images", alike, every, name)


def _records_images(folder: Path) -> bool:
    """Whether the checkpoint that is resumed says which images it was trained on."""
    path = newest_checkpoint(folder)
    try:
        return path is None or read_header(path, RefinerRecord).record.training_images is not None
    except RfMedSamError:
        return True  # damaged: the engine says so when it resumes


def _require_own_plan(path: Path, plan: RefinerPlan) -> None:
    """Check that a plan.json in the folder of a new training is the one that will be written there."""
    try:
        same = not path.exists() or read_record(path, RefinerPlan) == plan
    except RecordError:
        same = False
    if not same:
        raise UsageError(
            "The output folder holds another plan, which this training would replace",
            where=path,
            remedy=f"Choose another folder with {option('folder', flag='-o')}, or move the plan",
        )


def _check(plan: RefinerPlan, options: RefinerTrainOptions) -> None:
    if options.weights is None and not plan.backbone.endswith("nano"):
        raise UsageError(
            f"{plan.method} needs pretrained weights of its base",
            where=plan.backbone,
            expected="its published weights (sam_vit_b_01ec64.pth, mobile_sam.pt, sam2.1_hiera_large.pt ...)",
            remedy=f"Give their file with {option('weights')}",
        )
    if options.cache is not None and plan.views_per_object is None:
        raise UsageError(
            f"{option('cache')} requires a finite number of augmented views per object",
            found="views_per_object null",
            remedy=f"Plan with views_per_object=4, or leave {option('cache')} out",
        )
