"""Training a refiner: a plan, pictures with masks and a base's weights go in, a folder of checkpoints comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rfmedsam2.engine.checkpoint import FINAL, LATEST, made_now
from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.log import StepReport
from rfmedsam2.engine.run_folder import training_folder
from rfmedsam2.engine.runtime import start_runtime
from rfmedsam2.engine.task import Progress, Run
from rfmedsam2.engine.task import silent as show_nothing
from rfmedsam2.errors import UsageError
from rfmedsam2.reporting.training_curves import progress_png
from rfmedsam2.store.atomic import write_text
from segment_anything_hq import models
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.records import RefinerPlan, RefinerRecord
from segment_anything_hq.tasks.refiner import RefinerTask

logger = logging.getLogger(__name__)
PLAN = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How to train.

    Attributes:
        device: auto, cpu, cuda, cuda:1 or mps.
        weights: published weights of the base; None: a new one, which only the nano backbones are for.
        decoder: checkpoint of the base's fine-tuned mask decoder, for SAM-REF, SAM2-REF and SAM2Refiner.
        cache: folder to keep what the frozen encoder makes of frames.
        score_base: score the network before its first step: what it starts from, which is its base.
        restart: begin anew; what the folder holds is kept beside it under another name.
        tensorboard: also write TensorBoard events.
        show: called after every step and validation.
    """

    device: str = "auto"
    weights: Path | None = None
    decoder: Path | None = None
    cache: Path | None = None
    score_base: bool = True
    restart: bool = False
    tensorboard: bool = False
    show: Callable[[StepReport], None] = show_nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How it ended.

    Attributes:
        progress: what the engine says.
        before: scores before the first step; None where it was not asked for, or training went on.
    """

    progress: Progress
    before: dict[str, float] | None


def train(
    plan: RefinerPlan,
    training: Sequence[ImageSet],
    validation: Sequence[ImageSet],
    folder: Path,
    options: TrainOptions | None = None,
) -> TrainResult:
    """Train a method; goes on where an interrupted training of the same plan and base was.

    Leaves in the folder: plan.json, checkpoints of what was trained (the base is not repeated in them), metrics.jsonl,
    metrics.csv and progress.png.

    Args:
        plan: everything but data and weights.
        training: sets to train on, with samples.
        validation: held-out sets; empty: nothing is scored.
        folder: for the results.
        options: how to run.

    Raises:
        PlanError: a frame size or backbone that the method cannot take.
        CheckpointError: weights of another model, or a checkpoint of another training.
        UsageError: no weights, views kept that are never seen twice, or another run that trains in the folder.
        RfMedSamError: what the engine and the data raise.
    """
    options = options or TrainOptions()
    _check(plan, options)
    torch.manual_seed(plan.train.seed)  # the same first weights on every rank
    network = models.build(
        plan.method,
        plan.backbone,
        frame_size=plan.frame_size,
        weights=options.weights,
        decoder=options.decoder,
    )
    base = "new" if options.weights is None else options.weights.name
    digest = models.base_sha256(network)

    def record(step: int, scores: dict[str, float]) -> RefinerRecord:
        return RefinerRecord(
            plan=plan,
            base=base,
            base_sha256=digest,
            step=step,
            scores=scores,
            **made_now(),
        )

    with (
        start_runtime(options.device, precision=plan.train.precision) as runtime,
        training_folder(folder, runtime, restart=options.restart),
    ):
        task = RefinerTask(
            plan, network, training=training, validation=validation, runtime=runtime, cache=options.cache
        )
        begun = runtime.any(any((folder / name).is_file() for name in (LATEST, FINAL)))
        before = None
        if options.score_base and validation and not begun:
            with torch.no_grad(), runtime.autocast():
                before = task.validate()
        run = Run(folder=folder, record=record, runtime=runtime, show=options.show, tensorboard=options.tensorboard)
        progress = fit(task, plan.train, run, resume=True)
        if runtime.is_main:
            write_text(folder / PLAN, plan.to_json())
            progress_png(folder)
    return TrainResult(progress=progress, before=before)


def _check(plan: RefinerPlan, options: TrainOptions) -> None:
    if options.weights is None and not plan.backbone.endswith("nano"):
        raise UsageError(
            f"{plan.method} refines a base that was trained before",
            where=plan.backbone,
            expected="its published weights (sam_vit_b_01ec64.pth, mobile_sam.pt, sam2.1_hiera_large.pt ...)",
            remedy="Give their file with --weights",
        )
    if options.cache is not None and plan.views_per_object is None:
        raise UsageError(
            "Frames that are new every time cannot be kept embedded",
            expected="a number of views of each object",
            remedy="Add --set views_per_object=4, or leave --cache out",
        )
