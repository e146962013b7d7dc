"""samhq_train: any of the methods on pictures with masks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from rfmedsam2.cli.command import Device, command, end_if_stopped, say
from segment_anything_hq.cli.names import AnyBackbone, MaskRule, Trainable

if TYPE_CHECKING:
    from segment_anything_hq.data.datasets import ImageSet
    from segment_anything_hq.records import RefinerPlan
    from segment_anything_hq.tasks.train import TrainResult

Data = Annotated[tuple[str, ...], arg(metavar="[NAME=]FOLDER")]
Weights = Annotated[Path | None, arg(aliases=("-w",), metavar="FILE", help="Published weights of the backbone.")]
Decoder = Annotated[
    Path | None,
    arg(metavar="FILE", help="Checkpoint of a fine-tuned mask decoder (sam_decoder, sam2_decoder) to refine."),
]
FrameSize = Annotated[int | None, arg(metavar="PIXELS", help="A side of the frames, instead of the plan's.")]
BatchSize = Annotated[int | None, arg(metavar="N", help="Objects of a batch, instead of the plan's.")]
Epochs = Annotated[int | None, arg(metavar="N", help="Instead of the plan's.")]
Iterations = Annotated[int | None, arg(metavar="N", help="Per epoch, instead of the plan's.")]
Rate = Annotated[float | None, arg(metavar="RATE", help="Initial learning rate, instead of the plan's.")]
Set = Annotated[
    tuple[str, ...],
    arg(
        name="set",
        metavar="FIELD=VALUE",
        help="Change fields of the plan: prompting.box=0.5 jitter=null views_per_object=4 train.epochs=3 ...",
    ),
]


def train(
    method: Annotated[Positional[Trainable], arg(metavar="METHOD")],
    *,
    backbone: Annotated[AnyBackbone, arg(aliases=("-b",), metavar="NAME")],
    data: Data,
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    weights: Weights = None,
    decoder: Decoder = None,
    validation: Data = (),
    held_out: Annotated[float, arg(metavar="SHARE")] = 0.1,
    mask_rule: Annotated[MaskRule, arg(metavar="RULE")] = "above_128",
    plan: Annotated[Path | None, arg(aliases=("-p",), metavar="FILE")] = None,
    frame_size: FrameSize = None,
    batch_size: BatchSize = None,
    epochs: Epochs = None,
    iterations: Iterations = None,
    lr: Rate = None,
    set_: Set = (),
    cache: Annotated[Path | None, arg(metavar="DIR")] = None,
    score_base: bool = True,
    restart: bool = False,
    tensorboard: bool = False,
    device: Device = "auto",
) -> None:
    """Train a refiner on a frozen SAM or SAM 2; the same command continues a training that was interrupted.

    Args:
        method: hq_sam, sam_ref, sam_decoder (on SAM's vit_*), hq_sam2, sam2_ref, sam2_refiner, sam2_decoder (on SAM 2's
            hiera_*). Each starts from its paper's figures; samhq_summary shows its size.
        backbone: vit_b, vit_l, vit_h, vit_tiny (MobileSAM), hiera_t, hiera_s, hiera_b+ or hiera_l.
        data: Pictures with masks: a folder with images/ and masks/, or NAME=FOLDER with hqseg44k_train, coco_lvis_train
            and others (an unknown name lists them).
        output: Folder for checkpoints, metrics and plan.json.
        validation: Data that is held out; else a share of --data is.
        held_out: That share, chosen by the pictures' names; 0: nothing is held out or scored.
        mask_rule: What values of masks mean: above_128, ignore_128 (128 is ignored) or any (all but 0).
        plan: A plan.json of an earlier training, instead of the paper's figures.
        cache: Keep what the frozen encoder makes of frames in this folder (needs views_per_object).
        score_base: Score the network before its first step: what there is to beat.
        restart: Begin anew; what was trained before is kept beside it under another name.
        tensorboard: Also write TensorBoard events (needs the extra `tensorboard`).
    """
    from rfmedsam2.cli.console import TrainingView
    from segment_anything_hq.tasks.train import TrainOptions
    from segment_anything_hq.tasks.train import train as run

    training, held = _parts(data, validation, held_out, mask_rule)
    samples = sum(len(images.samples) for images in training)
    sizes = {"frame_size": frame_size, "batch_size": batch_size}
    lengths = {"train.epochs": epochs, "train.iterations_per_epoch": iterations, "train.learning_rate": lr}
    fields = {"method": method, "backbone": backbone, **sizes, **lengths}
    changes = [f"{field}={value}" for field, value in fields.items() if value is not None]
    chosen = _plan(method, backbone, plan, samples=samples, changes=[*changes, *set_])
    kept_away = sum(len(images.samples) for images in held)
    say(f"Training {method} on {backbone}: {samples} objects to train on, {kept_away} held out")
    with TrainingView() as view:
        options = TrainOptions(
            device=device,
            weights=weights,
            decoder=decoder,
            cache=cache,
            score_base=score_base,
            restart=restart,
            tensorboard=tensorboard,
            show=view,
        )
        result = run(chosen, training, held, output, options)
    _tell(result, output)


def _parts(
    data: tuple[str, ...], validation: tuple[str, ...], share: float, rule: MaskRule
) -> tuple[tuple[ImageSet, ...], tuple[ImageSet, ...]]:
    """What to train on, and what is held out."""
    from segment_anything_hq.data.open_data import open_data, split_held_out

    training = open_data(data, rule=rule)
    if validation:
        return training, open_data(validation, rule=rule)
    return split_held_out(training, share) if share else (training, ())


def _plan(
    method: Trainable, backbone: AnyBackbone, file: Path | None, *, samples: int, changes: list[str]
) -> RefinerPlan:
    """The method's recipe, or an earlier training's plan, changed."""
    from rfmedsam2.records.overrides import with_overrides
    from rfmedsam2.store.atomic import read_record
    from segment_anything_hq.records import RefinerPlan
    from segment_anything_hq.tasks.defaults import default_plan

    plan = default_plan(method, backbone, samples=samples) if file is None else read_record(file, RefinerPlan)
    return with_overrides(plan, changes, where="the plan of this training")


def _tell(result: TrainResult, output: Path) -> None:
    """How the training ended."""
    progress = result.progress
    end_if_stopped(progress)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # the main rank tells the result
    print(f"Trained {progress.step} steps in {progress.seconds / 60:.1f} min: {output}")
    before = result.before or {}
    for name, value in progress.scores.items():
        was = f"{before[name]:.4f} before, " if name in before else ""
        print(f"{name}: {was}{value:.4f} now")


train_command = command(train, family="samhq")
