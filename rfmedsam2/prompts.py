"""Box and point prompts from label maps or masks, for every (slice, class) pair, with presence flags.

All pairs are computed in one vectorized pass, on the CPU or on a GPU: the labels of a row are collected as bits of one
word, so that no masks per class are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfmedsam2.errors import UsageError

CLASSES_PER_WORD = 29
"""Number of classes per 32-bit word, besides the two bits for labels below and above them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Boxes of N frames and K classes, on the grid that a network sees.

    Attributes:
        boxes: (N, K, 4) float32, x0, y0, x1, y1 by the convention of `records.box_prompts.BoxPrompt`: pixel indices of
            the first and the last pixel that belong to the box; 0 where absent. A point is the box of one pixel.
        present: (N, K) bool: the class has a pixel on the frame. What is absent has no box and is never prompted for.
    """

    boxes: Tensor
    present: Tensor


def prompts_from_labels(labels: Tensor, classes: int) -> Prompts:
    """Tight boxes of all classes of label maps.

    Args:
        labels: (N, H, W) integers; class k has the value k + 1, values outside 1..classes belong to no class.
        classes: K, 1 or more.
    """
    _check(labels, classes)
    starts = range(0, classes, CLASSES_PER_WORD)
    sides = [_sides(labels, start, min(CLASSES_PER_WORD, classes - start)) for start in starts]
    columns, rows = (torch.cat(parts, dim=1) for parts in zip(*sides, strict=True))
    return _boxes(columns, rows)


def prompts_from_members(members: Tensor) -> Prompts:
    """Tight boxes of masks (N, K, H, W) of bool, which may overlap (regions)."""
    return _boxes(_united(members, 2), _united(members, 3))


def resized(prompts: Prompts, from_size: tuple[int, int], to_size: tuple[int, int]) -> Prompts:
    """Scale boxes to slices that were resized from `from_size` to `to_size`, both (H, W).

    The area from the near edge of the first pixel to the far edge of the last pixel is preserved.
    """
    if tuple(from_size) == tuple(to_size):
        return prompts
    scale_y, scale_x = (to / origin for to, origin in zip(to_size, from_size, strict=True))
    scale = prompts.boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
    # the far edge of the last pixel is its index + 1
    end = prompts.boxes.new_tensor([0, 0, 1, 1])
    boxes = (prompts.boxes + end) * scale - end
    return Prompts(boxes=torch.where(prompts.present[..., None], boxes, 0), present=prompts.present)


def center_points(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """One point per (slice, class): the pixel of the class that is nearest to the class's center of mass.

    A point prompt must be on its object, which is not true for the center of mass of a curved or split organ.

    Args:
        labels: (N, H, W) integers; class k has the value k + 1, values outside 1..classes belong to no class.
        classes: K, 1 or more.

    Returns:
        Points (N, K, 2) float32 of (x, y), 0 where absent; presence (N, K) bool.
    """
    _check(labels, classes)
    frames, _, width = labels.shape
    frame, y, x = ((labels >= 1) & (labels <= classes)).nonzero().unbind(1)
    pair = frame * classes + labels[frame, y, x].long() - 1
    # integers throughout, so that the result does not depend on the order of summation
    count, sum_x, sum_y = (_added(pair, part, frames * classes) for part in (torch.ones_like(x), x, y))
    distance = (x * count[pair] - sum_x[pair]) ** 2 + (y * count[pair] - sum_y[pair]) ** 2
    nearest = _least(pair, distance, frames * classes)
    is_nearest = distance == nearest[pair]
    pixel = _least(pair[is_nearest], (y * width + x)[is_nearest], frames * classes)
    present = (count > 0).view(frames, classes)
    points = torch.stack([pixel % width, pixel // width], dim=-1).view(frames, classes, 2)
    return torch.where(present[..., None], points, 0).float(), present


def _check(labels: Tensor, classes: int) -> None:
    if classes < 1:
        raise UsageError(
            "There are no classes to prompt", expected="at least one foreground class", found=f"{classes} classes"
        )
    if labels.ndim != 3 or labels.is_floating_point():
        found = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise UsageError("The labels are not label maps", expected="integers of shape (N, H, W)", found=found)


def _sides(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Columns (N, count, W) and rows (N, count, H) that contain the classes start + 1 .. start + count."""
    # bit 0 collects labels below these classes, bit count + 1 labels above
    bits = labels.to(torch.int32, copy=True).sub_(start).clamp_(0, count + 1)
    # in place, because allocating memory takes several times as long as the operation
    torch.bitwise_left_shift(bits.new_ones(()), bits, out=bits)
    shifts = torch.arange(1, count + 1, device=labels.device, dtype=torch.int32)[:, None]
    columns, rows = (((_united(bits, dim)[:, None] >> shifts) & 1).bool() for dim in (1, 2))
    return columns, rows


def _united(bits: Tensor, dim: int) -> Tensor:
    """Bitwise OR over an axis, by halving it; halves of an odd length overlap in one entry, which does not matter."""
    while (size := bits.shape[dim]) > 1:
        half = (size + 1) // 2
        bits = bits.narrow(dim, 0, half) | bits.narrow(dim, size - half, half)
    return bits.squeeze(dim)


def _boxes(columns: Tensor, rows: Tensor) -> Prompts:
    """Boxes from the columns (N, K, W) and rows (N, K, H) that contain each class."""
    present = rows.any(-1)
    (left, right), (top, bottom) = _ends(columns), _ends(rows)
    boxes = torch.stack([left, top, right, bottom], dim=-1)
    return Prompts(boxes=torch.where(present[..., None], boxes, 0).float(), present=present)


def _ends(line: Tensor) -> tuple[Tensor, Tensor]:
    """First and last true index along the last axis; arbitrary if none is true."""
    flags = line.to(torch.uint8)
    return flags.argmax(-1), line.shape[-1] - 1 - flags.flip(-1).argmax(-1)


def _added(index: Tensor, values: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).index_add_(0, index, values)


def _least(index: Tensor, values: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).scatter_reduce_(0, index, values, "amin", include_self=False)
