"""Simulated user clicks: RITM's next click for evaluation, random clicks with a decaying count for training.

A ground truth is an (H, W) int8 array: 1 object, 0 background, -1 ignored. A prediction is an (H, W) bool array.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rfmedsam2.errors import UsageError
from segment_anything_hq.prompts.click_kernels import (
    MISSED,
    WRONG,
    deeper_than,
    deepest,
    error_box,
    heights,
    overlap,
)
from segment_anything_hq.prompts.prompt import Click

IGNORE = -1
"""Ground-truth value of pixels that are ignored."""
MOST_CLICKS = 20
INNER = 1.7
"""A training click is deeper inside the error than the greatest depth divided by this (InterFormer)."""


def next_click(ground_truth: np.ndarray, predicted: np.ndarray, clicks: Sequence[Click] = ()) -> Click:
    """The click in the middle of the largest error by RITM's rule (its `Clicker`), equal to it pixel for pixel.

    Among false negatives and among false positives, without ignored pixels, find the pixel farthest from all non-errors
    (Euclidean distance; pixels outside the image are non-errors), excluding clicked pixels. The deeper of the two is
    chosen, the negative one if they are equally deep; among equally deep pixels, the first in row-major order. If no
    error remains except clicked pixels, the result is a negative click at the first pixel of the image, as in RITM.
    Distances are exact here; OpenCV's, which RITM uses, are exact except for the last bit, which depends on its version
    and may select another of equally deep pixels.

    Args:
        ground_truth: (H, W) int8: 1 object, 0 background, -1 ignored.
        predicted: (H, W) bool; all False before the first click.
        clicks: previous clicks.

    Raises:
        UsageError: shapes differ or a type is wrong.
    """
    ground_truth, predicted = _checked(ground_truth, predicted)
    clicked = np.array([(c.y, c.x) for c in clicks], np.int64).reshape(-1, 2)
    missed, wrong = (_deepest(ground_truth, predicted, kind, clicked) for kind in (MISSED, WRONG))
    positive = missed[0] > wrong[0]
    _, y, x = missed if positive else wrong
    return Click(x=int(x), y=int(y), positive=bool(positive))


def training_click(
    ground_truth: np.ndarray, predicted: np.ndarray, rng: np.random.Generator, *, inner: float = INNER
) -> Click | None:
    """A random click well inside the larger error, as in the training of RITM and InterFormer; None without errors.

    The larger error is chosen as in `next_click`. Any of its pixels whose depth is above the greatest depth divided by
    `inner` may be drawn.

    Args:
        ground_truth: (H, W) int8: 1 object, 0 background, -1 ignored.
        predicted: (H, W) bool.
        rng: source of randomness.
        inner: above 1; InterFormer uses 1.7, RITM 2.

    Raises:
        UsageError: shapes differ, a type is wrong, or `inner` is 1 or less.
    """
    if inner <= 1:
        raise UsageError("inner must be above 1", found=inner)
    ground_truth, predicted = _checked(ground_truth, predicted)
    none = np.zeros((0, 2), np.int64)
    missed, wrong = (_deepest(ground_truth, predicted, kind, none)[0] for kind in (MISSED, WRONG))
    kind, depth = (MISSED, missed) if missed > wrong else (WRONG, wrong)
    if depth == 0:
        return None
    box = error_box(ground_truth, predicted, kind)
    # the deepest pixel itself must remain a candidate, also at small depths
    limit = min(depth / inner**2, depth - 1)
    rows, columns = np.nonzero(deeper_than(heights(ground_truth, predicted, kind, box), limit))
    drawn = int(rng.integers(len(rows)))
    return Click(x=int(columns[drawn]) + box[2], y=int(rows[drawn]) + box[0], positive=kind == MISSED)


def training_clicks(
    ground_truths: Tensor, predicted: Tensor, rng: np.random.Generator, *, inner: float = INNER
) -> tuple[Tensor, Tensor]:
    """One training click for each of P objects.

    Args:
        ground_truths: (P, H, W) integers: 1 object, 0 background, -1 ignored.
        predicted: (P, H, W) bool (logits > 0), on any device.
        rng: source of randomness; used in the order of the objects.
        inner: see `training_click`.

    Returns:
        Points (P, 2) float32 of (x, y), pixel indices; labels (P,) int64: 1 positive, 0 negative, -1 (with the point 0,
        0) without errors. Both on the device of `predicted`.
    """
    if ground_truths.shape != predicted.shape or ground_truths.ndim != 3:
        found = f"{tuple(ground_truths.shape)} and {tuple(predicted.shape)}"
        raise UsageError("Ground truths and predictions have different shapes", expected="both (P, H, W)", found=found)
    references = ground_truths.to("cpu", torch.int8).numpy()
    masks = predicted.to("cpu", torch.bool).numpy()
    clicks = [training_click(t, p, rng, inner=inner) for t, p in zip(references, masks, strict=True)]
    points = [(0, 0) if c is None else (c.x, c.y) for c in clicks]
    labels = [-1 if c is None else int(c.positive) for c in clicks]
    device = predicted.device
    return (
        torch.tensor(points, dtype=torch.float32, device=device).view(-1, 2),
        torch.tensor(labels, dtype=torch.int64, device=device),
    )


def click_count_probabilities(gamma: float, max_clicks: int = MOST_CLICKS) -> np.ndarray:
    """(max_clicks,) probabilities of 1, 2 ... clicks: each is gamma times the one before (SAM-REF supplement, 1.3).

    Args:
        gamma: above 0 and below 1; the paper uses 0.6 for COCO + LVIS and 0.9 for HQSeg-44K.
        max_clicks: 1 or more.

    Raises:
        UsageError: an argument is outside its range.
    """
    if not 0 < gamma < 1:
        raise UsageError("gamma must be in (0, 1)", found=gamma)
    if max_clicks < 1:
        raise UsageError("max_clicks must be at least 1", found=max_clicks)
    weights = gamma ** np.arange(max_clicks, dtype=np.float64)
    return weights / weights.sum()


def draw_click_count(rng: np.random.Generator, *, gamma: float, max_clicks: int = MOST_CLICKS) -> int:
    """Draw the number of clicks of a training step, 1 to `max_clicks`; see `click_count_probabilities`."""
    return 1 + int(rng.choice(max_clicks, p=click_count_probabilities(gamma, max_clicks)))


def iou(ground_truth: np.ndarray, predicted: np.ndarray) -> float:
    """Intersection over union without ignored pixels; 1 if both are empty.

    Args:
        ground_truth: (H, W) int8: 1 object, 0 background, -1 ignored.
        predicted: (H, W) bool.

    Raises:
        UsageError: shapes differ or a type is wrong.
    """
    both, either = overlap(*_checked(ground_truth, predicted))
    return both / either if either else 1.0


def _checked(ground_truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Validate both arrays and convert them to the kernels' types."""
    if ground_truth.ndim != 2 or ground_truth.shape != predicted.shape:
        found = f"{ground_truth.shape} and {predicted.shape}"
        raise UsageError("Ground truth and prediction have different shapes", expected="both (H, W)", found=found)
    if predicted.dtype != np.bool_:
        raise UsageError(
            "Predicted mask must be bool",
            found=predicted.dtype,
            remedy="Compare probabilities with a threshold first",
        )
    if ground_truth.dtype not in (np.int8, np.bool_):
        raise UsageError(
            "Ground-truth mask has the wrong type",
            expected="int8 (1 object, 0 background, -1 ignored) or bool",
            found=ground_truth.dtype,
        )
    return np.ascontiguousarray(ground_truth, np.int8), np.ascontiguousarray(predicted)


def _deepest(ground_truth: np.ndarray, predicted: np.ndarray, kind: int, clicked: np.ndarray) -> tuple[int, int, int]:
    """Squared depth, row and column of the deepest error of a kind; zeros without errors."""
    box = error_box(ground_truth, predicted, kind)
    if box[1] == 0:
        return 0, 0, 0
    return deepest(heights(ground_truth, predicted, kind, box), box[0], box[2], clicked)
