"""Parameter counts of a method's network by part, trained and frozen, beside the published number."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rfmedsam2.nn.meta_device import skip_init
from segment_anything_hq.choices import Backbone, Method, ZeroShot
from segment_anything_hq.models import build
from segment_anything_hq.nn.hq_sam import FRAME_SIZE

BYTES = 4
"""Bytes per parameter in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The published size of a method's trained part.

    Attributes:
        value: the published number.
        unit: "MB" (2**20 bytes in fp32, as counted here) or "M" (million parameters).
        source: the paper.
    """

    value: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSize:
    """Parameters of one part."""

    name: str
    parameters: int
    trained: int

    @property
    def frozen(self) -> int:
        """Parameters that are not trained."""
        return self.parameters - self.trained


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSize:
    """Parameters of a network.

    Attributes:
        method: name of the method.
        backbone: name of the backbone.
        frame_size: side length S of the frame, pixels.
        parts: the parts, in the network's order.
        published: the published size; None if the paper gives none for this backbone.
    """

    method: str
    backbone: str
    frame_size: int
    parts: tuple[PartSize, ...]
    published: Published | None

    @property
    def parameters(self) -> int:
        """Parameters of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def trained(self) -> int:
        """Trained parameters of all parts."""
        return sum(part.trained for part in self.parts)

    @property
    def trained_mib(self) -> float:
        """Size of the trained parameters in fp32, MiB."""
        return self.trained * BYTES / 2**20

    @property
    def as_published(self) -> float | None:
        """Size of the trained parameters, in the unit of the published number."""
        if self.published is None:
            return None
        return self.trained_mib if self.published.unit == "MB" else self.trained / 1e6

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "method": self.method,
            "backbone": self.backbone,
            "frame_size": self.frame_size,
            "parameters": self.parameters,
            "trained": self.trained,
            "frozen": self.parameters - self.trained,
            "trained_mib": round(self.trained_mib, 3),
            "parts": [{**asdict(part), "frozen": part.frozen} for part in self.parts],
            "published": None if self.published is None else asdict(self.published),
        }


PUBLISHED: dict[tuple[str, str], Published] = {
    ("hq_sam", "vit_b"): Published(value=4.1, unit="MB", source="HQ-SAM paper"),
    ("hq_sam", "vit_l"): Published(value=5.1, unit="MB", source="HQ-SAM paper"),
    ("hq_sam", "vit_h"): Published(value=6.1, unit="MB", source="HQ-SAM paper"),
    ("sam_ref", "vit_h"): Published(value=0.7, unit="M", source="SAM-REF paper"),
    ("sam2_ref", "hiera_l"): Published(value=1.2, unit="M", source="SAM-REF paper"),
    ("sam2_refiner", "hiera_l"): Published(value=12, unit="M", source="SAM2Refiner paper"),
}
"""Published sizes of the trained parts, by method and backbone."""


def network_size(method: Method | ZeroShot, backbone: Backbone, *, frame_size: int = FRAME_SIZE) -> NetworkSize:
    """Count a network's parameters without allocating them.

    Raises:
        PlanError: the method cannot be built on this backbone, or not with this frame size.
    """
    with skip_init():
        network = build(method, backbone, frame_size=frame_size)
    return NetworkSize(
        method=method,
        backbone=backbone,
        frame_size=frame_size,
        parts=parts_of(network),
        published=PUBLISHED.get((method, backbone)),
    )


def parts_of(network: nn.Module) -> tuple[PartSize, ...]:
    """Sizes of the network's parts, in order."""
    sizes: dict[str, list[int]] = {}
    for name, parameter in network.named_parameters():
        words = name.split(".")
        while words[0] in ("base", "sam"):  # the base's encoder and decoder are listed separately
            words.pop(0)
        size = sizes.setdefault(words[0] if len(words) > 1 else "embeddings", [0, 0])
        size[0] += parameter.numel()
        size[1] += parameter.numel() if parameter.requires_grad else 0
    return tuple(PartSize(name=name, parameters=size[0], trained=size[1]) for name, size in sizes.items())
