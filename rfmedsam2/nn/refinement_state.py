"""Data passed between the steps of RFMedSAM 2, and operations on class maps and object prompts.

Everything is batched over frames: N frames, K foreground classes, maps of H x W pixels. An object prompt is one class
on one frame. A class map holds logits l_1 .. l_K relative to a background of 0 (softmax over [0, l_1 .. l_K]), or one
logit per region.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2.nn.refinement.object_sampling import DrawnObjects
from rfmedsam2.nn.sam2.types import MemoryBank
from rfmedsam2.prompts import Prompts, prompts_from_labels, prompts_from_members

Size = tuple[int, int]

ABSENT = -10.0
"""Logit of a class that is absent."""
PROBABILITY_FLOOR = 1e-6
"""Clamps log-odds to +-14, about the range of SAM's mask logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementInput:
    """Input of Step 1.

    Attributes:
        prompts: boxes (N, K, 4) in pixels of the maps, presence (N, K).
        base_logits: (N, K, H, W) class map of Step 0; objects that are not decoded keep it.
        given: whether the prompts are boxes from a person that win over `base_logits`.
        masks: (N, K, H, W) logits of mask prompts; None: no mask prompts.
        tokens: (N, K, P, C) sparse embeddings used instead of boxes; None: boxes.
        found: (N, K, 4) boxes predicted by a generator, xyxy in [0, 1] of the frame, with gradients.
        presence: (N, K) presence logits of these boxes or of the tokens.
    """

    prompts: Prompts
    base_logits: Tensor
    given: bool = False
    masks: Tensor | None = None
    tokens: Tensor | None = None
    found: Tensor | None = None
    presence: Tensor | None = None

    @property
    def evidence(self) -> Tensor | None:
        """What SAM 2's masks are added to; None: they replace it."""
        return None if self.given else self.base_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memories of Step 1, by frame, volume and class.

    Attributes:
        bank: memories of m objects.
        rows: (D, B, K) long: row of the bank of frame d, volume b, class k; -1: none.
    """

    bank: MemoryBank
    rows: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMasks:
    """What SAM 2 itself answered in a step, before it was composed with Step 0's class map.

    Attributes:
        objects: (q, 2) long, (frame, class).
        boxes: (q, 4) their box prompts in pixels of SAM 2's frames.
        masks: (q, 4s, 4s) mask logits.
    """

    objects: Tensor
    boxes: Tensor
    masks: Tensor

    def first(self, count: int) -> StepMasks:
        """The first objects alone."""
        return StepMasks(objects=self.objects[:count], boxes=self.boxes[:count], masks=self.masks[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class Step1Output:
    """Output of Step 1.

    Attributes:
        logits: (N, K, H, W) class map.
        drawn: the decoded objects, q altogether.
        decoded: SAM 2's masks of these.
        pointers: (q, C) object pointers.
        scores: (q,) object score logits.
    """

    logits: Tensor
    drawn: DrawnObjects
    decoded: StepMasks
    pointers: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Step2Output:
    """Output of Step 2.

    Attributes:
        logits: (N, K, H, W) class map.
        decoded: SAM 2's masks; None: no object was decoded.
    """

    logits: Tensor
    decoded: StepMasks | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutputs:
    """Outputs of all steps for patches.

    Attributes:
        logits: step -> (B, outputs, D, H, W); Step 0 is missing for generators without masks, and a list with deep
            supervision.
        scores: (q,) object score logits of Step 1.
        objects: (q, 2) (frame, class) of these scores.
        frames: (B * D,) bool, the frames that count in the losses of Steps 1 and 2; None: all.
        decoded: step -> SAM 2's masks of the objects that were decoded with gradients.
        found: (N, K, 4) boxes predicted by a generator, xyxy in [0, 1] of the frame; None for other generators.
        presence: (N, K) presence logits of these boxes.
    """

    logits: dict[int, Tensor | list[Tensor]]
    scores: Tensor | None = None
    objects: Tensor | None = None
    frames: Tensor | None = None
    decoded: dict[int, StepMasks] = field(default_factory=dict)
    found: Tensor | None = None
    presence: Tensor | None = None


def relative_to_background(logits: Tensor, *, regions: bool) -> Tensor:
    """Logits (N, outputs, ...) of a network -> class map (N, K, ...) with the same softmax, background at 0."""
    return logits if regions else logits[:, 1:] - logits[:, :1]


def one_against_rest(logits: Tensor, *, regions: bool) -> Tensor:
    """Logits (N, outputs, ...) -> log-odds (N, K, ...) of each class against all others together."""
    return logits if regions else torch.logit(logits.softmax(1)[:, 1:], eps=PROBABILITY_FLOOR)


def total_evidence(class_map: Tensor) -> Tensor:
    """Logarithm of the summed exponentials of a class map (N, K, ...) and its background: (N, ...)."""
    classes = class_map.logsumexp(1)
    return torch.logaddexp(classes, torch.zeros_like(classes))


def log_odds(own: Tensor, total: Tensor) -> Tensor:
    """Log-odds of classes against all others together, from their logits and the `total_evidence` of their pixels."""
    return torch.logit((own - total).exp(), eps=PROBABILITY_FLOOR)


def with_background(class_map: Tensor, volumes: int, *, regions: bool) -> Tensor:
    """Class map (N, K, H, W) -> logits (B, outputs, D, H, W) as of a network; frames of a volume are consecutive."""
    if not regions:
        class_map = F.pad(class_map, (0, 0, 0, 0, 1, 0))
    return class_map.unflatten(0, (volumes, -1)).transpose(1, 2)


@torch.no_grad()
def prompts_of(class_map: Tensor, *, regions: bool) -> Prompts:
    """Boxes and presence of the classes in a class map (N, K, H, W), from its arg-max label map."""
    if regions:
        return prompts_from_members(class_map > 0)
    best, index = class_map.max(1)
    return prompts_from_labels(torch.where(best > 0, index + 1, 0), class_map.shape[1])


def scatter_masks(class_map: Tensor, objects: Tensor, values: Tensor) -> Tensor:
    """Class map (N, K, H, W) with the maps of `objects` (q, 2) replaced by values (q, H, W); differentiable in both."""
    if not len(objects):
        return class_map
    return class_map.index_put((objects[:, 0], objects[:, 1]), values.to(class_map.dtype))


def upsample(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (q, h, w) -> (q, *size), bilinear, as SAM 2 upsamples its masks."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return F.interpolate(masks[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def downsample(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (q, H, W) -> (q, *size), bilinear and anti-aliased, as SAM 2 downsamples mask prompts."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    shrinks = masks.shape[-1] > size[-1]
    return F.interpolate(masks[:, None].float(), size, mode="bilinear", align_corners=False, antialias=shrinks)[:, 0]


def size_of(maps: Tensor) -> Size:
    """Rows and columns of maps (..., H, W)."""
    return maps.shape[-2], maps.shape[-1]
