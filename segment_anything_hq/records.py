"""Records that the commands write: training plans, checkpoint headers, predictions and evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from rfmedsam2.records.base import Record, VersionedRecord, renamed
from rfmedsam2.records.checkpoint import TrainedRecord
from rfmedsam2.records.model import LARGEST_FRAME, Count
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.system.file_names import FileName
from segment_anything_hq.choices import Backbone, Method, ZeroShot

METHODS: tuple[Method, ...] = get_args(Method)
ON_SAM2: tuple[Method | ZeroShot, ...] = ("hq_sam2", "sam2_ref", "sam2_refiner", "sam2_decoder", "sam2")
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def supports_backbone(method: Method | ZeroShot, backbone: Backbone) -> bool:
    """Whether a method can be built on this backbone."""
    return backbone.startswith("hiera") == (method in ON_SAM2)


class PromptConfig(Record):
    """Train on prompts sampled from the masks, one per object; see `prompts.sampling.PromptMix`."""

    kind: Literal["prompts"] = "prompts"
    box: Share = 1 / 3
    points: Share = 1 / 3
    box_and_points: Share = 0.0
    box_and_negatives: Share = 0.0
    mask: Share = 1 / 3
    count: Count = 10
    """Points per prompt."""


class ClickConfig(Record):
    """Train on simulated corrective clicks, each placed on an error of the mask before (SAM-REF supplement, 1.3)."""

    kind: Literal["clicks"] = "clicks"
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Ratio of the probabilities of k + 1 and k clicks."""
    max_clicks: Count = 20
    box: Share = 0.0
    """Probability that a box prompt comes before the clicks."""


class JitterConfig(Record):
    """Large-scale jitter and flips; see `data.augment.Jitter`."""

    scale_range: tuple[Positive, Positive] = (0.1, 2.0)
    """Smallest and largest length of the image's longer side, as a multiple of the frame's side."""
    flip: Share = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f"scale_range {list(self.scale_range)} must be (smallest, largest)")
        return self


def _refiner_plan_1_to_2(data: dict[str, Any]) -> dict[str, Any]:
    """Format 2 renames `guidance` to `prompting`, `views` to `views_per_object`, and fields of clicks and jitter."""
    data = renamed(data, {"guidance": "prompting", "views": "views_per_object"})
    if isinstance(prompting := data.get("prompting"), dict):
        data["prompting"] = renamed(prompting, {"most": "max_clicks"})
    if isinstance(jitter := data.get("jitter"), dict) and {"smallest", "largest"} & jitter.keys():
        jitter = dict(jitter)  # edited by hand it may name one of them
        data["jitter"] = {"scale_range": [jitter.pop("smallest", 0.1), jitter.pop("largest", 2.0)], **jitter}
    return data


class RefinerPlan(VersionedRecord):
    """All settings for training one method on one backbone, except the data and the base's weights."""

    upgrades = (_refiner_plan_1_to_2,)

    format: Literal[2] = 2
    method: Method
    backbone: Backbone
    frame_size: Annotated[int, Field(ge=64, le=LARGEST_FRAME)] = 1024
    """Side length S of the encoder's input frame, pixels; a multiple of 32."""
    batch_size: Annotated[int, Field(ge=1, le=1 << 16)] = 4
    """Objects per batch and rank, each on its own frame."""
    prompting: Annotated[PromptConfig | ClickConfig, Field(discriminator="kind")]
    jitter: JitterConfig | None = JitterConfig()
    """None: images are not augmented, each is scaled to fit the frame."""
    views_per_object: Count | None = None
    """Number of distinct augmented frames per object; None: a new frame every time, which the embedding cache cannot
    serve."""
    validation_samples: Count = 50
    """Held-out objects that are scored during training."""
    train: TrainConfig

    @field_validator("frame_size")
    @classmethod
    def _frame_has_positions(cls, size: int) -> int:
        if size % 32:
            raise ValueError(f"frame_size {size} is not a multiple of 32")
        return size

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if not supports_backbone(self.method, self.backbone):
            raise ValueError(f"method {self.method} cannot be built on backbone {self.backbone}")
        return self


class RefinerRecord(TrainedRecord):
    """Header of a refiner's checkpoint, which holds only the trained weights; the frozen base stays in its own file."""

    trained_by: ClassVar[str] = "samhq_train"

    plan: RefinerPlan
    base: str
    """File name of the base's weights."""
    base_sha256: str
    """Digest of the frozen weights that the trained ones belong to."""
    training_images: tuple[str, ...] | None = None
    """Digests of the images that were trained on, ascending (`data.content`); None: unknown, in earlier versions."""
    training_looks: tuple[str, ...] = ()
    """What these images look like, ascending (`data.looks`); empty: unknown."""

    def identity(self) -> dict[str, Any]:
        """The plan without its training settings, base and images: what must agree to resume a training."""
        plan = self.plan.model_dump(mode="json", exclude={"train", "validation_samples"})
        images = self.training_images
        digest = images and f"{len(images)}, digest {hashlib.sha256(' '.join(images).encode()).hexdigest()[:8]}"
        return {"plan": plan, "base_sha256": self.base_sha256, "training images": digest}


def trained_images(records: Sequence[RefinerRecord]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Digests and looks of the images that any of some checkpoints was trained on; no digests: one does not say."""
    looks = tuple(sorted({look for record in records for look in record.training_looks}))
    if not records or any(record.training_images is None for record in records):
        return None, looks
    return tuple(sorted({digest for record in records for digest in record.training_images or ()})), looks


class PredictedObject(Record):
    """One predicted mask."""

    file: FileName
    """Name of the mask file, a PNG beside predictions.json: 255 object, 0 background."""
    image: str
    """File name of the image."""
    box: tuple[float, float, float, float] | None
    """Box prompt XYXY, pixels of the image."""
    points: tuple[tuple[float, float], ...]
    """Point prompts XY, pixels of the image."""
    labels: tuple[int, ...]
    """One label per point: 1 on the object, 0 off it."""
    score: float
    """IoU predicted by the network."""
    pixels: int
    """Area of the mask, pixels."""
    seconds: float
    """The object's share of its batch's decoding time, without the image's encoding time."""


class ImagePredictions(VersionedRecord):
    """The file predictions.json in a folder of predicted masks."""

    format: Literal[1] = 1
    network: dict[str, str]
    """Method, backbone, weight files and other facts about the network."""
    weights_sha256: str
    device: str
    code_version: str
    created: str
    """UTC, ISO 8601."""
    embedding_seconds: dict[str, float]
    """Encoding time by image file name."""
    objects: tuple[PredictedObject, ...]


class ResultRecord(Record):
    """Results of one evaluation protocol."""

    rule: str
    """The protocol in words."""
    sets: dict[str, dict[str, float | None]]
    """Set name -> metric name -> value: IoUs from 0 to 1, counts, seconds; None if undefined."""
    overall: dict[str, float | None]
    """Metric name -> value over all sets."""
    overall_rule: str
    """How `overall` is computed, in words."""
    skipped: tuple[str, ...]
    """Samples that could not be evaluated, with the reason."""
    csv: FileName
    """Name of the file with the results of every sample."""
    seconds: float


class LatencyRecord(Record):
    """Latency of the Segment Anything Task, seconds; see `evaluation.latency`."""

    total_s: float
    encode_s: float
    point_median_s: float
    point_95_s: float
    points: int
    """Number of points."""


class EvaluationRecord(VersionedRecord):
    """The file evaluation.json."""

    format: Literal[1] = 1
    network: dict[str, str]
    """Method, backbone, weight files and other facts about the network."""
    weights_sha256: str
    device: str
    seed: int
    data: dict[str, int]
    """Set name -> number of samples."""
    data_words: tuple[str, ...]
    """The data as given on the command line."""
    held_out: float | None
    """The share of images that training held out, if only those were evaluated; None: all data."""
    trained_on: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Set name -> number of its evaluated images that the network is known to be trained on, and of all of them; sets
    without such images are left out."""
    looks_trained_on: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Likewise, images of other files that look like one that the network was trained on."""
    protocols: dict[str, ResultRecord]
    latency: LatencyRecord | None
    code_version: str
    created: str
    """UTC, ISO 8601."""


def _precision_1_to_2(data: dict[str, Any]) -> dict[str, Any]:
    """Format 2 renames `pictures` to `images`."""
    return renamed(data, {"pictures": "images"})


class PrecisionRecord(VersionedRecord):
    """COCO's average precision of masks, as samhq_evaluate_coco writes it."""

    upgrades = (_precision_1_to_2,)

    format: Literal[2] = 2
    network: dict[str, str]
    """Method, backbone, weight files and other facts about the network."""
    annotations: str
    """File name of the annotations."""
    detections: str | None
    """File name of the detector's boxes; None: the boxes of the annotations."""
    images: int
    """Number of images evaluated."""
    boxes: int
    """Number of boxes given as prompts."""
    trained_on: int = 0
    """Number of these images that the network is known to be trained on."""
    looks_trained_on: int = 0
    """Likewise, images of other files that look like one that the network was trained on."""
    figures: dict[str, float | None]
    """Average precision, 0 to 1, by name (AP, AP50 ...); None if there are no objects of that size."""
