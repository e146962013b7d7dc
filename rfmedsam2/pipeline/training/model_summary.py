"""Summary of a plan's network: parameters by part, sizes of layers, memory of a training step.

Networks are built on torch's meta device: at most seconds, and hardly any memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from typing_extensions import assert_never

from rfmedsam2.models import build_without_weights
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.sam2.adapted import adapters_of
from rfmedsam2.nn.sam2.sizes import sizes_of
from rfmedsam2.nn.unet import UNet
from rfmedsam2.pipeline.planning.memory_estimate import MemoryTerm, activation_terms, total_gib, weight_terms
from rfmedsam2.records.model import CustomConfig, LibraryConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Plan, Stage

PARTS = {
    "unet.": "U-Net (Step 0)",
    "generator.": "prompt generator",
    "channel_adapter.": "channel adapter",
    "gates.": "gates",
    "sam.base.image_encoder.": "image encoder",
    "sam.base.memory_attention.": "memory attention",
    "sam.base.memory_encoder.": "memory encoder",
    "sam.base.sam_prompt_encoder.": "prompt encoder",
    "sam.base.sam_mask_decoder.": "mask decoder",
    "sam.base.": "pointers and embeddings",
}
"""Prefix of parameter names -> part; the first match counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Parameters of one part of a network.

    Attributes:
        group: U-Net, SAM 2, adapters or prompts (the first three are columns of Table 8 of the RFMedSAM 2 paper).
        name: name of the part.
        parameters: number of parameters.
        trained: number of trainable parameters.
    """

    group: str
    name: str
    parameters: int
    trained: int

    @property
    def frozen(self) -> int:
        """Number of frozen parameters."""
        return self.parameters - self.trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Size of a part's output for one sample, slice or object prompt."""

    part: str
    name: str
    channels: int
    size: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Summary of a stage's network.

    Attributes:
        plan: name of the plan.
        stage: name of the stage.
        parts: parameters by part.
        layers: sizes of layers, from input to output.
        memory: terms of a training step's memory in float32.
        memory_half: terms in mixed precision.
    """

    plan: str
    stage: str
    parts: tuple[Part, ...]
    layers: tuple[Layer, ...]
    memory: tuple[MemoryTerm, ...]
    memory_half: tuple[MemoryTerm, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters in all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def trained(self) -> int:
        """Number of trainable parameters in all parts."""
        return sum(part.trained for part in self.parts)

    @property
    def groups(self) -> dict[str, int]:
        """Number of parameters by group."""
        found: Counter[str] = Counter()
        for part in self.parts:
            found[part.group] += part.parameters
        return dict(found)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        totals = {"parameters": self.parameters, "trained": self.trained, "frozen": self.parameters - self.trained}
        memory = {"memory_gib": total_gib(self.memory), "memory_half_gib": total_gib(self.memory_half)}
        return asdict(self) | totals | {"groups": self.groups} | memory


def summary(plan: Plan, stage: str) -> Summary:
    """Describe the network of a stage.

    Raises:
        PlanError: the stage does not exist in the plan.
    """
    found = plan.stage(stage)
    parts = _parts(build_without_weights(plan, found))
    memory, memory_half = (_memory(plan, found, parts, half=half) for half in (False, True))
    return Summary(
        plan=plan.name, stage=stage, parts=parts, layers=_layers(plan, found), memory=memory, memory_half=memory_half
    )


def _memory(plan: Plan, stage: Stage, parts: tuple[Part, ...], *, half: bool) -> tuple[MemoryTerm, ...]:
    parameters, trained = sum(part.parameters for part in parts), sum(part.trained for part in parts)
    labels = plan.labels
    return (
        *weight_terms(stage, parameters=parameters, trained=trained, half=half),
        *activation_terms(stage, outputs=labels.num_outputs, classes=len(labels.foreground), half=half),
    )


def _parts(network: nn.Module) -> tuple[Part, ...]:
    adapters: tuple[str, ...] = ()
    if isinstance(network, RFMedSam2):
        adapters = tuple(f"sam.base.{path}." for path in adapters_of(network.sam.base))
    counted: dict[tuple[str, str], list[int]] = {}
    for name, parameter in network.named_parameters():
        counts = counted.setdefault(_place(name, network, adapters), [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() * parameter.requires_grad
    order = ["U-Net", "network", "prompts", "adapters", "SAM 2"]
    return tuple(
        Part(group=group, name=part, parameters=total, trained=trained)
        for (group, part), (total, trained) in sorted(counted.items(), key=lambda item: order.index(item[0][0]))
    )


def _place(name: str, network: nn.Module, adapters: tuple[str, ...]) -> tuple[str, str]:
    """(group, part) of a parameter."""
    if not isinstance(network, RFMedSam2):
        return ("U-Net" if isinstance(network, UNet) else "network"), name.split(".")[0]
    part = next(part for start, part in PARTS.items() if name.startswith(start))
    if name.startswith(adapters) or part in ("channel adapter", "gates"):
        return "adapters", part
    if part == PARTS["unet."]:
        return "U-Net", part
    return ("prompts" if part == PARTS["generator."] else "SAM 2"), part


def _layers(plan: Plan, stage: Stage) -> tuple[Layer, ...]:
    model, outputs = stage.model, plan.labels.num_outputs
    match model:
        case UNetConfig():
            return _unet_layers(model, stage.patch_size, channels=plan.inputs_of(stage), outputs=outputs)
        case RFMedSam2Config():
            refined = _sam_layers(model)
            if model.unet is None:
                return refined
            patch = stage.patch_size[-model.unet.dimensions :]
            return (*_unet_layers(model.unet, patch, channels=len(plan.channels), outputs=outputs), *refined)
        case LibraryConfig() | CustomConfig():
            return ()  # only its own package knows
        case _:
            assert_never(model)


def _unet_layers(network: UNetConfig, patch: tuple[int, ...], *, channels: int, outputs: int) -> tuple[Layer, ...]:
    found = [Layer(part="U-Net", name="input", channels=channels, size=patch)]
    size = tuple(n // block for n, block in zip(patch, network.blocks, strict=True))
    if size != patch:
        found.append(Layer(part="U-Net", name="means of blocks", channels=channels, size=size))
    for i, (stride, features) in enumerate(zip(network.strides, network.features, strict=True)):
        size = tuple(n // step for n, step in zip(size, stride, strict=True))
        found.append(Layer(part="U-Net", name=f"stage {i}", channels=features, size=size))
    return (*found, Layer(part="U-Net", name="logits", channels=outputs, size=patch))


def _sam_layers(model: RFMedSam2Config) -> tuple[Layer, ...]:
    sizes, side = sizes_of(model.backbone), model.frame_size // 16
    wide: Mapping[str, tuple[int, int]] = {
        "frame": (3, 16 * side),
        "features, stride 4": (sizes.channels // 8, 4 * side),
        "features, stride 8": (sizes.channels // 4, 2 * side),
        "embedding, stride 16": (sizes.channels, side),
        "mask per object": (1, 4 * side),
        "memory per object": (sizes.memory_channels, side),
    }
    return tuple(Layer(part="SAM 2", name=name, channels=c, size=(n, n)) for name, (c, n) in wide.items())
