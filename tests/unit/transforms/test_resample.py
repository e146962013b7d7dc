"""Resampling: what can be known without the reference."""

from __future__ import annotations

import numpy as np
import pytest

from rfmedsam2.errors import UsageError
from rfmedsam2.transforms.resample import (
    linear_taps,
    nearest_index,
    planned_shape,
    resample_image,
    resample_label,
    separate_axis,
)


def test_doubling_a_ramp_by_hand():
    index, weight = linear_taps(3, 6)
    assert (index.dtype, weight.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(index, [0, 0, 0, 1, 1, 2])
    np.testing.assert_allclose(weight, [0, 0.25, 0.75, 0.25, 0.75, 0], atol=1e-7)
    np.testing.assert_array_equal(nearest_index(3, 6), [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 5), (7, 3), (5, 5), (512, 579), (100, 1)])
def test_taps_stay_inside_the_source(n_in, n_out):
    index, weight = linear_taps(n_in, n_out)
    assert index.min() >= 0
    assert index.max() <= n_in - 1
    assert weight.min() >= 0
    assert weight.max() <= 1
    assert np.all(np.diff(nearest_index(n_in, n_out)) >= 0)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("separate", [None, 0, 1, 2])
def test_a_constant_stays_constant(order, separate):
    image = np.full((1, 5, 6, 7), -3.25, np.float32)
    out = resample_image(image, (8, 3, 11), order=order, separate=separate)
    np.testing.assert_allclose(out, -3.25, atol=1e-5)


def test_cubic_stays_in_the_range_of_the_source():
    image = (np.random.default_rng(0).random((1, 8, 20, 20)) > 0.5).astype(np.float32)
    out = resample_image(image, (13, 33, 27))
    assert out.min() >= 0
    assert out.max() <= 1


def test_an_equal_shape_is_given_back_untouched():
    image, label = np.zeros((1, 3, 4, 5), np.float32), np.zeros((3, 4, 5), np.int16)
    assert resample_image(image, (3, 4, 5)) is image
    assert resample_label(label, (3, 4, 5)) is label


def test_sources_need_not_be_contiguous():
    image = np.random.default_rng(0).normal(size=(2, 12, 10, 9)).astype(np.float32)
    turned = np.ascontiguousarray(image.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1)
    np.testing.assert_array_equal(resample_image(image, (7, 15, 9)), resample_image(turned, (7, 15, 9)))
    label = (image[0] > 0).astype(np.uint8)
    turned = np.asfortranarray(label)
    np.testing.assert_array_equal(resample_label(label, (7, 15, 9)), resample_label(turned, (7, 15, 9)))


def test_no_label_arises_that_was_not_there():
    label = np.random.default_rng(0).choice(np.array([0, 3, 11], np.int16), (9, 9, 9))
    for separate in (None, 0):
        assert set(np.unique(resample_label(label, (14, 5, 20), separate=separate))) <= {0, 3, 11}


def test_a_threefold_tie_away_from_its_nearest_voxel_goes_to_the_smallest_label():
    # at the center of these eight voxels 1 and 2 have 3/8 each, 3 has 2/8 and owns the nearest voxel
    label = np.array([[[3, 1], [1, 1]], [[2, 2], [2, 3]]], np.int16)
    assert resample_label(label, (1, 1, 1)).item() == 1


def test_shapes_round_halves_to_even_and_keep_one_voxel():
    assert planned_shape((5, 7, 3), (1, 1, 1), (2, 2, 10)) == (2, 4, 1)


def test_two_coarse_axes_are_resampled_together():
    assert separate_axis((0.2, 1, 1), (1, 1, 1)) is None
    assert separate_axis((1, 1, 5), (1, 1, 1)) == 2
    assert separate_axis((1, 1, 1), (1, 5, 1)) == 1
    assert separate_axis((3, 1, 1), (3, 1, 1)) is None
    assert separate_axis((3, 1, 1), (3, 1, 1), 2) == 0


def test_unknown_orders_are_refused():
    with pytest.raises(UsageError, match="order"):
        resample_image(np.zeros((1, 2, 2, 2), np.float32), (3, 3, 3), order=2)
    with pytest.raises(UsageError, match="order"):
        resample_label(np.zeros((2, 2, 2), np.int16), (3, 3, 3), order=3)
