"""samhq_train: train a method on images with masks."""

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
    from segment_anything_hq.tasks.train import RefinerTrainResult

Data = Annotated[tuple[str, ...], arg(metavar="[NAME=]FOLDER")]
Weights = Annotated[Path | None, arg(aliases=("-w",), metavar="FILE", help="Published weights of the backbone.")]
Decoder = Annotated[
    Path | None,
    arg(metavar="FILE", help="Checkpoint of a fine-tuned mask decoder (sam_decoder, sam2_decoder) to start from."),
]
FrameSize = Annotated[int | None, arg(metavar="PIXELS", help="Side of the frames, instead of the plan's.")]
BatchSize = Annotated[int | None, arg(metavar="N", help="Objects per batch, instead of the plan's.")]
Epochs = Annotated[int | None, arg(metavar="N", help="Epochs, instead of the plan's.")]
Iterations = Annotated[int | None, arg(metavar="N", help="Iterations per epoch, instead of the plan's.")]
Rate = Annotated[float | None, arg(metavar="RATE", help="Initial learning rate, instead of the plan's.")]
Set = Annotated[
    tuple[str, ...],
    arg(
        name="set",
        metavar="FIELD=VALUE",
        help="Override fields of the plan: prompting.box=0.5 jitter=null views_per_object=4 train.epochs=3 ...",
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
    """Train a refiner on a frozen SAM or SAM 2; run the same command again to resume an interrupted training.

    Args:
        method: hq_sam, sam_ref, sam_decoder (on SAM's vit_*), hq_sam2, sam2_ref, sam2_refiner, sam2_decoder (on SAM 2's
            hiera_*). Each starts from its paper's settings; samhq_summary shows its size.
        backbone: vit_b, vit_l, vit_h, vit_tiny (MobileSAM), hiera_t, hiera_s, hiera_b+ or hiera_l.
        data: Images with masks: a folder with images/ and masks/, or NAME=FOLDER with hqseg44k_train, coco_lvis_train
            or another collection (an unknown name lists them).
        output: Output folder for checkpoints, metrics and plan.json.
        validation: Validation data; without it, a share of --data is held out.
        held_out: Share of the images to hold out, chosen by name; 0: no validation.
        mask_rule: How mask values are interpreted: above_128, ignore_128 (128 is ignored) or any (all but 0).
        plan: A plan.json of an earlier training, instead of the paper's settings.
        cache: Folder to cache the frozen encoder's output in (needs views_per_object).
        score_base: Evaluate the network before its first step.
        restart: Start from the beginning; the existing folder is kept under another name.
        tensorboard: Also write TensorBoard events (needs the extra `tensorboard`).
    """
    from rfmedsam2.cli.console import TrainingView
    from segment_anything_hq.tasks.train import RefinerTrainOptions, train_refiner

    training, held = _split_data(data, validation, held_out, mask_rule)
    samples = sum(len(images.samples) for images in training)
    sizes = {"frame_size": frame_size, "batch_size": batch_size}
    lengths = {"train.epochs": epochs, "train.iterations_per_epoch": iterations, "train.learning_rate": lr}
    fields = {"method": method, "backbone": backbone, **sizes, **lengths}
    changes = [f"{field}={value}" for field, value in fields.items() if value is not None]
    chosen = _plan(method, backbone, plan, samples=samples, changes=[*changes, *set_])
    held_out_samples = sum(len(images.samples) for images in held)
    say(f"Training {method} on {backbone}: {samples} objects, {held_out_samples} held out")
    with TrainingView() as view:
        options = RefinerTrainOptions(
            device=device,
            weights=weights,
            decoder=decoder,
            cache=cache,
            score_base=score_base,
            restart=restart,
            tensorboard=tensorboard,
            show=view,
        )
        result = train_refiner(chosen, training, held, output, options)
    _print_result(result, output)


def _split_data(
    data: tuple[str, ...], validation: tuple[str, ...], share: float, rule: MaskRule
) -> tuple[tuple[ImageSet, ...], tuple[ImageSet, ...]]:
    """Training data and held-out data."""
    from segment_anything_hq.data.open_data import open_data, split_held_out

    training = open_data(data, rule=rule)
    if validation:
        return training, open_data(validation, rule=rule)
    return split_held_out(training, share) if share else (training, ())


def _plan(
    method: Trainable, backbone: AnyBackbone, file: Path | None, *, samples: int, changes: list[str]
) -> RefinerPlan:
    """The method's default plan, or the given one, with overrides applied."""
    from rfmedsam2.records.overrides import with_overrides
    from rfmedsam2.store.atomic import read_record
    from segment_anything_hq.records import RefinerPlan
    from segment_anything_hq.tasks.defaults import default_plan

    plan = default_plan(method, backbone, samples=samples) if file is None else read_record(file, RefinerPlan)
    return with_overrides(plan, changes, where="the plan of this training")


def _print_result(result: RefinerTrainResult, output: Path) -> None:
    """Print the result of the training."""
    progress = result.progress
    end_if_stopped(progress)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # only the main rank prints the result
    print(f"Trained {progress.step} steps in {progress.seconds / 60:.1f} min: {output}")
    before = result.before or {}
    for name, value in progress.scores.items():
        was = f"{before[name]:.4f} before, " if name in before else ""
        print(f"{name}: {was}{value:.4f} now")


train_command = command(train, family="samhq")
