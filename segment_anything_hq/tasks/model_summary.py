"""What a method's network is made of: parameters by part, trained and frozen, beside what its paper says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rfmedsam2.nn.meta_device import skip_init
from segment_anything_hq.models import build
from segment_anything_hq.nn.hq_sam import FRAME_SIZE
from segment_anything_hq.records import Backbone, Method, ZeroShot

BYTES = 4
"""Of a parameter in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a paper says is added to the base.

    Attributes:
        value: the figure.
        unit: MB of fp32, of 2**20 bytes as they are counted here, or M parameters.
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
        """What is not trained of it."""
        return self.parameters - self.trained


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSize:
    """Parameters of a network.

    Attributes:
        method: its name.
        backbone: its name.
        frame_size: S.
        parts: in the network's order.
        published: None: its paper gives no figure for this backbone.
    """

    method: str
    backbone: str
    frame_size: int
    parts: tuple[PartSize, ...]
    published: Published | None

    @property
    def parameters(self) -> int:
        """Of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def trained(self) -> int:
        """Of all parts."""
        return sum(part.trained for part in self.parts)

    @property
    def trained_mib(self) -> float:
        """What is trained, in fp32."""
        return self.trained * BYTES / 2**20

    @property
    def as_published(self) -> float | None:
        """What is trained, in the unit of the paper's figure."""
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
"""What the papers say is learned."""


def network_size(method: Method | ZeroShot, backbone: Backbone, *, frame_size: int = FRAME_SIZE) -> NetworkSize:
    """Count a network's parameters; none of them takes memory.

    Raises:
        PlanError: a method that is not built on this backbone.
        UsageError: a frame size that cannot be.
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
    """The network's parts, in their order."""
    sizes: dict[str, list[int]] = {}
    for name, parameter in network.named_parameters():
        words = name.split(".")
        while words[0] in ("base", "sam"):  # a base is no part: its encoder and its decoder are
            words.pop(0)
        size = sizes.setdefault(words[0] if len(words) > 1 else "embeddings", [0, 0])
        size[0] += parameter.numel()
        size[1] += parameter.numel() if parameter.requires_grad else 0
    return tuple(PartSize(name=name, parameters=size[0], trained=size[1]) for name, size in sizes.items())
