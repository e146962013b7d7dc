"""What holds for metrics of any two masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfmedsam2.metrics.volumes import case_metrics, surface_distances
from rfmedsam2.records.dataset import LabelSet

pytestmark = pytest.mark.slow

LABELS = LabelSet(names={"background": 0, "a": 1, "b": 2})
SPACINGS = st.tuples(*(st.sampled_from([0.5, 0.7123, 1.0, 2.0, 3.3]) for _ in range(3)))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(*(st.integers(1, 7) for _ in range(3))))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    filled = draw(st.sampled_from([0.05, 0.3, 0.8]))
    first, second = (random.integers(1, 3, shape) * (random.random(shape) < filled) for _ in range(2))
    return first.astype(np.uint8), second.astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(pairs(), SPACINGS)
def test_swapping_masks_changes_only_the_sign_of_the_volume_error(pair, spacing) -> None:
    forward, backward = (case_metrics(*p, LABELS, spacing) for p in (pair, pair[::-1]))
    for name, there in forward.items():
        back = backward[name]
        assert (there.dsc, there.iou, there.hd95_mm) == (back.dsc, back.iou, back.hd95_mm)
        assert there.nsd == pytest.approx(back.nsd)
        assert there.volume_error_ml == pytest.approx(-back.volume_error_ml)


@settings(max_examples=60, deadline=None)
@given(pairs(), SPACINGS, st.permutations(range(3)))
def test_turning_both_masks_changes_nothing_but_triangles(pair, spacing, order) -> None:
    turned = [np.transpose(a, order) for a in pair]
    before = case_metrics(*pair, LABELS, spacing)
    after = case_metrics(*turned, LABELS, tuple(spacing[i] for i in order))
    for name, score in before.items():
        assert (score.dsc, score.iou) == (after[name].dsc, after[name].iou)
        # areas of saddle-like neighborhoods depend on how they are cut into triangles, so NSD is not compared


@settings(max_examples=60, deadline=None)
@given(pairs(), SPACINGS)
def test_a_mask_equals_itself(pair, spacing) -> None:
    for score in case_metrics(pair[0], pair[0], LABELS, spacing).values():
        assert (score.dsc, score.iou, score.nsd, score.hd95_mm) in {(1.0, 1.0, 1.0, 0.0), (None, None, None, None)}
        assert score.volume_error_ml == 0


@settings(max_examples=60, deadline=None)
@given(pairs(), SPACINGS)
def test_scores_stay_in_range_and_iou_follows_from_dsc(pair, spacing) -> None:
    for score in case_metrics(*pair, LABELS, spacing).values():
        if score.dsc is None:
            continue
        assert score.nsd is not None
        assert score.iou == pytest.approx(score.dsc / (2 - score.dsc))
        assert 0 <= score.nsd <= 1 + 1e-12
        assert score.hd95_mm is None or 0 <= score.hd95_mm <= np.linalg.norm(np.multiply(pair[0].shape, spacing))


@settings(max_examples=60, deadline=None)
@given(pairs(), SPACINGS, st.tuples(*(st.integers(0, 3) for _ in range(6))))
def test_background_around_changes_nothing(pair, spacing, margin) -> None:
    wider = [np.pad(a, [margin[:2], margin[2:4], margin[4:]]) for a in pair]
    assert case_metrics(*wider, LABELS, spacing) == case_metrics(*pair, LABELS, spacing)


@settings(max_examples=60, deadline=None)
@given(pairs(), SPACINGS)
def test_distances_equal_those_of_all_pairs(pair, spacing) -> None:
    reference, prediction = (a == 1 for a in pair)
    found = surface_distances(reference, prediction, spacing)
    corners = [_corners(mask) * np.asarray(spacing) for mask in (reference, prediction)]
    if not all(len(c) for c in corners):
        return
    between = np.linalg.norm(corners[0][:, None] - corners[1][None], axis=-1)
    assert np.sort(found.reference_to_prediction) == pytest.approx(np.sort(between.min(axis=1)))
    assert np.sort(found.prediction_to_reference) == pytest.approx(np.sort(between.min(axis=0)))


def _corners(mask: np.ndarray) -> np.ndarray:
    """Indices of corners whose eight voxels are neither all inside nor all outside."""
    padded = np.pad(mask, 1).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2, 2, 2)).sum(axis=(-3, -2, -1))
    return np.argwhere((windows > 0) & (windows < 8))
