"""Compiled inner loops of resampling: cubic splines, linear interpolation and label votes.

All kernels work on contiguous arrays, release the GIL and are single-threaded, so that callers can run them in several
threads. Positions and weights come from `rfmedsam2.transforms.resample`.

The cubic prefilter is the recursive one of Unser, "Splines: a perfect fit for signal and image processing" (1999).
Beyond both ends the signal continues with its last value to infinity; the sums over that constant part have closed
forms (below), so no padding has to be filtered. The four taps reach at most two coefficients beyond each end.
"""

from __future__ import annotations

import numpy as np

from rfmedsam2.system.numba_cache import compiled

POLE = np.float32(np.sqrt(3.0) - 2.0)
GAIN = np.float32(6.0)
MARGIN = 2
# sums of the constant continuation: causal start and limit, and the two parts of the first anticausal value
_STEADY = np.float32(GAIN / (1.0 - POLE))
_LIMIT = np.float32(-POLE / (1.0 - POLE))
_DECAY = np.float32(-POLE / (1.0 - float(POLE) * float(POLE)))

# everything but "nnan" and "ninf": bad input must not become undefined behavior
_FAST = {"contract", "reassoc", "nsz", "arcp"}


@compiled(fastmath=_FAST)
def cubic_rows(source, target, start, weight, low, high):  # noqa: D417
    """Resample along axis 1: `source` (n, m) float32 -> `target` (n, k), values clipped to [low, high].

    Args:
        start: (k,) int32, index of the first of four coefficients, counted from `MARGIN` before the signal.
        weight: (k, 4) float32.
    """
    rows, width = source.shape
    line = np.empty(width + 2 * MARGIN, np.float32)
    for i in range(rows):
        previous = source[i, 0] * _STEADY
        before = previous
        for j in range(width):
            previous = GAIN * source[i, j] + POLE * previous
            line[MARGIN + j] = previous
        limit = source[i, width - 1] * _STEADY
        excess = (previous - limit) * _DECAY
        following = limit * _LIMIT + excess
        line[MARGIN + width] = limit * _LIMIT + POLE * excess
        line[MARGIN + width + 1] = limit * _LIMIT + POLE * POLE * excess
        line[MARGIN + width - 1] = following
        for j in range(MARGIN + width - 2, MARGIN - 1, -1):
            following = POLE * (following - line[j])
            line[j] = following
        line[1] = POLE * (line[2] - before)
        line[0] = POLE * (line[1] - before)
        for j in range(target.shape[1]):
            q = start[j]
            value = (
                weight[j, 0] * line[q]
                + weight[j, 1] * line[q + 1]
                + weight[j, 2] * line[q + 2]
                + weight[j, 3] * line[q + 3]
            )
            target[i, j] = min(max(value, low), high)


@compiled(fastmath=_FAST)
def cubic_columns(source, target, start, weight, low, high):
    """Resample along axis 0: `source` (n, m) float32 -> `target` (k, m); arguments as for `cubic_rows`."""
    height, width = source.shape
    lines = np.empty((height + 2 * MARGIN, width), np.float32)
    first = lines[MARGIN]
    for j in range(width):
        first[j] = GAIN * source[0, j] + POLE * (source[0, j] * _STEADY)
    for i in range(1, height):
        above, here = lines[MARGIN + i - 1], lines[MARGIN + i]
        for j in range(width):
            here[j] = GAIN * source[i, j] + POLE * above[j]
    last, end = MARGIN + height - 1, source[height - 1]
    for j in range(width):
        limit = end[j] * _STEADY
        excess = (lines[last, j] - limit) * _DECAY
        lines[last, j] = limit * _LIMIT + excess
        lines[last + 1, j] = limit * _LIMIT + POLE * excess
        lines[last + 2, j] = limit * _LIMIT + POLE * POLE * excess
    for i in range(last - 1, MARGIN - 1, -1):
        below, here = lines[i + 1], lines[i]
        for j in range(width):
            here[j] = POLE * (below[j] - here[j])
    for j in range(width):
        before = source[0, j] * _STEADY
        lines[1, j] = POLE * (lines[2, j] - before)
        lines[0, j] = POLE * (lines[1, j] - before)
    for i in range(target.shape[0]):
        q = start[i]
        a, b, c, d = weight[i, 0], weight[i, 1], weight[i, 2], weight[i, 3]
        p0, p1, p2, p3, out = lines[q], lines[q + 1], lines[q + 2], lines[q + 3], target[i]
        for j in range(width):
            out[j] = min(max(a * p0[j] + b * p1[j] + c * p2[j] + d * p3[j], low), high)


@compiled(fastmath=_FAST)
def linear_rows(source, target, index, weight):
    """Blend neighbors along axis 1: target[:, j] = (1 - w) source[:, i] + w source[:, i + 1], i = index[j]."""
    last = source.shape[1] - 1
    for i in range(source.shape[0]):
        for j in range(target.shape[1]):
            q = index[j]
            a = source[i, q]
            target[i, j] = a + weight[j] * (source[i, min(q + 1, last)] - a)


@compiled(fastmath=_FAST)
def linear_columns(source, target, index, weight):
    """Blend neighbors along axis 0; arguments as for `linear_rows`."""
    last = source.shape[0] - 1
    for i in range(target.shape[0]):
        a, b, w, out = source[index[i]], source[min(index[i] + 1, last)], weight[i], target[i]
        for j in range(target.shape[1]):
            out[j] = a[j] + w * (b[j] - a[j])


@compiled(inline="always")
def _elect(labels, votes, count, nearest):
    """Find the label with the most votes; a tie goes to `nearest` if it is among the tied, else to the smallest label.

    Votes for a label are added in the order of its voters: ties are decided by exact equality, so the order of
    summation is part of the definition.
    """
    best, top, nearest_on_top = np.int64(0), -1.0, False
    for a in range(count):
        label, total = labels[a], 0.0
        for b in range(count):
            if labels[b] == label:
                total += votes[b]
        if total > top:
            best, top, nearest_on_top = np.int64(label), total, label == nearest
        elif total == top:
            best = min(best, np.int64(label))
            nearest_on_top = nearest_on_top or label == nearest
    return np.int64(nearest) if nearest_on_top else best


@compiled()
def vote_plane(source, target, taps_y, taps_x, nearest_y, nearest_x):
    """Label map (h, w) -> (k, l): each voxel takes the label with the largest bilinear share of its 4 neighbors.

    `taps_y` is a pair of index (k,) int32 and the two weights (k, 2) float64, `taps_x` the same along axis 1;
    `nearest_y` (k,) and `nearest_x` (l,) are the nearest source rows and columns, int32.
    """
    index_y, weight_y = taps_y
    index_x, weight_x = taps_x
    bottom, right = source.shape[0] - 1, source.shape[1] - 1
    labels, votes = np.empty(4, np.int64), np.empty(4, np.float64)
    for i in range(target.shape[0]):
        upper, lower = source[index_y[i]], source[min(index_y[i] + 1, bottom)]
        nearest = source[nearest_y[i]]
        for j in range(target.shape[1]):
            q = index_x[j]
            r = min(q + 1, right)
            label = upper[q]
            if label == upper[r] and label == lower[q] and label == lower[r]:
                target[i, j] = label
                continue
            labels[0], labels[1], labels[2], labels[3] = label, upper[r], lower[q], lower[r]
            votes[0], votes[1] = weight_y[i, 0] * weight_x[j, 0], weight_y[i, 0] * weight_x[j, 1]
            votes[2], votes[3] = weight_y[i, 1] * weight_x[j, 0], weight_y[i, 1] * weight_x[j, 1]
            target[i, j] = _elect(labels, votes, 4, nearest[nearest_x[j]])


@compiled()
def vote_between(planes, target, weight_z, taps_y, taps_x, nearest):
    """One output plane of a trilinear vote: the 8 neighbors lie in two source planes.

    `planes` are (near, far), each (h, w), with the two weights `weight_z` float64; taps as in `vote_plane`; `nearest`
    is (the nearest source plane (h, w), nearest_y, nearest_x).
    """
    front, back = planes
    index_y, weight_y = taps_y
    index_x, weight_x = taps_x
    plane, nearest_y, nearest_x = nearest
    bottom, right = front.shape[0] - 1, front.shape[1] - 1
    labels, votes = np.empty(8, np.int64), np.empty(8, np.float64)
    for i in range(target.shape[0]):
        p = index_y[i]
        s = min(p + 1, bottom)
        for j in range(target.shape[1]):
            q = index_x[j]
            r = min(q + 1, right)
            labels[0], labels[1], labels[2], labels[3] = front[p, q], front[p, r], front[s, q], front[s, r]
            labels[4], labels[5], labels[6], labels[7] = back[p, q], back[p, r], back[s, q], back[s, r]
            same = True
            for k in range(1, 8):
                same = same and labels[k] == labels[0]
            if same:
                target[i, j] = labels[0]
                continue
            for k in range(8):
                votes[k] = (weight_z[k >> 2] * weight_y[i, (k >> 1) & 1]) * weight_x[j, k & 1]
            target[i, j] = _elect(labels, votes, 8, plane[nearest_y[i], nearest_x[j]])
