"""samhq_train: any of the methods on pictures with masks."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from rfmedsam2.cli.entry import Device, command, say

Method = Literal["hq_sam", "hq_sam2", "sam_ref", "sam2_ref", "sam2_refiner", "sam_decoder", "sam2_decoder"]
Backbone = Literal[
    "vit_b", "vit_l", "vit_h", "vit_tiny", "vit_nano", "hiera_t", "hiera_s", "hiera_b+", "hiera_l", "hiera_nano"
]
Data = Annotated[tuple[str, ...], arg(metavar="[NAME=]FOLDER")]
MaskRule = Literal["above_128", "ignore_128", "any"]


def train(
    method: Annotated[Positional[Method], arg(metavar="METHOD")],
    *,
    backbone: Annotated[Backbone, arg(aliases=("-b",), metavar="NAME")],
    data: Data,
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    weights: Annotated[Path | None, arg(aliases=("-w",), metavar="FILE")] = None,
    decoder: Annotated[Path | None, arg(metavar="FILE")] = None,
    validation: Data = (),
    held_out: Annotated[float, arg(metavar="SHARE")] = 0.1,
    mask_rule: Annotated[MaskRule, arg(metavar="RULE")] = "above_128",
    plan: Annotated[Path | None, arg(aliases=("-p",), metavar="FILE")] = None,
    frame_size: Annotated[int | None, arg(metavar="PIXELS")] = None,
    batch_size: Annotated[int | None, arg(metavar="N")] = None,
    epochs: Annotated[int | None, arg(metavar="N")] = None,
    iterations: Annotated[int | None, arg(metavar="N")] = None,
    lr: Annotated[float | None, arg(metavar="RATE")] = None,
    set_: Annotated[tuple[str, ...], arg(name="set", metavar="FIELD=VALUE")] = (),
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
        weights: Published weights of the backbone.
        decoder: Checkpoint of a fine-tuned mask decoder (sam_decoder, sam2_decoder) to refine.
        validation: Data that is held out; else a share of --data is.
        held_out: That share, chosen by the pictures' names; 0: nothing is held out or scored.
        mask_rule: What values of masks mean: above_128, ignore_128 (128 is ignored) or any (all but 0).
        plan: A plan.json of an earlier training, instead of the paper's figures.
        frame_size: Pixels a side of the frames, instead of the plan's.
        batch_size: Instead of the plan's.
        epochs: Instead of the plan's.
        iterations: Per epoch, instead of the plan's.
        lr: Initial learning rate, instead of the plan's.
        set_: Change fields of the plan: guidance.box=0.5 jitter=null views=4 train.schedule.warmup_iterations=100 ...
        cache: Keep what the frozen encoder makes of frames in this folder (needs views).
        score_base: Score the network before its first step: what there is to beat.
        restart: Begin anew; what was trained before is kept beside it under another name.
        tensorboard: Also write TensorBoard events (needs the extra `tensorboard`).
    """
    from rfmedsam2.cli.console import TrainingView
    from rfmedsam2.records.changes import with_changes
    from segment_anything_hq.recipes import recipe
    from segment_anything_hq.records import RefinerPlan
    from segment_anything_hq.sources import held_out as parted
    from segment_anything_hq.sources import open_data
    from segment_anything_hq.training import TrainOptions
    from segment_anything_hq.training import train as run

    training, held = open_data(data, rule=mask_rule), open_data(validation, rule=mask_rule) if validation else ()
    if not validation and held_out:
        training, held = parted(training, held_out)
    samples = sum(len(images.samples) for images in training)
    chosen = recipe(method, backbone, samples=samples)
    if plan is not None:
        chosen = RefinerPlan.from_json(plan.read_bytes(), where=plan)
    fields = {
        "method": method,
        "backbone": backbone,
        "frame_size": frame_size,
        "batch_size": batch_size,
        "train.epochs": epochs,
        "train.iterations_per_epoch": iterations,
        "train.learning_rate": lr,
    }
    changes = [f"{field}={value}" for field, value in fields.items() if value is not None]
    chosen = with_changes(chosen, [*changes, *set_], where="the plan of this training")
    say(
        f"Training {method} on {backbone}: {samples} objects to train on, "
        f"{sum(len(images.samples) for images in held)} held out"
    )
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
    progress = result.progress
    if progress.status == "stopped":
        print(f"Stopped by {progress.signal} after step {progress.step}; the same command goes on from there.")
        sys.exit(128 + getattr(signal.Signals, str(progress.signal), signal.SIGTERM))
    if int(os.environ.get("RANK", "0")) != 0:
        return  # the main rank tells the result
    print(f"Trained {progress.step} steps in {progress.seconds / 60:.1f} min: {output}")
    if result.before is not None:
        for name, value in progress.scores.items():
            print(f"{name}: {result.before.get(name, float('nan')):.4f} before, {value:.4f} now")


train_command = command(train, family="samhq")
