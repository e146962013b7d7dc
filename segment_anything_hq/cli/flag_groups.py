"""Flags of the image commands, in groups: each is a box of its own in --help, and one argument of a command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from rfmedsam2.choices import TrackerName
from rfmedsam2.cli.command import say
from rfmedsam2.cli.flags import Device
from rfmedsam2.errors import sentences
from segment_anything_hq import choices
from segment_anything_hq.cli.flags import MaskRule

if TYPE_CHECKING:
    from segment_anything_hq.inference.network_spec import LoadedNetwork, ResolvedSpec

BACKBONES = "vit_b, vit_l, vit_h, vit_tiny (MobileSAM), hiera_t, hiera_s, hiera_b+ or hiera_l."


@dataclass(frozen=True, kw_only=True)
class NetworkChoice:
    """What chooses the network: a checkpoint of samhq_train, or a method with published weights."""

    method: Annotated[
        Positional[choices.AnyMethod | None],
        arg(
            metavar="[METHOD]",
            help="hq_sam, hq_sam2, sam_ref, sam2_ref, sam2_refiner, sam_decoder, sam2_decoder, or sam, sam2 as "
            "published.",
        ),
    ] = None
    backbone: Annotated[choices.Backbone | None, arg(aliases=("-b",), metavar="NAME", help=BACKBONES)] = None
    weights: Annotated[Path | None, arg(aliases=("-w",), metavar="FILE", help="Published weights of the backbone.")] = (
        None
    )
    decoder: Annotated[
        Path | None,
        arg(metavar="FILE", help="Checkpoint of the fine-tuned mask decoder that the method was trained with."),
    ] = None
    model: Annotated[
        Path | None,
        arg(
            aliases=("-m",),
            metavar="FILE",
            help="Checkpoint of samhq_train; it contains method, backbone and frame size.",
        ),
    ] = None
    frame_size: Annotated[
        int | None, arg(metavar="PIXELS", help="Side of the frames; default: the checkpoint's, or 1024.")
    ] = None
    device: Device = "auto"

    def resolved(self) -> ResolvedSpec:
        """Resolve the network, without loading it."""
        from segment_anything_hq.inference.network_spec import NetworkSpec, resolve_spec

        return resolve_spec(
            NetworkSpec(
                method=self.method,
                backbone=self.backbone,
                weights=self.weights,
                decoder=self.decoder,
                model=self.model,
                frame_size=self.frame_size,
            )
        )

    def load(self, named: ResolvedSpec) -> LoadedNetwork:
        """Load the network onto its device, and print its warnings."""
        from rfmedsam2.cli.progress import bars

        with bars.working("Loading the network"):
            from rfmedsam2.system.devices import choose_device
            from segment_anything_hq.inference.network_spec import load_network

            place = choose_device(self.device)
            chosen = load_network(named)
            chosen.network.to(place)
        for note in chosen.notes:
            say(sentences([f"Note: {note}"]))
        return chosen


@dataclass(frozen=True, kw_only=True)
class EvaluatedData:
    """The images and masks."""

    data: Annotated[
        tuple[str, ...],
        arg(
            metavar="[NAME=]FOLDER",
            help="Images with masks: a folder with images/ and masks/ (or both side by side), or NAME=FOLDER "
            "with hqseg44k_test, grabcut, berkeley, davis, sbd or another collection (an unknown name lists them).",
        ),
    ] = ()
    held_out: Annotated[
        float | None,
        arg(
            metavar="SHARE",
            help="Evaluate only the images that samhq_train --held-out SHARE holds out.",
        ),
    ] = None
    samples: Annotated[int | None, arg(metavar="N", help="Evaluate only the first N samples of each set.")] = None
    mask_rule: MaskRule = None

    def chosen(self) -> list[str]:
        """Flags that choose among the data."""
        given = {"--held-out": self.held_out, "--samples": self.samples, "--mask-rule": self.mask_rule}
        return [flag for flag, value in given.items() if value is not None]


@dataclass(frozen=True, kw_only=True)
class Protocols:
    """How it is scored."""

    protocol: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME",
            help="One or more of: box, box_0.2 and box_0.4 (noisy boxes), center, points_N (N random points), clicks "
            "(NoC, NoF strict and as published, 5-mIoU, seconds per click), sat (latency of 16 x 16 points; no data).",
        ),
    ] = ("box",)
    clicks: Annotated[int, arg(metavar="N", help="Maximum number of clicks per object.")] = 20
    seed: Annotated[int, arg(help="Seed of box noise and random points.")] = 0


@dataclass(frozen=True, kw_only=True)
class DetectedBoxes:
    """The images, and whose boxes are masked."""

    annotations: Annotated[
        Path, arg(metavar="FILE", help="instances_val2017.json, lvis_v1_val.json, or another file in their format.")
    ]
    images: Annotated[Path, arg(aliases=("-i",), metavar="DIR", help="Folder of the images.")]
    detections: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="A detector's boxes in COCO's results format; without it, the annotated boxes are used.",
        ),
    ] = None
    max_images: Annotated[int | None, arg(metavar="N", help="Evaluate only the first N images that have boxes.")] = None


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """What is trained, and what it starts from."""

    method: Annotated[
        Positional[choices.Method],
        arg(
            metavar="METHOD",
            help="hq_sam, sam_ref, sam_decoder (on SAM's vit_*), hq_sam2, sam2_ref, sam2_refiner, sam2_decoder (on "
            "SAM 2's hiera_*). Each starts from its paper's settings; samhq_summary shows its size.",
        ),
    ]
    backbone: Annotated[choices.Backbone, arg(aliases=("-b",), metavar="NAME", help=BACKBONES)]
    weights: Annotated[Path | None, arg(aliases=("-w",), metavar="FILE", help="Published weights of the backbone.")] = (
        None
    )
    decoder: Annotated[
        Path | None,
        arg(metavar="FILE", help="Checkpoint of a fine-tuned mask decoder (sam_decoder, sam2_decoder) to start from."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The images and masks."""

    data: Annotated[
        tuple[str, ...],
        arg(
            metavar="[NAME=]FOLDER",
            help="Images with masks: a folder with images/ and masks/, or NAME=FOLDER with hqseg44k_train, "
            "coco_lvis_train or another collection (an unknown name lists them).",
        ),
    ]
    validation: Annotated[
        tuple[str, ...],
        arg(metavar="[NAME=]FOLDER", help="Validation data; without it, a share of --data is held out."),
    ] = ()
    held_out: Annotated[
        float,
        arg(
            metavar="SHARE",
            help="Share of the images to hold out, chosen by their content; 0: no validation.",
        ),
    ] = 0.1
    mask_rule: MaskRule = None


@dataclass(frozen=True, kw_only=True)
class RefinerPlanChoice:
    """Instead of the paper's settings."""

    plan: Annotated[Path | None, arg(aliases=("-p",), metavar="FILE", help="A plan.json of an earlier training.")] = (
        None
    )
    frame_size: Annotated[int | None, arg(metavar="PIXELS", help="Side of the frames.")] = None
    batch_size: Annotated[int | None, arg(metavar="N", help="Objects per batch.")] = None
    epochs: Annotated[int | None, arg(metavar="N", help="Number of epochs.")] = None
    iterations: Annotated[int | None, arg(metavar="N", help="Iterations per epoch.")] = None
    lr: Annotated[float | None, arg(metavar="RATE", help="Initial learning rate.")] = None
    set_: Annotated[
        tuple[str, ...],
        arg(
            name="set",
            metavar="FIELD=VALUE",
            help="Override fields of the plan: prompting.box=0.5 jitter=null views_per_object=4 train.epochs=3 ...",
        ),
    ] = ()

    def changes(self, *, method: choices.Method, backbone: choices.Backbone) -> list[str]:
        """FIELD=VALUE of all that is to be other than the plan's."""
        fields = {
            "method": method,
            "backbone": backbone,
            "frame_size": self.frame_size,
            "batch_size": self.batch_size,
            "train.epochs": self.epochs,
            "train.iterations_per_epoch": self.iterations,
            "train.learning_rate": self.lr,
        }
        return [*(f"{field}={value}" for field, value in fields.items() if value is not None), *self.set_]


@dataclass(frozen=True, kw_only=True)
class RefinerRun:
    """How the training runs."""

    output: Annotated[
        Path, arg(aliases=("-o",), metavar="DIR", help="Output folder for checkpoints, metrics and plan.json.")
    ]
    cache: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="Folder to cache the frozen encoder's output in (needs views_per_object).",
        ),
    ] = None
    score_base: Annotated[bool, arg(help="Do not evaluate the network before its first step.")] = True
    restart: Annotated[bool, arg(help="Start from the beginning; the existing folder is kept under another name.")] = (
        False
    )
    trackers: Annotated[
        tuple[TrackerName, ...],
        arg(help="Experiment trackers that get the metrics too; each needs the extra of its name."),
    ] = ()
    device: Device = "auto"
