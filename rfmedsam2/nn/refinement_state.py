"""What passes between the steps of RFMedSAM 2, and the arithmetic of class maps, evidence and cells.

Everything is batched over frames: N frames, K foreground classes, maps of H x W pixels. A class map holds l_1 .. l_K
against a background of 0 (softmax over [0, l_1 .. l_K]), or with regions one logit each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2.nn.sam2.types import MemoryBank
from rfmedsam2.prompts import Prompts, prompts_from_labels, prompts_from_members

Size = tuple[int, int]

ABSENT = -10.0
"""Logit of a class that nothing speaks for."""
PROBABILITY_FLOOR = 1e-6
"""Keeps log-odds within +-14, about the range of SAM's own mask logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementInput:
    """What Step 1 begins with.

    Attributes:
        prompts: boxes (N, K, 4) in pixels of the maps, presence (N, K).
        evidence: (N, K, H, W) class map of Step 0; cells that are not decoded keep it.
        masks: (N, K, H, W) logits to prompt with; None: no mask prompts.
        tokens: (N, K, P, C) sparse embeddings in the place of boxes; None: boxes.
        found: (N, K, 4) boxes as a generator gave them, xyxy in [0, 1] of the frame, with gradients.
        presence: (N, K) logits that go with them or with the tokens.
    """

    prompts: Prompts
    base_logits: Tensor
    masks: Tensor | None = None
    tokens: Tensor | None = None
    found: Tensor | None = None
    presence: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memories of Step 1, by place.

    Attributes:
        bank: memories of m cells.
        rows: (D, B, K) long: row of the bank of frame d, volume b, class k; -1: none.
    """

    bank: MemoryBank
    rows: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Step1Output:
    """What Step 1 leaves: its class map (N, K, H, W), the cells (q, 2) of (frame, class) decoded, and what they gave.

    `masks` (q, 4s, 4s) and `scores` (q,) are SAM 2's own, `pointers` (q, C) the object pointers.
    """

    logits: Tensor
    objects: Tensor
    masks: Tensor
    pointers: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutputs:
    """What all steps of patches give.

    Attributes:
        logits: step -> (B, outputs, D, H, W); Step 0 is missing for generators without masks, and a list with deep
            supervision.
        scores: (q,) object score logits of Step 1, and
        cells: (q, 2) the (frame, class) that they are of.
        found: (N, K, 4) boxes that a generator found, xyxy in [0, 1] of the frame; None for others.
        presence: (N, K) logits that go with them.
    """

    logits: dict[int, Tensor | list[Tensor]]
    scores: Tensor | None = None
    objects: Tensor | None = None
    found: Tensor | None = None
    presence: Tensor | None = None


def relative_to_background(logits: Tensor, *, regions: bool) -> Tensor:
    """(N, outputs, ...) logits of a network -> (N, K, ...) class map: the same softmax with a background of 0."""
    return logits if regions else logits[:, 1:] - logits[:, :1]


def one_against_rest(logits: Tensor, *, regions: bool) -> Tensor:
    """(N, outputs, ...) logits -> (N, K, ...) log-odds of each class against all others together."""
    return logits if regions else torch.logit(logits.softmax(1)[:, 1:], eps=PROBABILITY_FLOOR)


def with_background(class_map: Tensor, volumes: int, *, regions: bool) -> Tensor:
    """(N, K, H, W) class map -> logits (B, outputs, D, H, W) as networks give them; the frames of a volume follow."""
    if not regions:
        class_map = F.pad(class_map, (0, 0, 0, 0, 1, 0))
    return class_map.unflatten(0, (volumes, -1)).transpose(1, 2)


@torch.no_grad()
def prompts_of(class_map: Tensor, *, regions: bool) -> Prompts:
    """Boxes and presence of the classes that a class map (N, K, H, W) predicts (from the arg-max label map)."""
    if regions:
        return prompts_from_members(class_map > 0)
    best, index = class_map.max(1)
    return prompts_from_labels(torch.where(best > 0, index + 1, 0), class_map.shape[1])


def scatter_masks(class_map: Tensor, objects: Tensor, values: Tensor) -> Tensor:
    """(N, K, H, W) with the cells (q, 2) replaced by values (q, H, W); differentiable in both."""
    if not len(objects):
        return class_map
    return class_map.index_put((objects[:, 0], objects[:, 1]), values.to(class_map.dtype))


def upsample(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(q, h, w) logits -> (q, *size), bilinear as SAM 2 enlarges its masks."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return F.interpolate(masks[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def downsample(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(q, H, W) logits -> (q, *size), bilinear and anti-aliased as SAM 2 reduces mask prompts."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    shrinks = masks.shape[-1] > size[-1]
    return F.interpolate(masks[:, None].float(), size, mode="bilinear", align_corners=False, antialias=shrinks)[:, 0]


def size_of(maps: Tensor) -> Size:
    """Rows and columns of maps (..., H, W)."""
    return maps.shape[-2], maps.shape[-1]
