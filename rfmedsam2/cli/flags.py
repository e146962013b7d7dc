"""Flags of the volume commands, in groups: each is a box of its own in --help, and one argument of a command.

A flag keeps its name whatever its group is: `--step-size`, not `--tiles.step-size`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from rfmedsam2.choices import Backbone, Preset
from rfmedsam2.cli.command import layout_of

ROOT = "Folder of raw/ preprocessed/ results/; else RFMED_ROOT, nnU-Net's three variables, or ./rfmed_data."
DATASET = "Id (217), name (BTCV) or folder (Dataset217_BTCV); else RFMED_DATASET, or the only dataset."
Root = Annotated[Path | None, arg(metavar="DIR", help=ROOT)]
AsJson = Annotated[bool, arg(name="json", help="Print the result as JSON.")]
DatasetName = Annotated[str | None, arg(aliases=("-d",), metavar="NAME", help=DATASET)]
PlanName = Annotated[str | None, arg(aliases=("-p",), metavar="NAME", help="Name of the plan, if there are several.")]
Device = Annotated[str, arg(metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")]
Workers = Annotated[int, arg(metavar="N", help="Number of cases processed in parallel.")]
Set = Annotated[
    tuple[str, ...],
    arg(name="set", metavar="FIELD=VALUE", help="Override fields of the plan: 3d_fullres.train.learning_rate=0.01 ..."),
]


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Without these, the only trained model is used; if several match, they are listed."""

    dataset: DatasetName = None
    plan: PlanName = None
    configuration: Annotated[str | None, arg(aliases=("-c",), metavar="NAME", help="2d, 3d_fullres or 3d_lowres.")] = (
        None
    )
    folds: Annotated[
        tuple[str, ...], arg(aliases=("-f",), metavar="FOLD", help="Folds; default: all trained ones.")
    ] = ()
    model: Annotated[
        Path | None, arg(aliases=("-m",), metavar="DIR", help="Folder with fold_0 ..., instead of -d, -p and -c.")
    ] = None
    root: Root = None

    def folder(self) -> Path:
        """The folder of the model that is meant."""
        if self.model is not None:
            return self.model
        from rfmedsam2.cli import resolve

        layout = layout_of(self.root)
        named = {"dataset": self.dataset, "plan": self.plan, "configuration": self.configuration}
        return resolve.trained_model(layout, os.environ, **named).folder


@dataclass(frozen=True, kw_only=True)
class PredictOutput:
    """What is written."""

    output: Annotated[
        Path, arg(aliases=("-o",), metavar="DIR", help="Output folder of the label maps and predictions.json.")
    ]
    probabilities: Annotated[
        bool, arg(help="Also write each case's class probabilities to a chunked file (blosc2).")
    ] = False
    continue_: Annotated[
        bool, arg(name="continue", help="Keep label maps already made by the same model with the same options.")
    ] = False
    as_json: AsJson = False


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the network runs over a volume."""

    checkpoint: Annotated[
        Literal["final", "best", "latest"],
        arg(help="Checkpoint of each fold; the latest if training has not ended."),
    ] = "final"
    step_size: Annotated[
        float | None, arg(metavar="SHARE", help="Distance of tiles as a fraction of the patch, instead of the plan's.")
    ] = None
    mirror: Annotated[
        Literal["on", "off"] | None, arg(help="Average over flips (on) or not (off), instead of the plan's setting.")
    ] = None
    tile_batch: Annotated[
        int | None, arg(metavar="N", help="Number of tiles per forward pass, instead of the plan's.")
    ] = None
    skip_empty: Annotated[bool, arg(help="Skip tiles without body: faster on scans with much surrounding air.")] = False
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """For RFMedSAM 2 models only."""

    step: Annotated[
        int | None, arg(metavar="N", help="Return the result of Step 0 (the U-Net), 1 or 2, instead of the last step.")
    ] = None
    boxes: Annotated[
        Path | None,
        arg(
            metavar="PATH",
            help="Prompt with these boxes instead of the model's own: a folder of label maps (CASE + ending), or a "
            'JSON {case: [{"label": name, "slice": z, "box": [x0, y0, x1, y1]}]} in voxels of the image.',
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PlanChoice:
    """Which plan of which dataset."""

    dataset: DatasetName = None
    plan: PlanName = None
    set_: Set = ()
    root: Root = None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Instead of the plan's figures."""

    epochs: Annotated[int | None, arg(metavar="N", help="Number of epochs.")] = None
    iterations: Annotated[int | None, arg(metavar="N", help="Iterations per epoch.")] = None
    lr: Annotated[float | None, arg(metavar="RATE", help="Initial learning rate.")] = None


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What a training of RFMedSAM 2 starts from."""

    sam2: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="Published weights of the plan's backbone (sam2.1_hiera_large.pt, mobile_sam.pt ...).",
        ),
    ] = None
    unet: Annotated[
        Path | None,
        arg(metavar="PATH", help="A trained U-Net (checkpoint or model folder) that Step 0 starts from."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """How the training runs; nothing here changes what is learned."""

    restart: Annotated[bool, arg(help="Start over; existing results are moved to a folder beside it.")] = False
    validate: Annotated[
        bool, arg(help="Do not predict and score the validation cases as whole volumes at the end.")
    ] = True
    tensorboard: Annotated[bool, arg(help="Also write TensorBoard events (needs the extra `tensorboard`).")] = False
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The data, and how far to go."""

    dataset: DatasetName = None
    configurations: Annotated[
        tuple[str, ...],
        arg(aliases=("-c",), metavar="NAME", help="Configurations to preprocess; default: all of the plan except 2d."),
    ] = ()
    group_regex: Annotated[
        str | None,
        arg(
            metavar="REGEX",
            help="Cases whose ids have the same first capture group of this regular expression are one patient.",
        ),
    ] = None
    clean: Annotated[bool, arg(help="Compute a new fingerprint even if no file has changed.")] = False
    preprocess: Annotated[bool, arg(help="Only verify and plan.")] = True
    root: Root = None
    workers: Workers = 2


@dataclass(frozen=True, kw_only=True)
class Planning:
    """What the plan is made for."""

    preset: Annotated[
        Preset,
        arg(
            help="Sizes by hardware: cpu (a laptop), 8gb, 24gb, 80gb (GPU memory), nnunet (nnU-Net's own "
            "decisions), default (RFMedSAM 2's patch of 32x256x256)."
        ),
    ] = "default"
    model: Annotated[
        Literal["unet", "rfmedsam2"],
        arg(metavar="unet|rfmedsam2", help="A U-Net (unet), or a U-Net refined by SAM 2 (rfmedsam2)."),
    ] = "unet"
    backbone: Annotated[
        Backbone | None,
        arg(
            metavar="NAME",
            help="Image encoder of rfmedsam2: sam2_tiny, sam2_small, sam2_base_plus, sam2_large, nano (small, "
            "trained from scratch), mobile_sam or lite_medsam; default: by the preset.",
        ),
    ] = None
    plan: Annotated[
        str | None, arg(aliases=("-p",), metavar="NAME", help="Name of the plan; default: by its preset.")
    ] = None
    set_: Set = ()


@dataclass(frozen=True, kw_only=True)
class GivenDecisions:
    """Decisions that are taken from elsewhere."""

    nnunet_plans: Annotated[
        Path | None, arg(metavar="FILE", help="Import nnU-Net's plans.json instead of planning.")
    ] = None
    published: Annotated[
        Path | None,
        arg(metavar="FILE", help="Adapt one of our plans, as in the folder plans/, to this dataset's intensities."),
    ] = None
    planner: Annotated[
        str | None,
        arg(metavar="NAME", help="Use the planner of an installed package; rfmed_doctor lists them."),
    ] = None
    spacing: Annotated[
        tuple[float, float, float] | None,
        arg(metavar="MM", help="Target spacing z y x in mm of 3d_fullres instead of nnU-Net's rule."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LabelNames:
    """What the label values mean; else what lies beside the label maps says it."""

    dataset: DatasetName = None
    labels: Annotated[Path | None, arg(metavar="FILE", help="A dataset.json with the labels.")] = None
    root: Root = None


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How label maps are scored."""

    tolerance: Annotated[float, arg(metavar="MM", help="Tolerance of the normalized surface Dice.")] = 2.0
    both_empty: Annotated[
        Literal["skip", "perfect"], arg(help="Score of a class that is absent from both label maps.")
    ] = "skip"
    workers: Workers = 2


@dataclass(frozen=True, kw_only=True)
class PhantomSize:
    """What is made; the same seed gives the same dataset."""

    cases: Annotated[int, arg(help="Number of labeled training cases.")] = 8
    test_cases: Annotated[int, arg(help="Number of test cases, with labels in a folder beside.")] = 2
    shape: Annotated[tuple[int, int, int], arg(help="Largest shape z y x, in voxels.")] = (40, 96, 96)
    modality: Annotated[Literal["ct", "mr"], arg(help="CT with contrast phases, or MR with a bias field.")] = "ct"
    seed: Annotated[int, arg(help="Seed of everything random.")] = 0


@dataclass(frozen=True, kw_only=True)
class StudiedModels:
    """Published models, by their files."""

    sam: Annotated[
        tuple[Path, ...],
        arg(metavar="FILE", help="MobileSAM, LiteMedSAM, sam_vit_b, sam_vit_l or sam_vit_h; prompted on all slices."),
    ] = ()
    sam2: Annotated[tuple[Path, ...], arg(metavar="FILE", help="sam2.1_hiera_* or sam2_hiera_*.")] = ()
    frame_size: Annotated[int, arg(help="Side length in pixels of SAM 2's input, a multiple of 32.")] = 1024
    max_conditioning: Annotated[
        int | None,
        arg(metavar="N", help="Number of nearest prompted slices that SAM 2 attends to; default: all, as published."),
    ] = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class StudiedPrompts:
    """Prompts, made from the labels."""

    prompts: Annotated[
        tuple[Literal["box", "point"], ...],
        arg(help="A tight box, the pixel nearest to the center of mass, or both, per class and slice."),
    ] = ("box", "point")
    prompted: Annotated[
        tuple[Literal["all", "two", "one"], ...],
        arg(help="Which of the slices that contain a class SAM 2 is prompted on."),
    ] = ("all", "two", "one")


@dataclass(frozen=True, kw_only=True)
class StudiedData:
    """Data, and their display."""

    dataset: DatasetName = None
    cases: Annotated[int | None, arg(metavar="N", help="Number of training cases, the first ones; default: all.")] = (
        None
    )
    channel: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help="Name or number of the channel to use; default: three channels as colors, else the first.",
        ),
    ] = None
    window: Annotated[
        tuple[float, float] | None,
        arg(
            metavar="LOW HIGH",
            help="Intensities shown as black and white; default: -160 to 240 HU for CT, percentiles for others.",
        ),
    ] = None
    root: Root = None
