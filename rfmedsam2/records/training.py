"""Settings of training: optimizer, learning rates, schedule, precision; augmentation. Nothing about the model."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag

from rfmedsam2.records.base import Record
from rfmedsam2.records.model import Count, Decay, Factor, Positive, Probability, Rate, Whole

Axes = tuple[Annotated[int, Field(ge=0, le=2)], ...]
Zoom = Annotated[float, Field(ge=0.01, le=100)]
Sigma = Annotated[float, Field(gt=0, le=100)]
"""Voxels; a kernel is six times as long."""


class Sgd(Record):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    momentum: Decay = 0.99
    nesterov: bool = True

    @property
    def moments(self) -> int:
        """Values that are kept per parameter."""
        return 1


class Adam(Record):
    """Adam; weight decay is part of the gradient (nnUNetTrainerVanillaAdam)."""

    kind: Literal["adam"] = "adam"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    amsgrad: bool = False
    """Divide by the largest second moment so far."""

    @property
    def moments(self) -> int:
        """Values that are kept per parameter."""
        return 3 if self.amsgrad else 2


class AdamW(Adam):
    """Adam with decoupled weight decay; nnUNetTrainerAdam's has `amsgrad`."""

    kind: Literal["adamw"] = "adamw"  # pyright: ignore[reportIncompatibleVariableOverride]


class Adan(Record):
    """Adaptive Nesterov momentum (Xie et al. 2022), timm's."""

    kind: Literal["adan"] = "adan"
    betas: tuple[Decay, Decay, Decay] = (0.98, 0.92, 0.99)
    """Decay of the gradient's mean, of its change's mean, and of the second moment."""
    eps: Positive = 1e-8

    @property
    def moments(self) -> int:
        """Values that are kept per parameter."""
        return 4


class PolySchedule(Record):
    """lr = lr0 * (1 - t/T) ** power, t in epochs (appendix G, eq. 1) or iterations."""

    kind: Literal["poly"] = "poly"
    power: Positive = 0.9
    per: Literal["epoch", "iteration"] = "epoch"


class WarmupPolySchedule(Record):
    """Linear warm-up from `start_factor`, then poly per iteration over the rest."""

    kind: Literal["warmup_poly"] = "warmup_poly"
    warmup_iterations: Whole = 1500
    start_factor: Factor = 0.01
    power: Positive = 0.9


class StepSchedule(Record):
    """Multiply by `gamma` when each epoch of `milestones` begins."""

    kind: Literal["step"] = "step"
    milestones: tuple[int, ...] = (10,)
    gamma: Rate = 0.1


class OneCycleSchedule(Record):
    """One cycle per iteration: cosine up to the full rate over `warmup_share` of the steps, cosine down after."""

    kind: Literal["one_cycle"] = "one_cycle"
    warmup_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    start_factor: Rate = 0.04
    end_factor: Factor = 4e-6


class CosineSchedule(Record):
    """Half a cosine from the full rate to `end_factor` of it, per epoch (nnUNetTrainerCosAnneal) or iteration."""

    kind: Literal["cosine"] = "cosine"
    per: Literal["epoch", "iteration"] = "epoch"
    end_factor: Factor = 0.0


class TrainConfig(Record):
    """Settings of the training loop; nothing about the model."""

    epochs: Count = 1000
    iterations_per_epoch: Count = 250
    learning_rate: Rate = 1e-3
    weight_decay: Factor = 3e-5
    optimizer: Annotated[Sgd | Adam | AdamW | Adan, Field(discriminator="kind")] = Sgd()
    rate_factors: dict[str, Factor] = Field(default_factory=dict)
    """Factors of `learning_rate` by the beginning of parameters' names (`encoder.`): the longest counts, 0 freezes."""
    schedule: Annotated[
        PolySchedule | WarmupPolySchedule | StepSchedule | OneCycleSchedule | CosineSchedule,
        Field(discriminator="kind"),
    ] = PolySchedule()
    accumulation: Count = 1
    """Micro-batches per optimizer step."""
    clip_norm: Positive | None = 12.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 if the hardware supports it (GPUs, CPUs with AMX, AVX512-BF16), else fp16 on GPUs, fp32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA, if a trial step succeeds."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    deterministic: bool = False
    checkpoint_minutes: Positive = 10.0
    validate_every_epochs: Count = 1
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Data loading processes; None: chosen from cores and memory, 0: load in the main process."""
    worker_timeout_seconds: Positive = 300.0

    @property
    def iterations(self) -> int:
        """Number of optimizer steps of the whole training."""
        return self.epochs * self.iterations_per_epoch


class Augmentation(Record):
    """Augmentation of training patches; probabilities per sample. Transforms and defaults are nnU-Net's."""

    kind: Literal["nnunet"] = "nnunet"
    rotation_degrees: tuple[float, float] | Literal["nnunet"] = "nnunet"
    """Range about each axis; "nnunet": +-30 (3D), +-180 in plane for strongly anisotropic or flat patches."""
    rotation_probability: Probability = 0.2
    scale: tuple[Zoom, Zoom] = (0.7, 1.4)
    scale_probability: Probability = 0.2
    noise_probability: Probability = 0.1
    noise_variance: tuple[Factor, Factor] = (0.0, 0.1)
    blur_probability: Probability = 0.2
    blur_sigma: tuple[Sigma, Sigma] = (0.5, 1.0)
    brightness_probability: Probability = 0.15
    brightness: tuple[Positive, Positive] = (0.75, 1.25)
    contrast_probability: Probability = 0.15
    contrast: tuple[Positive, Positive] = (0.75, 1.25)
    low_resolution_probability: Probability = 0.25
    low_resolution: tuple[Zoom, Zoom] = (0.5, 1.0)
    gamma_inverted_probability: Probability = 0.1
    gamma_probability: Probability = 0.3
    gamma: tuple[Positive, Positive] = (0.7, 1.5)
    mirror_axes: Axes = (0, 1, 2)
    """Axes of the patch that are flipped with probability 0.5 each, and by test-time mirroring."""

    @property
    def changes_of_frames(self) -> list[str]:
        """Fields by which a frame differs each time it is drawn; mirroring the first axis only reorders frames."""
        chances = [name for name in type(self).model_fields if name.endswith("_probability")]
        changing = [name for name in chances if getattr(self, name) > 0]
        return [*changing, "mirror_axes"] if set(self.mirror_axes) - {0} else changing


class DA5(Record):
    """nnU-Net's stronger augmentation, nnUNetTrainerDA5, with all its figures."""

    least_side: ClassVar[int] = 6
    """Of a patch along every axis."""

    kind: Literal["da5"] = "da5"
    mirror_axes: Axes = (0, 1, 2)
    """As of `Augmentation`."""

    @property
    def changes_of_frames(self) -> list[str]:
        """Fields by which a frame differs each time it is drawn."""
        return ["kind"]


class NoAugmentation(Record):
    """Patches as they are (nnUNetTrainerNoDA), and no test-time mirroring either."""

    kind: Literal["none"] = "none"

    @property
    def mirror_axes(self) -> Axes:
        """None."""
        return ()

    @property
    def changes_of_frames(self) -> list[str]:
        """None."""
        return []


def _kind_of(augmentation: Any) -> Any:
    """Version 0.1 had one kind and did not write it down."""
    if isinstance(augmentation, dict):
        return augmentation.get("kind", "nnunet")
    return getattr(augmentation, "kind", None)


AugmentationConfig = Annotated[
    Union[  # noqa: UP007 - for pydantic
        Annotated[Augmentation, Tag("nnunet")], Annotated[DA5, Tag("da5")], Annotated[NoAugmentation, Tag("none")]
    ],
    Discriminator(_kind_of),
]
"""Union of all augmentations, distinguished by `kind`."""
