"""Compiled loops of the metrics: joint histogram, surface elements, exact Euclidean distances."""

from __future__ import annotations

import numpy as np

from rfmedsam2.system.numba_cache import compiled

_kernel = compiled(error_model="numpy")


@_kernel
def joint_histogram(
    reference: np.ndarray,
    prediction: np.ndarray,
    table: np.ndarray,
    ignore: int,
    counts: np.ndarray,
    boxes: np.ndarray,
) -> None:
    """Fill the joint histogram `counts` (indexed by `table`) and the bounding box of each value over both maps."""
    depth, height, width = reference.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                r = table[reference[z, y, x]]
                p = table[prediction[z, y, x]]
                counts[r, p] += 1
                if (r == 0 and p == 0) or r == ignore:
                    continue
                for k in (r, p):
                    box = boxes[k]
                    box[0], box[1], box[2] = min(box[0], z), min(box[1], y), min(box[2], x)
                    box[3], box[4], box[5] = max(box[3], z), max(box[4], y), max(box[5], x)


@_kernel
def surface_codes(
    labels: np.ndarray,
    reference: np.ndarray,
    member: np.ndarray,
    kept: np.ndarray,
    box: np.ndarray,
    codes: np.ndarray,
) -> None:
    """Code of every voxel corner in the box: which of its eight voxels are inside, highest bit at lowest z, y, x."""
    z0, y0, x0 = box[0], box[1], box[2]
    depth, height, width = codes.shape[0] - 1, codes.shape[1] - 1, codes.shape[2] - 1
    for k in range(depth + 1):
        for j in range(height + 1):
            before = 0
            for i in range(width):
                bits = 0
                x = x0 + i
                for dz in range(2):
                    for dy in range(2):
                        if 0 <= k + dz - 1 < depth and 0 <= j + dy - 1 < height:
                            z, y = z0 + k + dz - 1, y0 + j + dy - 1
                            inside = member[labels[z, y, x]] & kept[reference[z, y, x]]
                            bits |= inside << (6 - 4 * dz - 2 * dy)
                codes[k, j, i] = (before << 1) | bits
                before = bits
            codes[k, j, width] = before << 1


@_kernel
def distances_at(
    codes: np.ndarray, points: np.ndarray, spacing: np.ndarray, near_x: np.ndarray, near_y: np.ndarray
) -> np.ndarray:
    """Distance (mm) from corners, given by flat index, to the nearest surface corner of `codes`.

    Exact separable transform (Felzenszwalb and Huttenlocher 2012): the nearest surface corner in each row, then in
    each slice by the lower envelope of parabolas; along z only at the given points, outwards until no slice can be
    nearer. Distances are summed from index differences in the order z, y, x, so passes do not accumulate rounding.
    """
    depth, height, width = codes.shape
    sz, sy, sx = spacing[0], spacing[1], spacing[2]
    _nearest_in_rows(codes, near_x)
    _nearest_in_slices(near_x, sy, sx, near_y)
    result = np.empty(len(points), np.float64)
    for n in range(len(points)):
        z, rest = divmod(points[n], height * width)
        y, x = divmod(rest, width)
        best = np.inf
        for step in range(depth):
            along_z = (step * sz) * (step * sz)
            if along_z >= best:
                break
            for other in (z - step, z + step):
                if other < 0 or other >= depth or near_y[other, y, x] < 0:
                    continue
                row = near_y[other, y, x]
                along_y = (row - y) * sy
                along_x = (near_x[other, row, x] - x) * sx
                best = min(best, (along_z + along_y * along_y) + along_x * along_x)
        result[n] = np.sqrt(best)
    return result


@_kernel
def _nearest_in_rows(codes: np.ndarray, near_x: np.ndarray) -> None:
    """Index x of the nearest surface corner in the same row, -1 in rows without."""
    depth, height, width = codes.shape
    for z in range(depth):
        for y in range(height):
            last = -1
            for x in range(width):
                if codes[z, y, x] != 0 and codes[z, y, x] != 255:
                    last = x
                near_x[z, y, x] = last
            following = -1
            for x in range(width - 1, -1, -1):
                before = near_x[z, y, x]
                if before == x:
                    following = x
                elif following >= 0 and (before < 0 or following - x < x - before):
                    near_x[z, y, x] = following


@_kernel
def _nearest_in_slices(near_x: np.ndarray, sy: float, sx: float, near_y: np.ndarray) -> None:
    """Index y of the row that holds the nearest surface corner of the same slice, -1 in slices without."""
    depth, height, width = near_x.shape
    apex = np.empty(height, np.int64)
    start = np.empty(height, np.float64)
    for z in range(depth):
        for x in range(width):
            used = 0
            for y in range(height):
                if near_x[z, y, x] < 0:
                    continue
                own = (near_x[z, y, x] - x) * sx
                crossing = -np.inf
                while used > 0:
                    v = apex[used - 1]
                    other = (near_x[z, v, x] - x) * sx
                    gain = (own * own - other * other) / (sy * sy)
                    crossing = (gain + (y * y - v * v)) / (2.0 * (y - v))
                    if crossing > start[used - 1]:
                        break
                    used -= 1
                    crossing = -np.inf
                apex[used], start[used] = y, crossing
                used += 1
            at = 0
            for y in range(height):
                while at + 1 < used and start[at + 1] < y:
                    at += 1
                near_y[z, y, x] = apex[at] if used else -1
