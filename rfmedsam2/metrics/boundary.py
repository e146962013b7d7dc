"""Boundary IoU of two masks (Cheng et al., CVPR 2021).

A mask's boundary is what `d` erosions by a 3 x 3 square remove: the pixels with background, or the image's edge, within
`d` rows and columns. Masks are packed 64 pixels per word, and d erosions take log2(d) steps.
"""

from __future__ import annotations

import numpy as np

from rfmedsam2.errors import UsageError
from rfmedsam2.system.numba_cache import compiled

DILATION_RATIO = 0.02
"""Width of the boundary as a fraction of the image's diagonal."""
_BITS = 64


def boundary_width(height: int, width: int, dilation_ratio: float = DILATION_RATIO) -> int:
    """Width of the boundary in pixels, 1 or more."""
    return max(1, round(dilation_ratio * float(np.sqrt(height**2 + width**2))))


def mask_to_boundary(mask: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> np.ndarray:
    """The boundary of a mask, equal to the published `mask_to_boundary`.

    Args:
        mask: (H, W), bool or any dtype; 0 outside the object.
        dilation_ratio: width of the boundary as a fraction of the image's diagonal.

    Returns:
        (H, W) bool.
    """
    words = _boundary(mask, boundary_width(*_size(mask), dilation_ratio))
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=mask.shape[1], bitorder="little")
    return bits.view(np.bool_)


def boundary_iou(
    ground_truth: np.ndarray,
    predicted: np.ndarray,
    *,
    dilation_ratio: float = DILATION_RATIO,
    ignored: np.ndarray | None = None,
) -> float:
    """Intersection over union of two masks' boundaries; 1 if both masks are empty.

    Args:
        ground_truth: (H, W), 0 outside the object.
        predicted: (H, W), 0 outside the object.
        dilation_ratio: width of the boundary as a fraction of the image's diagonal.
        ignored: (H, W), nonzero where pixels are excluded. Our extension; the published metric has no such mask.

    Raises:
        UsageError: shapes differ.
    """
    others = [predicted] if ignored is None else [predicted, ignored]
    if any(other.shape != ground_truth.shape for other in others):
        found = " and ".join(str(m.shape) for m in (ground_truth, *others))
        raise UsageError("The masks differ in shape", expected="the same (H, W)", found=found)
    width = boundary_width(*_size(ground_truth), dilation_ratio)
    first, second = (_boundary(mask, width) for mask in (ground_truth, predicted))
    kept = np.full_like(first, ~np.uint64(0)) if ignored is None else ~_packed(ignored)
    both, either = _overlap(first, second, kept)
    return both / either if either else 1.0


def _size(mask: np.ndarray) -> tuple[int, int]:
    if mask.ndim != 2 or mask.size == 0:
        raise UsageError("The mask does not have two axes", expected="(H, W)", found=mask.shape)
    return mask.shape[0], mask.shape[1]


def _packed(mask: np.ndarray) -> np.ndarray:
    """(H, ceil(W / 64)) uint64, the lowest bit on the left; 0 beyond the edge."""
    mask = np.ascontiguousarray(mask)
    height, width = mask.shape
    used = -(-width // 8)
    if used % 8 == 0:
        return np.packbits(mask, axis=1, bitorder="little").view(np.uint64)
    words = np.zeros((height, -(-width // _BITS) * 8), np.uint8)
    words[:, :used] = np.packbits(mask, axis=1, bitorder="little")
    return words.view(np.uint64)


def _boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """Packed boundary of a mask."""
    words = _packed(mask)
    inner = words.copy()
    # AND over windows of 2 width + 1 pixels that start at each pixel, by combining windows of half the length
    for axis_erode in (_and_with_right, _and_with_below):
        done = 1
        while done < 2 * width + 1:
            step = min(done, 2 * width + 1 - done)
            axis_erode(inner, step)
            done += step
    # a window that starts at a pixel is centered `width` pixels to the right of it and below it
    return _without_shifted(words, inner, width)


_kernel = compiled(error_model="numpy")


@_kernel
def _and_with_right(words: np.ndarray, step: int) -> None:
    """AND each pixel with the one `step` to the right of it, in place; 0 beyond the edge."""
    rows, columns = words.shape
    whole, part = step // 64, np.uint64(step % 64)
    rest = np.uint64(64) - part
    # the last word whose two parts are both inside the row
    end = max(columns - whole - 1, 0)
    for y in range(rows):
        row = words[y]
        if part == 0:
            for i in range(columns - whole):
                row[i] &= row[i + whole]
        else:
            for i in range(end):
                row[i] &= (row[i + whole] >> part) | (row[i + whole + 1] << rest)
            if whole < columns:
                row[end] &= row[columns - 1] >> part
        first_outside = max(columns - whole, 0)
        row[first_outside:] = np.uint64(0)


@_kernel
def _and_with_below(words: np.ndarray, step: int) -> None:
    """AND each pixel with the one `step` below it, in place; 0 beyond the edge."""
    rows = words.shape[0]
    for y in range(rows):
        if y + step < rows:
            words[y] &= words[y + step]
        else:
            words[y] = np.uint64(0)


@_kernel
def _without_shifted(words: np.ndarray, inner: np.ndarray, shift: int) -> np.ndarray:
    """`words` AND NOT (`inner` shifted by `shift` pixels to the right and down)."""
    rows, columns = words.shape
    result = words.copy()
    whole, part = shift // 64, np.uint64(shift % 64)
    rest = np.uint64(64) - part
    for y in range(shift, rows):
        for i in range(whole, columns):
            moved = inner[y - shift, i - whole]
            if part > 0:
                before = inner[y - shift, i - whole - 1] if i - whole >= 1 else np.uint64(0)
                moved = (moved << part) | (before >> rest)
            result[y, i] &= ~moved
    return result


@_kernel
def _ones(word: np.uint64) -> np.uint64:
    """Number of set bits in a word."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@_kernel
def _overlap(first: np.ndarray, second: np.ndarray, kept: np.ndarray) -> tuple[int, int]:
    """Number of pixels in the intersection and in the union, among the kept ones."""
    both, either = np.uint64(0), np.uint64(0)
    rows, columns = first.shape
    for y in range(rows):
        for i in range(columns):
            both += _ones(first[y, i] & second[y, i] & kept[y, i])
            either += _ones((first[y, i] | second[y, i]) & kept[y, i])
    return int(both), int(either)
