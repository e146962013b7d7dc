"""Presets: the tables of figures that a plan is made from. Change a figure here and every later plan has it.

default          the paper's: patch 32x256x256, batch 2, SGD 1e-3 (RFMedSAM 2, appendix G)
nnunet           nnU-Net 2.8's own decisions for 8 GB, SGD 1e-2
nnunet_resenc_*  nnU-Net's residual-encoder planners M, L, XL (8, 24, 40 GB)
8gb 24gb 80gb    the default's patch shape, shrunk or grown to what the GPU holds by nnU-Net's memory rule
cpu              a first useful model on two cores within ten minutes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from rfmedsam2.errors import UsageError
from rfmedsam2.pipeline.topology import Width
from rfmedsam2.records.plan import AdamW, Augmentation, Inference, TrainConfig, Validation, WarmupPolySchedule

Preset = Literal[
    "default", "nnunet", "nnunet_resenc_m", "nnunet_resenc_l", "nnunet_resenc_xl", "8gb", "24gb", "80gb", "cpu"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """How patch, batch and network of one dimensionality are chosen."""

    start: tuple[int, ...] | None = None
    """Patch to begin with, clipped to the median shape; None: nnU-Net's, about a cube in mm."""
    width: Width = field(default_factory=Width)
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
class Figures:
    """One preset."""

    plan_name: str
    volume: Sizing
    """3d_fullres and 3d_lowres."""
    slice: Sizing = Sizing(width=Width(maximum=512), feature_budget=85e6, budget_batch=12)
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


def _nnunet(plan_name: str, volume: Sizing, slice_: Sizing) -> Figures:
    return Figures(plan_name=plan_name, volume=volume, slice=slice_, train=TrainConfig(learning_rate=1e-2))


def _resenc(size: str, budget_3d: float, budget_2d: float) -> Figures:
    return _nnunet(
        f"nnunet_resenc_{size}",
        Sizing(width=Width(block="residual"), feature_budget=budget_3d, max_dataset_share=1.0),
        # nnU-Net's residual planners shrink the 2d patch until twelve samples fit, the plain one until two fit
        Sizing(
            width=Width(maximum=512, block="residual"),
            feature_budget=budget_2d,
            budget_batch=12,
            least_batch=12,
            max_dataset_share=1.0,
        ),
    )


def _memory(plan_name: str, gigabytes: float, start: tuple[int, int, int]) -> Figures:
    share = gigabytes / 8
    return Figures(
        plan_name=plan_name,
        volume=Sizing(start=start, feature_budget=560e6 * share),
        slice=Sizing(width=Width(maximum=512), feature_budget=85e6 * share, budget_batch=12),
    )


CPU = Figures(
    plan_name="rfmed_cpu",
    # 40x56x40 (Hippocampus), 48x48x40: one iteration of batch 2 takes under a second on two cores
    volume=Sizing(width=Width(base=16, maximum=128), max_batch_voxels=192_000, batch_size=2),
    slice=Sizing(width=Width(base=16, maximum=256), max_batch_voxels=400_000),
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

PRESETS: dict[Preset, Figures] = {
    "default": Figures(plan_name="rfmed", volume=Sizing(start=(32, 256, 256), batch_size=2)),
    "nnunet": _nnunet(
        "nnunet",
        Sizing(feature_budget=560e6),
        Sizing(width=Width(maximum=512), feature_budget=85e6, budget_batch=12),
    ),
    "nnunet_resenc_m": _resenc("m", 680e6, 135e6),
    "nnunet_resenc_l": _resenc("l", 2100e6, 380e6),
    "nnunet_resenc_xl": _resenc("xl", 3600e6, 560e6),
    "8gb": _memory("rfmed_8gb", 8, (32, 256, 256)),
    "24gb": _memory("rfmed_24gb", 24, (48, 320, 320)),
    "80gb": _memory("rfmed_80gb", 80, (64, 384, 384)),
    "cpu": CPU,
}


def figures_of(preset: str) -> Figures:
    """Look up the figures of a preset.

    Raises:
        UsageError: there is no such preset.
    """
    for name, figures in PRESETS.items():
        if name == preset:
            return figures
    raise UsageError("No such preset", where=preset, expected=f"one of {', '.join(get_args(Preset))}")
