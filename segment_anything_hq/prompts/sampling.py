"""Training prompts sampled from the masks of objects: boxes, random points on and around them, coarse masks.

All objects of a batch are processed together, and all randomness comes from the given generator: with
`generator_of(seed, number)`, batch `number` of a training depends only on (seed, number).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from typing_extensions import assert_never

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.segmenter import PromptBatch
from rfmedsam2.prompts import prompts_from_members

Kind = Literal["box", "points", "box_and_points", "box_and_negatives", "mask"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MASK_LOGIT = 10.0
"""Logit of a mask prompt's pixels, negative outside the mask: SAM 2 converts users' masks to the same value."""
COARSENESS = 8
"""Noise is added where a mask changes when it is reduced by this factor and enlarged again (HQ-SAM's training)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMix:
    """How often each kind of prompt is sampled, and its parameters.

    Attributes:
        box: share of boxes alone; shares need not sum to 1.
        points: share of points on the object alone.
        box_and_points: share of boxes with points on the object.
        box_and_negatives: share of boxes with points off the object, near it.
        mask: share of degraded masks.
        count: number of points per prompt.
        margin: how far outside the object's box negative points may lie, as a fraction of the box's sides.
        noise: standard deviation of the noise that degrades masks, which are 0 and 1.
    """

    box: float
    points: float
    box_and_points: float = 0.0
    box_and_negatives: float = 0.0
    mask: float
    count: int = 10
    margin: float = 0.25
    noise: float = 1.0

    def __post_init__(self) -> None:
        shares = [getattr(self, kind) for kind in KINDS]
        if min(shares) < 0 or sum(shares) <= 0 or self.count < 1:
            found = f"shares {shares} and {self.count} points"
            raise UsageError(
                "Invalid prompt mix",
                expected="shares of 0 or more with a positive sum, count of at least 1",
                found=found,
            )


SAM2_REFINER = PromptMix(box=0.3, points=0.2, box_and_points=0.2, box_and_negatives=0.2, mask=0.1)
"""SAM2Refiner supplement, section 1.1."""
HQ_SAM = PromptMix(box=1 / 3, points=1 / 3, mask=1 / 3)
"""HQ-SAM's published training: a box, ten points or a coarse mask, equally often."""


def generator_of(seed: int, number: int) -> Generator:
    """The random generator, on the CPU, of batch `number` of the training with this seed."""
    words = np.random.SeedSequence([seed % 2**64, number]).generate_state(2)
    return Generator().manual_seed((int(words[0]) << 31) | (int(words[1]) >> 1))


def draw_kind(mix: PromptMix, rng: Generator) -> Kind:
    """Draw a kind of prompt; all objects of a batch get the same (SAM2Refiner supplement, section 1.1)."""
    shares = torch.tensor([getattr(mix, kind) for kind in KINDS], dtype=torch.float64)
    return KINDS[int(torch.multinomial(shares, 1, generator=rng))]


def training_prompts(masks: Tensor, images: Tensor, *, mix: PromptMix, rng: Generator) -> PromptBatch:
    """Sample prompts of one randomly drawn kind for the objects of a batch.

    Args:
        masks: (P, S, S) bool, the objects' masks in their frames, none of them empty.
        images: (P,) long, index of each object's frame.
        mix: shares and parameters of the kinds.
        rng: source of randomness, on the CPU.

    Raises:
        UsageError: a mask is empty.
    """
    return prompts_of_kind(draw_kind(mix, rng), masks, images, mix=mix, rng=rng)


def prompts_of_kind(kind: Kind, masks: Tensor, images: Tensor, *, mix: PromptMix, rng: Generator) -> PromptBatch:
    """Like `training_prompts`, for a given kind."""
    boxes = boxes_of(masks)
    match kind:
        case "box":
            return PromptBatch(images=images, boxes=boxes)
        case "points" | "box_and_points":
            points, found = random_points(masks, mix.count, rng)
            boxed = boxes if kind == "box_and_points" else None
            return PromptBatch(images=images, points=points, point_labels=torch.where(found, 1, -1), boxes=boxed)
        case "box_and_negatives":
            points, found = random_points(surroundings(masks, mix.margin), mix.count, rng)
            return PromptBatch(images=images, points=points, point_labels=torch.where(found, 0, -1), boxes=boxes)
        case "mask":
            coarse = degraded(masks, masks.shape[-1] // 4, rng, noise=mix.noise)
            return PromptBatch(images=images, masks=coarse)
        case _:
            assert_never(kind)


def boxes_of(masks: Tensor) -> Tensor:
    """Tight boxes (P, 4) XYXY, first and last pixel, of masks (P, H, W) bool.

    Raises:
        UsageError: a mask is empty.
    """
    prompts = prompts_from_members(masks[:, None])
    if not prompts.present.all():
        empty = (~prompts.present[:, 0]).nonzero().flatten().tolist()
        raise UsageError(
            "An object without a pixel cannot be prompted for",
            where=f"objects {empty} of {len(masks)}",
            remedy="Leave its image out, or draw another part of the image",
        )
    return prompts.boxes[:, 0]


def random_points(regions: Tensor, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Draw pixels uniformly from regions.

    Pixels are drawn without replacement if the region has at least `count` of them, else with replacement.

    Args:
        regions: (P, H, W) bool.
        count: k, points per region.
        rng: source of randomness, on the CPU.

    Returns:
        Points (P, k, 2) float32 XY, and (P, k) bool: whether the region has pixels; points are 0 if not.
    """
    # float32 represents a row's counts exactly and sums bytes seven times as fast as the default dtype
    held = regions.view(torch.uint8).sum(2, dtype=torch.float32).long()
    ends = held.cumsum(1)
    ranks = _random_ranks(ends[:, -1].cpu(), count, rng).to(regions.device)
    # the pixel of rank r in row-major order lies in the first row whose cumulative count exceeds r
    rows = torch.searchsorted(ends, ranks, right=True).clamp_max(regions.shape[1] - 1)
    left = ranks - (ends - held).gather(1, rows)
    lines = regions[torch.arange(len(regions), device=regions.device)[:, None], rows]
    columns = torch.searchsorted(lines.cumsum(2), left[..., None], right=True)[..., 0]
    found = (ends[:, -1:] > 0).expand(-1, count)
    return torch.stack([columns, rows], -1).float() * found[..., None], found


def _random_ranks(totals: Tensor, count: int, rng: Generator) -> Tensor:
    """(P, count) integers below totals (P,): uniform random subsets if the total is large enough (R. Floyd)."""
    draws = torch.rand(len(totals), count, dtype=torch.float64, generator=rng)
    last = (totals[:, None] - count + torch.arange(count)).clamp_min(0)
    candidates = (draws * (last + 1)).long()
    chosen = torch.empty_like(candidates)
    for place in range(count):
        taken = (chosen[:, :place] == candidates[:, place, None]).any(1)
        chosen[:, place] = torch.where(taken, last[:, place], candidates[:, place])
    return torch.where(totals[:, None] >= count, chosen, (draws * totals[:, None]).long())


def surroundings(masks: Tensor, margin: float) -> Tensor:
    """(P, H, W) bool: pixels off the object but inside its enlarged box.

    Args:
        masks: (P, H, W) bool, none of them empty.
        margin: fraction of the box's width and height added on each side, at least one pixel.
    """
    boxes = boxes_of(masks)
    reach = ((boxes[:, 2:] - boxes[:, :2] + 1) * margin).clamp_min(1)
    first, last = boxes[:, :2] - reach, boxes[:, 2:] + reach
    columns, rows = (
        (at >= first[:, axis, None]) & (at <= last[:, axis, None])
        for axis, at in ((0, _indices(masks, 2)), (1, _indices(masks, 1)))
    )
    return ~masks & rows[:, :, None] & columns[:, None, :]


def _indices(masks: Tensor, axis: int) -> Tensor:
    return torch.arange(masks.shape[axis], device=masks.device)


def degraded(masks: Tensor, side: int, rng: Generator, *, noise: float = 1.0) -> Tensor:
    """Coarse masks: add noise along the boundary of 0/1 masks and threshold at 0.5 (HQ-SAM's training).

    Args:
        masks: (P, H, W) bool.
        side: side of the coarse masks, 256 for frames of 1024 pixels.
        rng: source of randomness, on the CPU.
        noise: standard deviation of the noise.

    Returns:
        (P, side, side) logits, `MASK_LOGIT` inside and -`MASK_LOGIT` outside.
    """
    small = F.interpolate(masks[:, None].float(), (side, side), mode="bilinear", align_corners=False)
    coarse = F.interpolate(small, max(1, side // COARSENESS), mode="bilinear", align_corners=False)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)
    drawn = torch.randn(small.shape, generator=rng).to(small.device) * noise
    noisy = small + drawn * ((small - smooth).abs() >= 0.01)
    return torch.where(noisy[:, 0] > 0.5, MASK_LOGIT, -MASK_LOGIT)
