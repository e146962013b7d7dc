"""samhq_train: train a method on images with masks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rfmedsam2.cli.command import command, end_if_stopped, say, tell
from rfmedsam2.system.ranks import ranks_of
from segment_anything_hq.cli.flag_groups import RefinerPlanChoice, RefinerRun, TrainedNetwork, TrainingData

if TYPE_CHECKING:
    from segment_anything_hq.data.datasets import ImageSet
    from segment_anything_hq.records import RefinerPlan
    from segment_anything_hq.tasks.train import RefinerTrainResult


def train(
    network: TrainedNetwork, *, images: TrainingData, plan: RefinerPlanChoice = RefinerPlanChoice(), run: RefinerRun
) -> None:
    """Train a refiner on a frozen SAM or SAM 2; the same command resumes an interrupted training."""
    from rfmedsam2.cli.progress import bars

    with bars.training():
        from segment_anything_hq.tasks import train as verb

        training, held = _split_data(images)
        samples = sum(len(part.samples) for part in training)
        chosen = _plan(network, plan, samples=samples)
        held_out_samples = sum(len(part.samples) for part in held)
        say(f"Training {network.method} on {network.backbone}: {samples} objects, {held_out_samples} held out")
        options = verb.RefinerTrainOptions(
            device=run.device,
            weights=network.weights,
            decoder=network.decoder,
            cache=run.cache,
            score_base=run.score_base,
            restart=run.restart,
            trackers=run.trackers,
            track=bars,
        )
        result = verb.train_refiner(chosen, training, held, run.output, options)
    _print_result(result, run.output)


def _split_data(images: TrainingData) -> tuple[tuple[ImageSet, ...], tuple[ImageSet, ...]]:
    """Training data and held-out data."""
    from segment_anything_hq.data.open_data import open_data, split_held_out

    training = open_data(images.data, rule=images.mask_rule, beside=images.validation)
    if images.validation:
        return training, open_data(images.validation, rule=images.mask_rule, beside=images.data)
    return split_held_out(training, images.held_out) if images.held_out else (training, ())


def _plan(network: TrainedNetwork, wanted: RefinerPlanChoice, *, samples: int) -> RefinerPlan:
    """The method's default plan, or the given one, with overrides applied."""
    from rfmedsam2.records.overrides import with_overrides
    from rfmedsam2.system.atomic import read_record
    from segment_anything_hq.records import RefinerPlan
    from segment_anything_hq.tasks.defaults import default_plan

    method, backbone = network.method, network.backbone
    if wanted.plan is None:
        plan = default_plan(method, backbone, samples=samples)
    else:
        plan = read_record(wanted.plan, RefinerPlan)
    changes = wanted.changes(method=method, backbone=backbone)
    return with_overrides(plan, changes, where="the plan of this training")


def _print_result(result: RefinerTrainResult, output: Path) -> None:
    """Print the result of the training."""
    progress = result.progress
    end_if_stopped(progress)
    if not ranks_of(os.environ).is_main:
        return  # only the main rank prints the result
    tell(f"Trained {progress.step} steps in {progress.seconds / 60:.1f} min: {output}")
    before = result.before or {}
    for name, value in progress.scores.items():
        was = f"{before[name]:.4f} before, " if name in before else ""
        tell(f"{name}: {was}{value:.4f} now")


train_command = command(train, family="samhq")
