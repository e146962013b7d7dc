"""Tiles for any image, patch and step: they cover it, stay inside it, and are not too far apart."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfmedsam2.errors import PlanError
from rfmedsam2.inference.sliding_window import LEAST_STRIDE, gaussian_weights, tile_starts


@given(patch=st.integers(1, 300), extra=st.integers(0, 700), step=st.floats(0.05, 1.0))
def test_tiles_cover_the_image_without_leaving_it(patch: int, extra: int, step: float) -> None:
    size = patch + extra
    if patch * step < LEAST_STRIDE:
        with pytest.raises(PlanError, match="step size is out of range"):
            tile_starts((size,), (patch,), step)
        return
    (starts,) = tile_starts((size,), (patch,), step)
    assert starts[0] == 0
    assert starts[-1] == size - patch
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(0 <= gap <= patch for gap in gaps)
    # rounding may add one voxel to the step asked for
    assert all(gap <= patch * step + 1 for gap in gaps)


@given(shape=st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_weights_are_positive_and_at_most_one(shape: list[int]) -> None:
    weights = gaussian_weights(shape)
    assert weights.shape == tuple(shape)
    assert weights.min() > 0
    assert weights.max() == 1
