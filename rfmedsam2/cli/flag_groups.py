"""Groups of flags of the commands from data to report: each is a box in --help, and one argument of a command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from rfmedsam2.choices import Backbone, Backend, LabelFormat, Model, Preset, Step0Training, TrackerName
from rfmedsam2.cli.flags import FORMAT, AsJson, DatasetName, Device, PlanName, Root, Set, Workers


@dataclass(frozen=True, kw_only=True)
class PredictOutput:
    """What is written."""

    output: Annotated[
        Path,
        arg(
            aliases=("-o",),
            metavar="PATH",
            help="Output folder of the label maps and predictions.json; for one image also a file (out.nii.gz).",
        ),
    ]
    probabilities: Annotated[
        bool, arg(help="Also write each case's class probabilities to a chunked file (blosc2).")
    ] = False
    formats: Annotated[tuple[LabelFormat, ...], arg(name="format", help=f"Also: {FORMAT}")] = ()
    continue_: Annotated[
        bool,
        arg(
            name="continue",
            help="Keep label maps already made by the same model with the same options, and as they are those that "
            "were corrected or come from elsewhere.",
        ),
    ] = False
    overwrite: Annotated[
        bool, arg(help="Replace also files that predictions.json does not list, or that were changed since.")
    ] = False
    part: Annotated[
        str | None,
        arg(
            metavar="K/N",
            help="Predict the K-th of N parts of the cases; the others may be predicted into the same folder at once.",
        ),
    ] = None
    postprocessing: Annotated[bool, arg(help="Do not apply the model's postprocessing rule.")] = True
    as_json: AsJson = False

    @property
    def replacing(self) -> dict[str, bool]:
        """How files that are there are treated."""
        return {"continue_": self.continue_, "overwrite": self.overwrite}


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the network runs over a volume."""

    checkpoint: Annotated[
        Literal["final", "best", "latest"],
        arg(help="Checkpoint of each fold; the latest if training has not ended, the best if that alone is there."),
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
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        arg(
            help="Of the networks; auto: 16 bit on a GPU, fp32 on a CPU, where bf16 pays with AMX or AVX512-BF16 only."
        ),
    ] = "auto"
    backend: Annotated[
        Backend,
        arg(help="What runs the networks on a CPU; auto: OpenVINO (extra openvino) where it is faster."),
    ] = "auto"
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
class Cascade:
    """For second stages of a cascade only."""

    previous_stage: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="The first stage's label maps (CASE + ending), instead of the first stage's model beside this one.",
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
    """What a training starts from."""

    weights: Annotated[
        Path | None,
        arg(
            metavar="MODEL",
            help="A trained model to fine-tune: model folder, fold or checkpoint, ours or nnU-Net's. Output layers "
            "of other classes start from scratch.",
        ),
    ] = None
    encoder_rate: Annotated[
        float | None,
        arg(metavar="FACTOR", help="Learning rate of the U-Net's encoder as a factor of --lr; 0 freezes it."),
    ] = None
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
    step0: Annotated[
        Step0Training | None,
        arg(
            help="Train Step 0 together with Steps 1 and 2, or before them: crossfit gives them logits of U-Nets that "
            "were not trained on the case. Default: the plan's choice.",
        ),
    ] = None
    cache: Annotated[
        str | None,
        arg(
            metavar="views=N",
            help="Train on N augmented patches of every case, whose features from the frozen image encoder are "
            "computed once and kept on disk. Default: the plan's choice.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """How the training runs, and where; nothing here changes what is learned."""

    restart: Annotated[bool, arg(help="Start over; existing results are moved to a folder beside it.")] = False
    validate: Annotated[
        bool, arg(help="Do not predict and score the validation cases as whole volumes at the end.")
    ] = True
    probabilities: Annotated[
        bool,
        arg(help="Keep the class probabilities of the validation cases, of which rfmed_select makes ensembles."),
    ] = False
    validate_only: Annotated[
        bool, arg(help="Do not train: predict and score the validation cases with the trained weights.")
    ] = False
    checkpoint: Annotated[
        Literal["final", "best"],
        arg(help="With --validate-only: which weights; the best are scored apart, in validation_best."),
    ] = "final"
    name: Annotated[
        str | None,
        arg(metavar="NAME", help="Train into PLAN-NAME__CONFIGURATION: several trainings of one plan and its cases."),
    ] = None
    trackers: Annotated[
        tuple[TrackerName, ...],
        arg(help="Experiment trackers that get the metrics too; each needs the extra of its name."),
    ] = ()
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
    skip_faulty: Annotated[bool, arg(help="Go on without cases with errors, which are named.")] = False
    skip_unlabeled: Annotated[
        bool,
        arg(
            help="Leave voxels of the ignore label out of the intensity statistics; nnU-Net counts them as foreground."
        ),
    ] = False
    preprocess: Annotated[bool, arg(help="Only verify and plan.")] = True
    part: Annotated[
        str | None,
        arg(
            metavar="K/N",
            help="Plan nothing, preprocess the K-th of N parts of the cases by a plan that exists; others at once.",
        ),
    ] = None
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
    gpu_memory: Annotated[
        float | None,
        arg(metavar="GB", help="Plan for this GPU memory by nnU-Net's rule, with the preset default or nnunet*."),
    ] = None
    model: Annotated[
        Model,
        arg(
            metavar="NAME",
            help="A U-Net (unet), a U-Net refined by SAM 2 (rfmedsam2), MONAI's SegResNet or SwinUNETR (segresnet, "
            "swinunetr; extra `monai`), or Primus (primus_s, primus_b, primus_m, primus_l).",
        ),
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
    plan_of: Annotated[
        Path | None,
        arg(metavar="MODEL", help="Take over the plan of a trained model, ours or nnU-Net's, to fine-tune it here."),
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
    """What the label values mean; else what lies beside the label maps says it, else they are scored by number."""

    dataset: DatasetName = None
    labels: Annotated[Path | None, arg(metavar="FILE", help="A dataset.json with the labels.")] = None
    root: Root = None


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Which label maps are scored, and how."""

    cases: Annotated[
        tuple[str, ...],
        arg(metavar="CASE", help="Score only these cases; default: all references, each of which must be predicted."),
    ] = ()
    tolerance: Annotated[float, arg(metavar="MM", help="Tolerance of the normalized surface Dice.")] = 2.0
    both_empty: Annotated[
        Literal["skip", "perfect"], arg(help="Score of a class that is absent from both label maps.")
    ] = "skip"
    workers: Workers = 2


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
