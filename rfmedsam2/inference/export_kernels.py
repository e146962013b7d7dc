"""Compiled inner loops of export: one plane of low-resolution logits -> one plane of labels.

Interpolation and arg-max are fused, so resampled logits are never stored. If all sources of a target voxel have the
same winner, it also wins at the target, because linear weights are non-negative and sum to 1. This shortcut is exact
and covers most voxels of a segmentation. The kernels release the GIL and are single-threaded.

All kernels take logits (K, planes, b, c) float32, contiguous, the plane's index, a table of label values by winner,
and the taps (index, weight) of both target axes: source index and index + 1, weight of the latter.
"""

from __future__ import annotations

import numpy as np

from rfmedsam2.system.numba_cache import compiled


@compiled()
def paint_classes(logits, plane, table, rows, columns, out):
    """Write the label of the largest interpolated logit into `out` (B, C); ties go to the first."""
    classes = logits.shape[0]
    winner = _largest(logits, plane)
    for i in range(out.shape[0]):
        p = rows[0][i]
        u = rows[1][i]
        below = p + 1 if u > 0 else p
        for j in range(out.shape[1]):
            q = columns[0][j]
            v = columns[1][j]
            right = q + 1 if v > 0 else q
            label = winner[p, q]
            if winner[p, right] != label or winner[below, q] != label or winner[below, right] != label:
                best = np.float32(-np.inf)
                for c in range(classes):
                    source = logits[c, plane]
                    upper = source[p, q] + v * (source[p, right] - source[p, q])
                    lower = source[below, q] + v * (source[below, right] - source[below, q])
                    value = upper + u * (lower - upper)
                    if value > best:
                        best = value
                        label = c
            out[i, j] = table[label]


@compiled()
def paint_regions(logits, plane, table, rows, columns, out):
    """Write the value of the last region with an interpolated logit above 0 into `out` (B, C), else table[0]."""
    regions = logits.shape[0]
    winner = _last_positive(logits, plane)
    for i in range(out.shape[0]):
        p = rows[0][i]
        u = rows[1][i]
        below = p + 1 if u > 0 else p
        for j in range(out.shape[1]):
            q = columns[0][j]
            v = columns[1][j]
            right = q + 1 if v > 0 else q
            label = winner[p, q]
            if winner[p, right] != label or winner[below, q] != label or winner[below, right] != label:
                label = 0
                for c in range(regions - 1, -1, -1):
                    source = logits[c, plane]
                    upper = source[p, q] + v * (source[p, right] - source[p, q])
                    lower = source[below, q] + v * (source[below, right] - source[below, q])
                    if upper + u * (lower - upper) > 0:
                        label = c + 1
                        break
            out[i, j] = table[label]


@compiled()
def _largest(logits, plane):
    height, width = logits.shape[2], logits.shape[3]
    winner = np.zeros((height, width), np.int32)
    best = np.empty(width, np.float32)
    for i in range(height):
        best[:] = logits[0, plane, i]
        here = winner[i]
        for c in range(1, logits.shape[0]):
            values = logits[c, plane, i]
            name = np.int32(c)  # as wide as the logits, or half as many fit a vector
            for j in range(width):
                value, largest = values[j], best[j]
                larger = value > largest
                here[j] = name if larger else here[j]
                best[j] = value if larger else largest
    return winner


@compiled()
def _last_positive(logits, plane):
    height, width = logits.shape[2], logits.shape[3]
    winner = np.zeros((height, width), np.int32)
    for i in range(height):
        here = winner[i]
        for c in range(logits.shape[0]):
            values = logits[c, plane, i]
            name = np.int32(c + 1)
            for j in range(width):
                here[j] = name if values[j] > 0 else here[j]
    return winner
