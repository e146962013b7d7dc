"""Compiled loops of click simulation: find errors of a prediction, and the pixels farthest inside them.

Distances are squared integers, so that ties are the same on every machine.
"""

from __future__ import annotations

import numpy as np

from rfmedsam2.system.numba_cache import compiled

MISSED, WRONG = 0, 1
"""Kinds of error: false negative (object that was not predicted), false positive (prediction off the object)."""


_kernel = compiled(error_model="numpy")


@_kernel
def overlap(ground_truth: np.ndarray, predicted: np.ndarray) -> tuple[int, int]:
    """Pixels of intersection and union; ground truth (H, W) int8 (1 object, -1 ignored), predicted (H, W) bool."""
    height, width = ground_truth.shape
    both, either = 0, 0
    for y in range(height):
        row_both, row_either = np.uint32(0), np.uint32(0)
        for x in range(width):
            inside, guessed, kept = ground_truth[y, x] == 1, predicted[y, x], ground_truth[y, x] != -1
            row_both += np.uint32(inside & guessed)
            row_either += np.uint32((inside | guessed) & kept)
        both += row_both
        either += row_either
    return both, either


@_kernel
def is_error(ground_truth: int, predicted: bool, kind: int) -> bool:
    """Whether a pixel is an error of this kind."""
    if kind == 0:
        return (ground_truth == 1) & (not predicted)
    return (ground_truth != 1) & (ground_truth != -1) & predicted


@_kernel
def error_box(ground_truth: np.ndarray, predicted: np.ndarray, kind: int) -> tuple[int, int, int, int]:
    """Bounding box of all errors of a kind: first row, end row, first column, end column; all 0 without errors."""
    height, width = ground_truth.shape
    top, bottom, left, right = height, 0, width, 0
    for y in range(height):
        count = np.uint32(0)
        for x in range(width):
            count += np.uint32(is_error(ground_truth[y, x], predicted[y, x], kind))
        if count == 0:
            continue
        top, bottom = min(top, y), y + 1
        x = 0
        while x < left and not is_error(ground_truth[y, x], predicted[y, x], kind):
            x += 1
        left = min(left, x)
        x = width
        while x > right and not is_error(ground_truth[y, x - 1], predicted[y, x - 1], kind):
            x -= 1
        right = max(right, x)
    if bottom == 0:
        return 0, 0, 0, 0
    return top, bottom, left, right


@_kernel
def heights(ground_truth: np.ndarray, predicted: np.ndarray, kind: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """(rows, columns) int32 in the box: distance in pixels to the nearest non-error in the same column, 0 on those.

    Pixels outside the box, and outside the image, count as non-errors.
    """
    top, bottom, left, right = box
    rows, columns = bottom - top, right - left
    up = np.empty((rows, columns), np.int32)
    for y in range(rows):
        for x in range(columns):
            before = up[y - 1, x] if y > 0 else np.int32(0)
            wrong = is_error(ground_truth[top + y, left + x], predicted[top + y, left + x], kind)
            up[y, x] = (before + 1) * np.int32(wrong)
    for x in range(columns):
        up[rows - 1, x] = min(up[rows - 1, x], 1)
    for y in range(rows - 2, -1, -1):
        for x in range(columns):
            up[y, x] = min(up[y, x], up[y + 1, x] + 1)
    return up


@_kernel
def depth_above(up: np.ndarray, y: int, x: int, floor: int) -> int:
    """Squared distance from a pixel to the nearest non-error; exact only if it is above `floor`.

    The search goes outwards along the row and stops as soon as the distance cannot exceed `floor`.
    """
    columns = up.shape[1]
    found = np.int64(up[y, x]) * up[y, x]
    away = 1
    while away * away < found and found > floor:
        left = np.int64(up[y, x - away]) if x - away >= 0 else np.int64(0)
        right = np.int64(up[y, x + away]) if x + away < columns else np.int64(0)
        nearer = min(left, right)
        found = min(found, nearer * nearer + away * away)
        away += 1
    return found


@_kernel
def deepest(up: np.ndarray, top: int, left: int, clicked: np.ndarray) -> tuple[int, int, int]:
    """Largest squared depth of a pixel that was not clicked, and the first such pixel (row, column) in row-major order.

    Args:
        up: (rows, columns) from `heights`.
        top: first row of `up` in the image.
        left: first column of `up` in the image.
        clicked: (n, 2) int64 rows and columns of clicked pixels in the image.
    """
    rows, columns = up.shape
    # a coarse grid gives an initial depth, so that most other pixels can be skipped
    start = 0
    for y in range(0, rows, 4):
        for x in range(0, columns, 4):
            if np.int64(up[y, x]) * up[y, x] > start and is_free(top + y, left + x, clicked):
                start = max(start, depth_above(up, y, x, start))
    best, best_y, best_x = max(start - 1, 0), 0, 0
    for y in range(rows):
        highest = np.int32(0)
        for x in range(columns):
            highest = max(highest, up[y, x])
        if np.int64(highest) * highest <= best:
            continue
        for x in range(columns):
            if np.int64(up[y, x]) * up[y, x] <= best:
                continue
            depth = depth_above(up, y, x, best)
            if depth > best and is_free(top + y, left + x, clicked):
                best, best_y, best_x = depth, top + y, left + x
    return best, best_y, best_x


@_kernel
def is_free(y: int, x: int, clicked: np.ndarray) -> bool:
    """Whether a pixel has not been clicked; `clicked` is (n, 2), rows and columns."""
    free = True
    for click in clicked:
        free &= not ((click[0] == y) & (click[1] == x))
    return free


@_kernel
def deeper_than(up: np.ndarray, limit: float) -> np.ndarray:
    """(rows, columns) bool: whether a pixel's squared depth is above `limit`."""
    rows, columns = up.shape
    floor = int(np.floor(limit))
    deep = np.zeros((rows, columns), np.bool_)
    for y in range(rows):
        for x in range(columns):
            if np.int64(up[y, x]) * up[y, x] > floor:
                deep[y, x] = depth_above(up, y, x, floor) > floor
    return deep
