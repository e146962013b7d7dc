"""Presets: tables of the settings that plans are made from.

default          the paper's: patch 32x256x256, batch 2, SGD 1e-3 (RFMedSAM 2, appendix G)
nnunet           nnU-Net 2.8's defaults for 8 GB, SGD 1e-2
nnunet_resenc_*  nnU-Net's residual-encoder planners M, L, XL (8, 24, 40 GB)
8gb 24gb 80gb    the default's patch shape, scaled to the GPU's memory by nnU-Net's memory rule
                 (`gpu_memory_gb` makes such a preset for any other memory)
cpu              a first useful model on two cores within ten minutes

RFMedSAM 2 has its own table (default, 8gb, 24gb, 80gb, cpu): its patches are square, and SAM 2 needs memory besides the
U-Net.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import get_args

from rfmedsam2.arguments import option
from rfmedsam2.choices import Backbone, Preset
from rfmedsam2.errors import UsageError
from rfmedsam2.pipeline.nnunet.plans import NNUNET_TRAIN
from rfmedsam2.pipeline.planning.topology import FeatureWidths
from rfmedsam2.records.plan import Augmentation, Inference, SegmentationLoss, Validation
from rfmedsam2.records.training import AdamW, TrainConfig, WarmupPolySchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchSizing:
    """Limits from which patch, batch and network of one dimensionality follow."""

    start: tuple[int, ...] | None = None
    """Initial patch, clipped to the median shape; None: nnU-Net's, about a cube in mm."""
    width: FeatureWidths = field(default_factory=FeatureWidths)
    feature_budget: float | None = None
    """Largest number of feature-map values per sample, such that `budget_batch` samples fill the memory (nnU-Net:
    560e6 for batch 2 is about 8 GB); None: no limit."""
    budget_batch: int = 2
    least_batch: int = 2
    """The patch shrinks until this many samples fit."""
    max_batch_voxels: int | None = None
    """Largest number of voxels of a batch; limits computing time if memory does not. None: no limit."""
    max_dataset_share: float = 0.05
    """Largest fraction of the training set's voxels in one batch (but at least two samples)."""
    batch_size: int | None = None
    """Fixed batch size, or less where the limits above allow no more; None: as many as they allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSizing:
    """How far the target spacing is coarsened, finest axes first, to make the median case small."""

    max_voxels: int
    """Most voxels of the median case, whatever is lost."""
    whole_voxels: int
    """Most voxels of it, about a patch's, unless a class would become smaller than `class_voxels`."""
    class_voxels: int
    """Least number of voxels of every class, as the median over the cases that have it."""

    @property
    def hard(self) -> CaseSizing:
        """Only `max_voxels`: for given spacings, and for 2D stages, whose patches show whole slices anyway."""
        return replace(self, whole_voxels=self.max_voxels)


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetPreset:
    """Settings of one U-Net preset."""

    plan_name: str
    volume: PatchSizing
    """3d_fullres and 3d_lowres."""
    gpu_memory_gb: float | None = None
    """Memory that the budgets are meant for; None: no budgets."""
    slice: PatchSizing = PatchSizing(width=FeatureWidths(maximum=512), feature_budget=85e6, budget_batch=12)
    """2d."""
    low_resolution_share: float = 0.25
    """Plan 3d_lowres if the 3d_fullres patch covers a smaller fraction of the median case (nnU-Net: 0.25)."""
    case: CaseSizing | None = None
    """Coarsening of the target spacing; None: never."""
    batch_dice: bool | None = None
    """Batch Dice; None: nnU-Net's rule (3d_fullres only if there is a 3d_lowres, 3d_lowres never, 2d always)."""
    mirror: bool = True
    """Mirror training patches along every axis, as nnU-Net does."""
    loss: SegmentationLoss = field(default_factory=SegmentationLoss)
    """Its `batch_dice` is the field above."""
    train: TrainConfig = field(default_factory=TrainConfig)
    inference: Inference = field(default_factory=Inference)
    augmentation: Augmentation = field(default_factory=Augmentation)
    validation: Validation = field(default_factory=Validation)


def _nnunet(plan_name: str, gigabytes: float, volume: PatchSizing, slice_: PatchSizing) -> UNetPreset:
    return UNetPreset(plan_name=plan_name, volume=volume, gpu_memory_gb=gigabytes, slice=slice_, train=NNUNET_TRAIN)


def _resenc(size: str, gigabytes: float, budget_3d: float, budget_2d: float) -> UNetPreset:
    return _nnunet(
        f"nnunet_resenc_{size}",
        gigabytes,
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
        gpu_memory_gb=gigabytes,
        slice=PatchSizing(width=FeatureWidths(maximum=512), feature_budget=85e6 * share, budget_batch=12),
    )


STARTS = {8: (32, 256, 256), 24: (48, 320, 320), 80: (64, 384, 384)}
"""Initial patch by GPU memory in GB."""

CPU = UNetPreset(
    plan_name="rfmed_cpu",
    # two samples of 40x56x40 (Hippocampus), one of 48x64x64 (an abdomen): an iteration takes half a second on two cores
    volume=PatchSizing(
        width=FeatureWidths(base=16, maximum=256, finest_blocks=1),
        max_batch_voxels=200_000,
        least_batch=1,
        batch_size=2,
    ),
    slice=PatchSizing(width=FeatureWidths(base=16, maximum=256), max_batch_voxels=400_000),
    # Within 1000 iterations of patches that show a seventh of an abdomen a network learns the liver and little else. At
    # about 5 mm one patch shows it whole, and most of it may be lost before an organ is: the spacing costs an adrenal
    # gland (32 voxels at 5 mm), not a kidney. Data whose classes are smaller, such as lesions, stay finer.
    case=CaseSizing(max_voxels=2_000_000, whole_voxels=250_000, class_voxels=27),
    low_resolution_share=0.0,
    batch_dice=True,
    # mirrored bodies are eight anatomies to learn instead of one
    mirror=False,
    # without it, organs below a hundredth of the patch are background for the first thousand iterations
    loss=SegmentationLoss(class_balance=0.5),
    train=TrainConfig(
        epochs=26,
        iterations_per_epoch=50,
        learning_rate=6e-3,
        weight_decay=1e-2,
        optimizer=AdamW(betas=(0.9, 0.95)),
        schedule=WarmupPolySchedule(warmup_iterations=50),
        compile="off",
        validate_every_epochs=5,
    ),
    validation=Validation(patches_while_training=20),
    # mirroring over eight flips would make prediction eight times slower
    inference=Inference(mirror=False),
)

PRESETS: dict[Preset, UNetPreset] = {
    # eq. 2 of the paper: weights of deep supervision halve to the last
    "default": UNetPreset(
        plan_name="rfmed",
        volume=PatchSizing(start=(32, 256, 256), batch_size=2),
        loss=SegmentationLoss(lowest_level=True),
    ),
    "nnunet": _nnunet(
        "nnunet",
        8,
        PatchSizing(feature_budget=560e6),
        PatchSizing(width=FeatureWidths(maximum=512), feature_budget=85e6, budget_batch=12),
    ),
    "nnunet_resenc_m": _resenc("m", 8, 680e6, 135e6),
    "nnunet_resenc_l": _resenc("l", 24, 2100e6, 380e6),
    "nnunet_resenc_xl": _resenc("xl", 40, 3600e6, 560e6),
    "8gb": _memory("rfmed_8gb", 8, STARTS[8]),
    "24gb": _memory("rfmed_24gb", 24, STARTS[24]),
    "80gb": _memory("rfmed_80gb", 80, STARTS[80]),
    "cpu": CPU,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RFMedSam2Preset:
    """Settings of one RFMedSAM 2 preset."""

    plan_name: str
    settings: UNetPreset
    """Settings of Step 0's U-Net and of training."""
    backbone: Backbone
    start: tuple[int, int, int]
    """Initial patch, clipped to the median shape."""
    max_patch_voxels: int | None = None
    activations_gb: float | None = None
    """The patch shrinks until a step's estimated activations in 16 bit are at most this (see `memory_estimate.py`)."""
    batch_size: int = 2
    large_batch_size: int = 2
    """With any backbone but nano."""
    adapt_encoder: bool = True
    """Adapters also in the image encoder, which then needs gradients."""
    propagate_loss: bool = True
    """Losses of Steps 1 and 2 also train the U-Net. In short trainings this lowered its accuracy."""
    no_checkpointing_below_gb: float = 0.0
    """No activation checkpointing if all activations in float32 need at most this much memory."""
    max_objects: int | None = None
    """See `Sampling.max_prompted_objects`."""
    max_objects_pretrained: int | None = None
    """With any backbone but nano."""


def _refinement(
    preset: Preset, backbone: Backbone, activations_gb: float, start: tuple[int, int, int]
) -> RFMedSam2Preset:
    name = f"rfmedsam2_{preset}"
    return RFMedSam2Preset(
        plan_name=name, settings=PRESETS[preset], backbone=backbone, start=start, activations_gb=activations_gb
    )


REFINEMENTS: dict[Preset, RFMedSam2Preset] = {
    "default": RFMedSam2Preset(
        plan_name="rfmedsam2", settings=PRESETS["default"], backbone="sam2_large", start=(32, 256, 256)
    ),
    # part of the memory is reserved for weights, optimizer and the allocator
    "8gb": _refinement("8gb", "sam2_tiny", 6.5, (32, 256, 256)),
    "24gb": _refinement("24gb", "sam2_base_plus", 19, (32, 256, 256)),
    "80gb": _refinement("80gb", "sam2_large", 66, (48, 320, 320)),
    "cpu": RFMedSam2Preset(
        plan_name="rfmedsam2_cpu",
        # a step takes several times as long, and SAM 2 and its adapters are trained at the same rate
        settings=replace(CPU, train=CPU.train.model_copy(update={"epochs": 20, "learning_rate": 3e-3})),
        backbone="nano",
        start=(32, 128, 128),
        max_patch_voxels=140_000,  # 32x64x64
        large_batch_size=1,
        adapt_encoder=False,
        propagate_loss=False,
        no_checkpointing_below_gb=3.0,
        max_objects=96,
        max_objects_pretrained=24,
    ),
}


def get_rfmedsam2_preset(preset: str, *, gpu_memory_gb: float | None = None) -> RFMedSam2Preset:
    """Look up the settings of an RFMedSAM 2 preset.

    Args:
        preset: its name.
        gpu_memory_gb: with `default`, the memory to plan for; None: any.

    Raises:
        UsageError: the preset does not exist, is one of nnU-Net's, or has a memory of its own.
    """
    if gpu_memory_gb is not None:
        settings = get_preset(preset, gpu_memory_gb=gpu_memory_gb)
        if preset == "default":
            nearest = REFINEMENTS["80gb" if gpu_memory_gb >= 80 else "24gb" if gpu_memory_gb >= 24 else "8gb"]
            # as for the presets: the rest is for weights, optimizer and the allocator
            return replace(
                nearest,
                plan_name=f"rfmedsam2_{gpu_memory_gb:g}gb",
                settings=settings,
                activations_gb=0.8 * gpu_memory_gb,
            )
    for name, refinement in REFINEMENTS.items():
        if name == preset:
            return refinement
    get_preset(preset)
    raise UsageError(
        "This preset is nnU-Net's and has no settings for RFMedSAM 2",
        where=preset,
        expected=f"one of {', '.join(REFINEMENTS)}",
        remedy=f"Choose another {option('preset')}, or leave out {option('model', 'rfmedsam2')}",
    )


def get_preset(preset: str, *, gpu_memory_gb: float | None = None) -> UNetPreset:
    """Look up the settings of a preset.

    Args:
        preset: its name.
        gpu_memory_gb: with `default` and nnU-Net's presets, the memory to plan for; None: the preset's.

    Raises:
        UsageError: the preset does not exist, or has another memory of its own.
    """
    for name, settings in PRESETS.items():
        if name == preset:
            return settings if gpu_memory_gb is None else _with_memory(name, settings, gpu_memory_gb)
    raise UsageError("The preset does not exist", where=preset, expected=f"one of {', '.join(get_args(Preset))}")


def _with_memory(name: str, settings: UNetPreset, gigabytes: float) -> UNetPreset:
    """The preset for another GPU memory: budgets grow in proportion, as with nnU-Net's -gpu_memory_target."""
    if not (isinstance(gigabytes, int | float) and 1 <= gigabytes <= 10_000):
        raise UsageError(
            "A GPU memory is out of range",
            where=option("gpu_memory_gb", gigabytes, flag="--gpu-memory"),
            expected="1 to 10000 GB",
        )
    if name == "default":
        start = next((patch for memory, patch in STARTS.items() if gigabytes <= memory), STARTS[80])
        return _memory(f"rfmed_{gigabytes:g}gb", gigabytes, start)
    if settings.gpu_memory_gb is None or not name.startswith("nnunet"):
        raise UsageError(
            f"The preset {name} has its own sizes",
            where=option("gpu_memory_gb", gigabytes, flag="--gpu-memory"),
            expected=f"{option('preset')} default or one of nnU-Net's",
        )
    share = gigabytes / settings.gpu_memory_gb
    volume, flat = (
        replace(sizing, feature_budget=None if sizing.feature_budget is None else share * sizing.feature_budget)
        for sizing in (settings.volume, settings.slice)
    )
    name_of_plan = f"{settings.plan_name}_{gigabytes:g}gb"
    return replace(settings, plan_name=name_of_plan, volume=volume, slice=flat, gpu_memory_gb=gigabytes)
