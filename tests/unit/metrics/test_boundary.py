"""Boundaries of masks: equal to the published erosions, at borders, edges of words and in empty masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_erosion

from rfmedsam2.errors import UsageError
from rfmedsam2.metrics.boundary import boundary_iou, boundary_width, mask_to_boundary


def eroded_boundary(mask: np.ndarray, dilation_ratio: float) -> np.ndarray:
    """The published rule: pad with zeros, erode d times by 3 x 3 ones, take that away."""
    times = max(1, round(dilation_ratio * np.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)))
    inner = np.asarray(binary_erosion(np.pad(mask, 1), np.ones((3, 3)), iterations=times), bool)[1:-1, 1:-1]
    return mask & ~inner


def test_a_boundary_known_by_hand() -> None:
    mask = np.zeros((10, 12), bool)
    mask[2:8, 3:9] = True
    expected = mask.copy()
    expected[3:7, 4:8] = False
    assert boundary_width(10, 12) == 1
    assert np.array_equal(mask_to_boundary(mask), expected)


def test_the_edge_of_the_picture_is_a_boundary() -> None:
    boundary = mask_to_boundary(np.ones((6, 6), bool))
    assert boundary.sum() == 20
    assert not boundary[1:5, 1:5].any()


@pytest.mark.parametrize("width", [1, 7, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.15, 0.6])
def test_boundaries_equal_the_published_erosions(width: int, ratio: float) -> None:
    rng = np.random.default_rng(width)
    for height in (1, 50, 130):
        coarse = rng.random((height // 16 + 1, width // 16 + 1)) > 0.3
        mask = coarse.repeat(16, 0).repeat(16, 1)[:height, :width]
        assert np.array_equal(mask_to_boundary(mask, ratio), eroded_boundary(mask, ratio))


@given(arrays(np.bool_, st.tuples(st.integers(1, 30), st.integers(1, 140))), st.floats(0, 0.2))
@settings(max_examples=50, deadline=None)
def test_boundaries_of_any_mask_equal_the_published_erosions(mask: np.ndarray, ratio: float) -> None:
    assert np.array_equal(mask_to_boundary(mask, ratio), eroded_boundary(mask, ratio))


def test_boundary_iou_is_that_of_the_boundaries() -> None:
    first, second = np.zeros((2, 40, 90), bool)
    first[4:30, 10:80], second[6:33, 12:85] = True, True
    a, b = (eroded_boundary(m, 0.02) for m in (first, second))
    assert boundary_iou(first, second) == (a & b).sum() / (a | b).sum()
    assert boundary_iou(first, first) == 1.0


def test_masks_that_are_both_empty_fit_and_one_does_not() -> None:
    empty, square = np.zeros((2, 20, 20), bool)
    square[5:9, 5:9] = True
    assert boundary_iou(empty, empty) == 1.0
    assert boundary_iou(empty, square) == 0.0


def test_ignored_pixels_count_for_nothing() -> None:
    ground_truth, predicted, ignored = np.zeros((3, 20, 20), bool)
    ground_truth[5:15, 5:15], predicted[5:15, 5:16] = True, True
    assert boundary_iou(ground_truth, predicted) < 1.0
    ignored[:, 14:17] = True
    assert boundary_iou(ground_truth, predicted, ignored=ignored) == 1.0


@pytest.mark.parametrize("width", [60, 64])
def test_masks_may_lie_in_memory_by_columns(width: int) -> None:
    mask = np.random.default_rng(0).random((40, width)) > 0.02
    turned = np.asfortranarray(mask)
    assert np.array_equal(mask_to_boundary(turned), mask_to_boundary(mask))
    assert boundary_iou(turned, mask[:, ::-1]) == boundary_iou(mask, mask[:, ::-1].copy())


def test_masks_need_not_be_bool() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 255
    assert np.array_equal(mask_to_boundary(mask), mask_to_boundary(mask > 0))


def test_masks_of_other_sizes_get_a_sentence() -> None:
    with pytest.raises(UsageError, match="differ in shape"):
        boundary_iou(np.zeros((3, 3), bool), np.zeros((3, 4), bool))
    with pytest.raises(UsageError, match="does not have two axes"):
        mask_to_boundary(np.zeros((3, 3, 3), bool))
