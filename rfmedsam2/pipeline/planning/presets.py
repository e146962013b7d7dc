"""Presets: the tables of figures that a plan is made from. Change a figure here and every later plan has it.

default          the paper's: patch 32x256x256, batch 2, SGD 1e-3 (RFMedSAM 2, appendix G)
nnunet           nnU-Net 2.8's own decisions for 8 GB, SGD 1e-2
nnunet_resenc_*  nnU-Net's residual-encoder planners M, L, XL (8, 24, 40 GB)
8gb 24gb 80gb    the default's patch shape, shrunk or grown to what the GPU holds by nnU-Net's memory rule
cpu              a first useful model on two cores within ten minutes

RFMedSAM 2 has a table of its own (default, 8gb, 24gb, 80gb, cpu): its patches are square, and SAM 2 needs memory beside
the U-Net.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from rfmedsam2.errors import UsageError
from rfmedsam2.pipeline.planning.topology import FeatureWidths
from rfmedsam2.records.model import Backbone
from rfmedsam2.records.plan import AdamW, Augmentation, Inference, TrainConfig, Validation, WarmupPolySchedule

Preset = Literal[
    "default", "nnunet", "nnunet_resenc_m", "nnunet_resenc_l", "nnunet_resenc_xl", "8gb", "24gb", "80gb", "cpu"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchSizing:
    """How patch, batch and network of one dimensionality are chosen."""

    start: tuple[int, ...] | None = None
    """Patch to begin with, clipped to the median shape; None: nnU-Net's, about a cube in mm."""
    width: FeatureWidths = field(default_factory=FeatureWidths)
    feature_budget: float | None = None
    """Most feature-map values of one sample when `budget_batch` samples fill the memory (nnU-Net's measure: 560e6 for
    batch 2 is about 8 GB); None: no such limit."""
    budget_batch: int = 2
    least_batch: int = 2
    """The patch shrinks until this many samples fit."""
    max_batch_voxels: int | None = None
    """Most voxels of a whole batch; bounds computing time where memory does not. None: no such limit."""
    max_dataset_share: float = 0.05
    """A batch covers at most this share of the training set's voxels (but always two samples)."""
    batch_size: int | None = None
    """Fixed batch size; None: what the limits above leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetPreset:
    """One preset."""

    plan_name: str
    volume: PatchSizing
    """3d_fullres and 3d_lowres."""
    slice: PatchSizing = PatchSizing(width=FeatureWidths(maximum=512), feature_budget=85e6, budget_batch=12)
    """2d."""
    low_resolution_share: float = 0.25
    """Plan 3d_lowres where the 3d_fullres patch covers a smaller share of the median case (nnU-Net's 0.25)."""
    max_case_voxels: int | None = None
    """Coarsen the target spacing, finest axes first, until the median case has no more voxels. None: never."""
    batch_dice: bool | None = None
    """None: nnU-Net's rule (3d_fullres only if there is a 3d_lowres, 3d_lowres never, 2d always)."""
    train: TrainConfig = field(default_factory=TrainConfig)
    inference: Inference = field(default_factory=Inference)
    augmentation: Augmentation = field(default_factory=Augmentation)
    validation: Validation = field(default_factory=Validation)


def _nnunet(plan_name: str, volume: PatchSizing, slice_: PatchSizing) -> UNetPreset:
    return UNetPreset(plan_name=plan_name, volume=volume, slice=slice_, train=TrainConfig(learning_rate=1e-2))


def _resenc(size: str, budget_3d: float, budget_2d: float) -> UNetPreset:
    return _nnunet(
        f"nnunet_resenc_{size}",
        PatchSizing(width=FeatureWidths(block="residual"), feature_budget=budget_3d, max_dataset_share=1.0),
        # nnU-Net's residual planners shrink the 2d patch until twelve samples fit, the plain one until two fit
        PatchSizing(
            width=FeatureWidths(maximum=512, block="residual"),
            feature_budget=budget_2d,
            budget_batch=12,
            least_batch=12,
            max_dataset_share=1.0,
        ),
    )


def _memory(plan_name: str, gigabytes: float, start: tuple[int, int, int]) -> UNetPreset:
    share = gigabytes / 8
    return UNetPreset(
        plan_name=plan_name,
        volume=PatchSizing(start=start, feature_budget=560e6 * share),
        slice=PatchSizing(width=FeatureWidths(maximum=512), feature_budget=85e6 * share, budget_batch=12),
    )


CPU = UNetPreset(
    plan_name="rfmed_cpu",
    # 40x56x40 (Hippocampus), 48x48x40: one iteration of batch 2 takes under a second on two cores
    volume=PatchSizing(width=FeatureWidths(base=16, maximum=128), max_batch_voxels=192_000, batch_size=2),
    slice=PatchSizing(width=FeatureWidths(base=16, maximum=256), max_batch_voxels=400_000),
    # a body CT becomes about 3 mm isotropic: seconds to prepare, half a minute to predict on a laptop, and a patch
    # still sees whole organs; small structures are lost, which is what the other presets are for
    max_case_voxels=2_000_000,
    low_resolution_share=0.0,
    batch_dice=True,
    train=TrainConfig(
        epochs=20,
        iterations_per_epoch=50,
        learning_rate=3e-3,
        weight_decay=1e-2,
        optimizer=AdamW(),
        schedule=WarmupPolySchedule(warmup_iterations=50),
        compile="off",
        validate_every_epochs=5,
    ),
    # eight flips would make predicting eight times slower
    inference=Inference(mirror=False),
)

PRESETS: dict[Preset, UNetPreset] = {
    "default": UNetPreset(plan_name="rfmed", volume=PatchSizing(start=(32, 256, 256), batch_size=2)),
    "nnunet": _nnunet(
        "nnunet",
        PatchSizing(feature_budget=560e6),
        PatchSizing(width=FeatureWidths(maximum=512), feature_budget=85e6, budget_batch=12),
    ),
    "nnunet_resenc_m": _resenc("m", 680e6, 135e6),
    "nnunet_resenc_l": _resenc("l", 2100e6, 380e6),
    "nnunet_resenc_xl": _resenc("xl", 3600e6, 560e6),
    "8gb": _memory("rfmed_8gb", 8, (32, 256, 256)),
    "24gb": _memory("rfmed_24gb", 24, (48, 320, 320)),
    "80gb": _memory("rfmed_80gb", 80, (64, 384, 384)),
    "cpu": CPU,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RFMedSam2Preset:
    """One preset of RFMedSAM 2."""

    plan_name: str
    figures: UNetPreset
    """Of Step 0's U-Net and of training."""
    backbone: Backbone
    start: tuple[int, int, int]
    """Patch to begin with, clipped to the median shape."""
    max_patch_voxels: int | None = None
    activations_gb: float | None = None
    """The patch shrinks until a step is estimated to keep at most this much in 16 bit (see `memory_estimate.py`)."""
    batch_size: int = 2
    large_batch_size: int = 2
    """With any backbone but nano."""
    adapt_encoder: bool = True
    """Adapters in the image encoder too: gradients then run through all of it."""
    propagate_loss: bool = True
    """Losses of Steps 1 and 2 reach the U-Net too. In short trainings that cost it more than it gained."""
    no_checkpointing_below_gb: float = 0.0
    """Where all activations in float32 need no more, they are kept and not computed again in the backward pass."""
    cells: int | None = None
    """See `Sampling.cells`."""
    max_objects_pretrained: int | None = None
    """With any backbone but nano."""


def _refinement(
    preset: Preset, backbone: Backbone, activations_gb: float, start: tuple[int, int, int]
) -> RFMedSam2Preset:
    name = f"rfmedsam2_{preset}"
    return RFMedSam2Preset(
        plan_name=name, figures=PRESETS[preset], backbone=backbone, start=start, activations_gb=activations_gb
    )


REFINEMENTS: dict[Preset, RFMedSam2Preset] = {
    "default": RFMedSam2Preset(
        plan_name="rfmedsam2", figures=PRESETS["default"], backbone="sam2_large", start=(32, 256, 256)
    ),
    # a share of the memory is left to weights, optimizer and the allocator
    "8gb": _refinement("8gb", "sam2_tiny", 6.5, (32, 256, 256)),
    "24gb": _refinement("24gb", "sam2_base_plus", 19, (32, 256, 256)),
    "80gb": _refinement("80gb", "sam2_large", 66, (48, 320, 320)),
    "cpu": RFMedSam2Preset(
        plan_name="rfmedsam2_cpu",
        figures=CPU,
        backbone="nano",
        start=(32, 128, 128),
        max_patch_voxels=140_000,  # 32x64x64
        large_batch_size=1,
        adapt_encoder=False,
        propagate_loss=False,
        no_checkpointing_below_gb=3.0,
        cells=96,
        max_objects_pretrained=24,
    ),
}


def get_rfmedsam2_preset(preset: str) -> RFMedSam2Preset:
    """Look up the figures of a preset of RFMedSAM 2.

    Raises:
        UsageError: there is no such preset, or it is nnU-Net's.
    """
    for name, refinement in REFINEMENTS.items():
        if name == preset:
            return refinement
    get_preset(preset)
    raise UsageError(
        "This preset has no RFMedSAM 2: it is nnU-Net's own decisions",
        where=preset,
        expected=f"one of {', '.join(REFINEMENTS)}",
        remedy="Choose another --preset, or leave out --model rfmedsam2",
    )


def get_preset(preset: str) -> UNetPreset:
    """Look up the figures of a preset.

    Raises:
        UsageError: there is no such preset.
    """
    for name, figures in PRESETS.items():
        if name == preset:
            return figures
    raise UsageError("No such preset", where=preset, expected=f"one of {', '.join(get_args(Preset))}")
