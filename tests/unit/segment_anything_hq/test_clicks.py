"""Clicks: RITM's rule on cases worked out by hand (ties, borders, ignored regions), and random ones for training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import distance_transform_edt

from rfmedsam2.errors import UsageError
from segment_anything_hq.prompts.clicks import (
    Click,
    click_count_probabilities,
    draw_click_count,
    iou,
    next_click,
    training_click,
    training_clicks,
)


def drawn(*rows: str) -> np.ndarray:
    """A truth from a drawing: # object, . background, ? ignored."""
    return np.array([[{"#": 1, ".": 0, "?": -1}[c] for c in row] for row in rows], np.int8)


def nothing(ground_truth: np.ndarray) -> np.ndarray:
    return np.zeros(ground_truth.shape, bool)


def test_the_first_click_lies_in_the_middle_of_the_object() -> None:
    ground_truth = drawn(".......", ".#####.", ".#####.", ".#####.", ".#####.", ".#####.", ".......")
    assert next_click(ground_truth, nothing(ground_truth)) == Click(x=3, y=3, positive=True)


def test_of_equally_deep_pixels_the_first_by_rows_is_clicked() -> None:
    ground_truth = drawn("......", ".####.", ".####.", "......")
    # all eight pixels are one pixel away from the background
    assert next_click(ground_truth, nothing(ground_truth)) == Click(x=1, y=1, positive=True)


def test_two_equal_objects_are_clicked_from_the_top() -> None:
    ground_truth = drawn(".........", ".....###.", ".....###.", ".###.###.", ".###.....", ".###.....", ".........")
    assert next_click(ground_truth, nothing(ground_truth)) == Click(x=6, y=2, positive=True)


def test_equally_deep_errors_give_a_negative_click() -> None:
    ground_truth = drawn("#....", ".....")
    predicted = ground_truth[:, ::-1] == 1
    assert next_click(ground_truth, predicted) == Click(x=4, y=0, positive=False)


def test_a_deeper_missed_region_gives_a_positive_click() -> None:
    ground_truth = drawn("......", ".###..", ".###..", ".###..", "......")
    predicted = nothing(ground_truth)
    predicted[:, 5] = True
    assert next_click(ground_truth, predicted) == Click(x=2, y=2, positive=True)


def test_the_border_of_the_picture_is_outside() -> None:
    ground_truth = drawn("###", "###", "###")
    # without the padding no pixel would be nearer to the background than another
    assert next_click(ground_truth, nothing(ground_truth)) == Click(x=1, y=1, positive=True)


def test_distances_are_euclidean() -> None:
    # a plus: its center is sqrt(2) from the background, the square's pixels 1
    ground_truth = drawn("......", "..#...", ".###..", "..#.##", "....##", "......")
    assert next_click(ground_truth, nothing(ground_truth)) == Click(x=2, y=2, positive=True)


def test_ignored_pixels_are_no_error_and_not_clicked() -> None:
    ground_truth = drawn("#####", "#???#", "#???#", "#???#", "#####")
    predicted = nothing(ground_truth)
    assert next_click(ground_truth, predicted) == Click(x=0, y=0, positive=True)
    predicted[1:4, 1:4] = True
    assert next_click(ground_truth, predicted) == Click(x=0, y=0, positive=True)
    assert iou(ground_truth, predicted) == 0.0


def test_ignored_pixels_end_a_region_like_the_background() -> None:
    ground_truth = drawn("#######", "#######", "#######", "#####??", "#######")
    # (2, 2) is 3 from the left and 3 from the top; (3, 2) and (4, 2) are, too, but later; (5, 2) is 1 from what is
    # ignored
    assert next_click(ground_truth, nothing(ground_truth)) == Click(x=2, y=2, positive=True)


def test_a_clicked_pixel_is_not_clicked_again() -> None:
    ground_truth = drawn("...", ".#.", "...")
    first = next_click(ground_truth, nothing(ground_truth))
    assert first == Click(x=1, y=1, positive=True)
    # nothing is left: the first pixel of the picture, negative, as published
    assert next_click(ground_truth, nothing(ground_truth), [first]) == Click(x=0, y=0, positive=False)


def test_a_clicked_pixel_stays_part_of_its_error() -> None:
    ground_truth = drawn(".....", ".###.", ".###.", ".###.", ".....")
    first = next_click(ground_truth, nothing(ground_truth))
    assert first == Click(x=2, y=2, positive=True)
    # were the clicked pixel taken out of the region, its neighbors' depth would not change here, but order would:
    # all eight others are one pixel deep
    assert next_click(ground_truth, nothing(ground_truth), [first]) == Click(x=1, y=1, positive=True)


def test_a_right_prediction_gives_a_negative_click_at_the_first_pixel() -> None:
    ground_truth = drawn("##", "##")
    assert next_click(ground_truth, ground_truth == 1) == Click(x=0, y=0, positive=False)


def plain_next_click(ground_truth: np.ndarray, predicted: np.ndarray, clicks: list[Click]) -> Click:
    """RITM's rule, written down step by step with SciPy's distance transform."""
    free = np.ones(ground_truth.shape, bool)
    for click in clicks:
        free[click.y, click.x] = False
    errors = [(ground_truth == 1) & ~predicted, (ground_truth == 0) & predicted]
    depths = [np.asarray(distance_transform_edt(np.pad(e, 1)))[1:-1, 1:-1] * free for e in errors]
    positive = depths[0].max() > depths[1].max()
    depth = depths[0] if positive else depths[1]
    ys, xs = np.where(depth == depth.max())
    return Click(x=int(xs[0]), y=int(ys[0]), positive=bool(positive))


@given(st.data(), st.tuples(st.integers(1, 24), st.integers(1, 24)), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_clicks_equal_the_plain_rule(data: st.DataObject, shape: tuple[int, int], coarse: int) -> None:
    small = tuple(-(-n // coarse) for n in shape)
    ground_truth = data.draw(arrays(np.int8, small, elements=st.sampled_from([0, 0, 1, 1, -1])))
    predicted = data.draw(arrays(np.bool_, small))
    ground_truth, predicted = (
        a.repeat(coarse, 0).repeat(coarse, 1)[: shape[0], : shape[1]] for a in (ground_truth, predicted)
    )
    clicks: list[Click] = []
    for _ in range(3):
        expected = plain_next_click(ground_truth, predicted, clicks)
        assert next_click(ground_truth, predicted, clicks) == expected
        clicks.append(expected)


def test_arrays_may_lie_in_memory_by_columns() -> None:
    ground_truth = np.zeros((9, 12), np.int8)
    ground_truth[2:7, 3:10] = 1
    turned = np.asfortranarray(ground_truth)
    assert next_click(turned, nothing(ground_truth).T.copy().T) == next_click(ground_truth, nothing(ground_truth))


def test_iou_leaves_out_ignored_pixels() -> None:
    ground_truth = drawn("##..", "??..")
    predicted = np.array([[True, False, True, False], [True, True, False, False]])
    assert iou(ground_truth, predicted) == pytest.approx(1 / 3)
    assert iou(drawn(".."), np.zeros((1, 2), bool)) == 1.0


def test_training_clicks_lie_deep_inside_the_larger_error() -> None:
    ground_truth = np.zeros((40, 40), np.int8)
    ground_truth[5:36, 5:36] = 1
    predicted = np.zeros((40, 40), bool)
    predicted[0:3, 0:3] = True
    depth = np.asarray(distance_transform_edt(ground_truth))
    rng = np.random.default_rng(0)
    clicks = [training_click(ground_truth, predicted, rng) for _ in range(200)]
    assert all(c is not None and c.positive and depth[c.y, c.x] > depth.max() / 1.7 for c in clicks)
    # any of them, not only the middle
    assert len({(c.x, c.y) for c in clicks if c is not None}) > 50


def test_training_clicks_on_wrong_prediction_are_negative_and_none_where_all_is_right() -> None:
    ground_truth = drawn("#...", "....")
    rng = np.random.default_rng(0)
    assert training_click(ground_truth, np.array([[True, False, False, True], [False] * 4]), rng) == Click(
        x=3, y=0, positive=False
    )
    assert training_click(ground_truth, ground_truth == 1, rng) is None


def test_training_clicks_of_a_batch_are_padded() -> None:
    ground_truths = torch.tensor([[[0, 1, 0]], [[0, 0, 0]], [[1, 1, 1]]])
    predicted = torch.tensor([[[0, 0, 0]], [[0, 0, 1]], [[1, 1, 1]]]).bool()
    points, labels = training_clicks(ground_truths, predicted, np.random.default_rng(0))
    assert points.tolist() == [[1, 0], [2, 0], [0, 0]]
    assert labels.tolist() == [1, 0, -1]


def test_the_number_of_clicks_decays() -> None:
    probabilities = click_count_probabilities(0.6)
    assert len(probabilities) == 20
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[1:] / probabilities[:-1] == pytest.approx(0.6)
    rng = np.random.default_rng(0)
    counts = np.bincount([draw_click_count(rng, gamma=0.6, max_clicks=3) for _ in range(3000)])
    assert len(counts) == 4
    assert counts[1:] / 3000 == pytest.approx(click_count_probabilities(0.6, 3), abs=0.03)


@pytest.mark.parametrize("gamma", [0.0, 1.0, -1.0])
def test_clicks_that_do_not_decay_are_refused(gamma: float) -> None:
    with pytest.raises(UsageError, match="gamma must be"):
        click_count_probabilities(gamma)


def test_what_does_not_fit_gets_a_sentence() -> None:
    ground_truth = drawn("#.")
    with pytest.raises(UsageError, match="different shapes"):
        next_click(ground_truth, np.zeros((2, 2), bool))
    with pytest.raises(UsageError, match="threshold"):
        next_click(ground_truth, np.zeros((1, 2), np.float32))
    with pytest.raises(UsageError, match="int8"):
        iou(ground_truth.astype(np.float32), np.zeros((1, 2), bool))
    with pytest.raises(UsageError, match="inner must be above 1"):
        training_click(ground_truth, np.zeros((1, 2), bool), np.random.default_rng(0), inner=1.0)
