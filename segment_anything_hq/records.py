"""What lies on disk of a refiner: the plan that it is trained by, and what its checkpoints say of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from rfmedsam2.records.base import Record, VersionedRecord, renamed
from rfmedsam2.records.checkpoint import TrainedRecord
from rfmedsam2.records.plan import TrainConfig

Method = Literal["hq_sam", "hq_sam2", "sam_ref", "sam2_ref", "sam2_refiner", "sam_decoder", "sam2_decoder"]
"""What is trained: refiners, or the mask decoder of SAM or SAM 2, which is SAM-REF's first stage and the baseline."""
ZeroShot = Literal["sam", "sam2"]
"""What needs no training: the bases as they are published."""
Backbone = Literal[
    "vit_b", "vit_l", "vit_h", "vit_tiny", "vit_nano", "hiera_t", "hiera_s", "hiera_b+", "hiera_l", "hiera_nano"
]
"""SAM's image encoders and SAM 2's; the two nanos are new, small, and for tests."""
METHODS: tuple[Method, ...] = get_args(Method)
ON_SAM2: tuple[Method | ZeroShot, ...] = ("hq_sam2", "sam2_ref", "sam2_refiner", "sam2_decoder", "sam2")
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


def goes_on(method: Method | ZeroShot, backbone: Backbone) -> bool:
    """Whether a method is built on this backbone."""
    return backbone.startswith("hiera") == (method in ON_SAM2)


class PromptConfig(Record):
    """Training by prompts that are drawn from the masks, one an object; see `prompt_sampling.PromptMix`."""

    kind: Literal["prompts"] = "prompts"
    box: Share = 1 / 3
    points: Share = 1 / 3
    box_and_points: Share = 0.0
    box_and_negatives: Share = 0.0
    mask: Share = 1 / 3
    count: Count = 10
    """Points of a prompt."""


class ClickConfig(Record):
    """Training by clicks, one after the other, each where the answer before was wrong (SAM-REF supplement, 1.3)."""

    kind: Literal["clicks"] = "clicks"
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """How much less likely each further click is."""
    max_clicks: Count = 20
    box: Share = 0.0
    """How often an object is shown by its box first."""


class JitterConfig(Record):
    """Large-scale jitter and flips; see `augment.Jitter`."""

    scale_range: tuple[Positive, Positive] = (0.1, 2.0)
    """Smallest and largest scale of the image, as a share of the frame."""
    flip: Share = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f"scale_range {list(self.scale_range)} must be (smallest, largest)")
        return self


def _refiner_plan_1_to_2(data: dict[str, Any]) -> dict[str, Any]:
    """`guidance`, `views` and the fields of clicks and jitter got the names that the field uses."""
    data = renamed(data, {"guidance": "prompting", "views": "views_per_object"})
    if isinstance(prompting := data.get("prompting"), dict):
        data["prompting"] = renamed(prompting, {"most": "max_clicks"})
    if isinstance(jitter := data.get("jitter"), dict) and {"smallest", "largest"} <= jitter.keys():
        jitter = dict(jitter)
        data["jitter"] = {"scale_range": [jitter.pop("smallest"), jitter.pop("largest")], **jitter}
    return data


class RefinerPlan(VersionedRecord):
    """Everything about training one method on one backbone; the data and the base's weights are given beside it."""

    upgrades = (_refiner_plan_1_to_2,)

    format: Literal[2] = 2
    method: Method
    backbone: Backbone
    frame_size: Annotated[int, Field(ge=64)] = 1024
    """S: pixels a side of the frames that the image encoder sees."""
    batch_size: Count = 4
    """Objects of a batch, each on a frame of its own."""
    prompting: Annotated[PromptConfig | ClickConfig, Field(discriminator="kind")]
    jitter: JitterConfig | None = JitterConfig()
    """None: every picture is seen whole."""
    views_per_object: Count | None = None
    """Different frames that are drawn of an object; None: a new one every time. Few are worth keeping embedded."""
    validation_samples: Count = 50
    """Held-out objects that are scored while training."""
    train: TrainConfig

    @field_validator("frame_size")
    @classmethod
    def _frame_has_positions(cls, size: int) -> int:
        if size % 32:
            raise ValueError(f"frames of {size} pixels are no multiple of 32")
        return size

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if not goes_on(self.method, self.backbone):
            raise ValueError(f"method {self.method} does not go with backbone {self.backbone}")
        return self


class RefinerRecord(TrainedRecord):
    """The header of a refiner's checkpoint: trained weights alone lie beside it, the frozen base has its own file."""

    plan: RefinerPlan
    base: str
    """Name of the file of the base's weights."""
    base_sha256: str
    """Of the frozen weights: the trained ones fit these alone."""

    def identity(self) -> dict[str, Any]:
        """The plan but for its training figures, and the base."""
        plan = self.plan.model_dump(mode="json", exclude={"train", "validation_samples"})
        return {"plan": plan, "base_sha256": self.base_sha256}
