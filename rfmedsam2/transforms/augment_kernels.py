"""Compiled inner loop of augmentation: trilinear grid sampling of a label map, all labels in one pass.

Results equal those of batchgeneratorsv2's `SpatialTransform`, which samples an indicator volume of each label: the
label with the highest interpolated share wins, shares are compared in half precision, and ties go to the nearest
voxel's label if it is among the tied, else to the lowest. Sums run in the order of torch's `grid_sample` in float32, so
that the same shares tie.
"""

from __future__ import annotations

import numpy as np

from rfmedsam2.system.numba_cache import compiled

_WHOLE, _HALF, _ONE = np.float32(1000.0), np.float32(500.0), np.float32(1.0)
"""Share of a label that covers all eight corners, as batchgeneratorsv2 computes it, and half of it."""
_LEAST = np.float32(64.0)
"""Smaller than any winning share: among eight corners, at least one label has an eighth of `_WHOLE`."""


@compiled()
def distinct_labels(labels: np.ndarray) -> tuple[int, int, int]:
    """Count the distinct values of a flat array: 1, 2 or 3 (3 or more), and the first two (equal if there is one)."""
    first = labels[0]
    second = first
    for value in labels:
        if value != first and value != second:
            if second != first:
                return 3, first, second
            second = value
    return (1 if first == second else 2), first, second


@compiled()
def _half_precision(share: np.float32) -> np.float32:
    """Round a share to half precision, ties to even; shares that cannot win stay as they are."""
    if share < _LEAST:
        return share
    step = np.float32(0.0625)
    if share >= np.float32(512.0):
        step = np.float32(0.5)
    elif share >= np.float32(256.0):
        step = np.float32(0.25)
    elif share >= np.float32(128.0):
        step = np.float32(0.125)
    # after adding 1.5 * 2^23 steps, float32 cannot represent a fraction of a step
    large = np.float32(12582912.0) * step
    return np.float32(np.float32(share + large) - large)


@compiled()
def _share(label, corners, inside, weights, outside_label):
    """Interpolated share of a label; `outside_label` includes corners outside (1 minus the share of the others)."""
    total = np.float32(0.0)
    if label == outside_label:
        for n in range(8):
            if inside[n] and corners[n] != label:
                total = np.float32(total - _WHOLE * weights[n])
        return _half_precision(np.float32(total + _WHOLE))
    for n in range(8):
        if inside[n] and corners[n] == label:
            total = np.float32(total + _WHOLE * weights[n])
    return _half_precision(total)


@compiled()
def _winner(corners, inside, weights, nearest, outside_label, two):
    """Label of one voxel; with only two labels (see `sample_labels`) the share of the higher one decides."""
    alone, lower, higher = two
    if alone:
        share = _share(higher, corners, inside, weights, outside_label)
        if share == _HALF:
            return nearest
        return higher if share > _HALF else lower
    best, winner = np.float32(-1.0), nearest
    for n in range(8):
        share = _share(corners[n], corners, inside, weights, outside_label)
        if share > best or (share == best and corners[n] < winner):
            best, winner = share, corners[n]
    if _share(nearest, corners, inside, weights, outside_label) == best:
        return nearest
    return winner


@compiled()
def sample_labels(labels, grid, padding, reaches_outside, two, sampled):
    """Fill `sampled` (d, h, w) with `labels` (Z, Y, X) at the positions `grid` (d, h, w, 3).

    Args:
        labels: int16.
        grid: float32 (x, y, z) from -1 to 1, the outer edges of the volume, as for torch's grid_sample.
        padding: label outside the volume.
        reaches_outside: whether the grid may leave the volume; if not, the padding is a label like any other.
        two: (1, lower, higher) if these are the only labels, padding included, else (0, 0, 0).
        sampled: int16.
    """
    size = labels.shape
    extent = (np.float32(size[2]), np.float32(size[1]), np.float32(size[0]))
    # otherwise a value that differs from every label
    outside_label = np.int64(padding) if reaches_outside else np.int64(1 << 40)
    corners, inside = np.empty(8, np.int64), np.empty(8, np.bool_)
    weights = np.empty(8, np.float32)
    for i in range(sampled.shape[0]):
        for j in range(sampled.shape[1]):
            for k in range(sampled.shape[2]):
                x = ((grid[i, j, k, 0] + _ONE) * extent[0] - _ONE) / np.float32(2.0)
                y = ((grid[i, j, k, 1] + _ONE) * extent[1] - _ONE) / np.float32(2.0)
                z = ((grid[i, j, k, 2] + _ONE) * extent[2] - _ONE) / np.float32(2.0)
                fx, fy, fz = np.floor(x), np.floor(y), np.floor(z)
                x0, y0, z0 = int(fx), int(fy), int(fz)
                alike = True
                for n in range(8):
                    cz, cy, cx = z0 + (n >> 2), y0 + ((n >> 1) & 1), x0 + (n & 1)
                    inside[n] = 0 <= cz < size[0] and 0 <= cy < size[1] and 0 <= cx < size[2]
                    corners[n] = labels[cz, cy, cx] if inside[n] else padding
                    alike = alike and corners[n] == corners[0]
                if alike:
                    sampled[i, j, k] = corners[0]
                    continue
                wx = (np.float32(fx + _ONE) - x, x - fx)
                wy = (np.float32(fy + _ONE) - y, y - fy)
                wz = (np.float32(fz + _ONE) - z, z - fz)
                for n in range(8):
                    weights[n] = wx[n & 1] * wy[(n >> 1) & 1] * wz[n >> 2]
                nz, ny, nx = int(np.rint(z)), int(np.rint(y)), int(np.rint(x))
                within = 0 <= nz < size[0] and 0 <= ny < size[1] and 0 <= nx < size[2]
                nearest = np.int64(labels[nz, ny, nx]) if within else np.int64(padding)
                sampled[i, j, k] = _winner(corners, inside, weights, nearest, outside_label, two)
