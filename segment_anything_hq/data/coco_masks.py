"""Masks from COCO and LVIS annotations (polygons, run lengths), equal to the official API's pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rfmedsam2.errors import DatasetError

_UPSAMPLING = 5.0
"""Outlines are traced on a grid this many times finer than the mask, as in the official API."""


def polygons_mask(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Union of polygons.

    Args:
        polygons: arrays (2 n,) of x0, y0, x1, y1, ..., pixels from the image's top left corner.
        height: height of the mask, pixels.
        width: width of the mask, pixels.

    Returns:
        (height, width) bool, equal to the API's `frPyObjects`, `merge` and `decode`.

    Raises:
        DatasetError: a polygon has fewer than three points or an odd number of coordinates.
    """
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        mask |= _polygon_mask(np.asarray(polygon, np.float64), height, width)
    return mask


def counts_mask(counts: str | Sequence[int], height: int, width: int) -> np.ndarray:
    """Decode run lengths, which go down the columns and begin with background.

    Args:
        counts: run lengths, or the API's compressed text.
        height: height of the mask, pixels.
        width: width of the mask, pixels.

    Returns:
        (height, width) bool.

    Raises:
        DatasetError: the run lengths do not fill the mask exactly.
    """
    runs = np.asarray(run_lengths(counts) if isinstance(counts, str) else counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        found = f"{runs.sum()} pixels in {runs.size} runs"
        raise DatasetError("Run lengths do not fill the mask", expected=f"{height} x {width} pixels", found=found)
    inside = np.arange(runs.size) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _polygon_mask(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """One polygon: its outline toggles inside and outside along the columns, one after another."""
    if polygon.ndim != 1 or polygon.size < 6 or polygon.size % 2 or not np.isfinite(polygon).all():
        raise DatasetError("Invalid polygon", expected="at least 3 (x, y) points", found=f"{polygon.size} numbers")
    corners = (_UPSAMPLING * polygon.reshape(-1, 2) + 0.5).astype(np.int64)
    x, y = _outline(corners)
    crossing = np.flatnonzero(np.diff(x)) + 1
    column = (np.minimum(x[crossing], x[crossing - 1]) + 0.5) / _UPSAMPLING - 0.5
    row = (np.minimum(y[crossing], y[crossing - 1]) + 0.5) / _UPSAMPLING - 0.5
    kept = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    columns = column[kept].astype(np.int64)
    rows = np.ceil(np.clip(row[kept], 0, height)).astype(np.int64)
    toggles = np.bincount(columns * height + rows, minlength=height * width + 1)[: height * width]
    return (np.cumsum(toggles) % 2 == 1).reshape(width, height).T


def _outline(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All grid points of the closed outline, x and y, in order; corners (n, 2) of int64."""
    starts, ends = corners, np.roll(corners, -1, axis=0)
    xs: list[np.ndarray] = []
    ys: list[np.ndarray] = []
    for (x0, y0), (x1, y1) in zip(starts.tolist(), ends.tolist(), strict=True):
        along_x = abs(x1 - x0) >= abs(y1 - y0)
        (a0, b0), (a1, b1) = ((x0, y0), (x1, y1)) if along_x else ((y0, x0), (y1, x1))
        flipped = a0 > a1
        if flipped:
            a0, b0, a1, b1 = a1, b1, a0, b0
        length = a1 - a0
        steps = np.arange(length + 1)
        slope = (b1 - b0) / length if length else 0.0
        # rounds toward zero, like the cast in the C code
        across = (b0 + slope * steps + 0.5).astype(np.int64)
        along = a0 + steps
        if flipped:
            along, across = along[::-1], across[::-1]
        xs.append(along if along_x else across)
        ys.append(across if along_x else along)
    return np.concatenate(xs), np.concatenate(ys)


def run_lengths(text: str) -> list[int]:
    """Decode compressed run lengths: 6 bits per character, lowest first; from the fourth on as differences.

    Raises:
        DatasetError: a character or number cannot be one of these.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise DatasetError("Compressed run lengths hold an invalid character", found=repr(character))
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    return runs
