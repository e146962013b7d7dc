"""Properties of the synthetic abdomen that hold for every seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfmedsam2.pipeline.datasets.phantom import phantom_case

pytestmark = pytest.mark.slow


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), modality=st.sampled_from(["ct", "mr"]))
def test_every_full_size_case_has_all_thirteen_organs(seed: int, modality: str) -> None:
    case = phantom_case((40, 96, 96), seed=seed, modality=modality)
    counts = np.bincount(case.labels.ravel(), minlength=14)
    assert counts.size == 14
    assert counts.min() >= 10


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(8, 40), st.integers(16, 80), st.integers(16, 80)),
    spacing=st.floats(0.5, 5),
)
def test_any_shape_and_spacing_is_kept_within_a_tenth(seed: int, shape: tuple[int, int, int], spacing: float) -> None:
    case = phantom_case(shape, spacing_mm=((spacing, spacing), (0.7, 0.9)), seed=seed)
    assert case.image.shape == case.labels.shape == case.grid.shape_zyx
    assert all(0.9 * wanted <= n <= wanted for n, wanted in zip(case.image.shape, shape, strict=True))
    assert abs(case.grid.spacing_zyx_mm[0] - spacing) < 1e-3
    assert 0.7 <= case.grid.spacing_zyx_mm[2] <= 0.9
    assert case.labels.max() <= 13


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_organs_lie_in_the_body(seed: int) -> None:
    case = phantom_case(seed=seed)
    border = np.ones(case.labels.shape, bool)
    border[:, 4:-4, 4:-4] = False
    assert not case.labels[border].any()
    for solid in (1, 2, 3, 6):
        assert np.median(case.image[case.labels == solid]) > 0
