"""Cropping to non-zero and telling outside zeros from enclosed ones."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask, crop_to_nonzero

from rfmedsam2.transforms.crop import nonzero_box, outside_mask


def test_the_box_holds_all_channels():
    image = np.zeros((2, 10, 12, 14), np.int16)
    image[0, 3, 4, 5] = 1
    image[1, 7, 2, 9] = -1
    assert nonzero_box(image) == ((3, 8), (2, 5), (5, 10))


def test_an_empty_volume_is_not_cropped():
    assert nonzero_box(np.zeros((1, 4, 5, 6))) == ((0, 4), (0, 5), (0, 6))


def test_nothing_is_outside_when_the_surface_is_full():
    image = np.ones((1, 6, 6, 6), np.float32)
    image[0, 2:4, 2:4, 2:4] = 0
    assert outside_mask(image) is None


def test_an_enclosed_hole_is_inside_and_a_dent_is_outside():
    image = np.ones((1, 7, 7, 7), np.float32)
    image[0, 3, 3, 3] = 0
    image[0, 0:2, 5, 5] = 0
    expected = np.zeros((7, 7, 7), bool)
    expected[0:2, 5, 5] = True
    np.testing.assert_array_equal(outside_mask(image), expected)


def test_zeros_that_touch_by_an_edge_only_stay_inside():
    image = np.ones((1, 5, 5, 5), np.float32)
    image[0, 0, 2, 2] = image[0, 1, 3, 2] = 0
    found = outside_mask(image)
    assert found is not None
    assert found[0, 2, 2]
    assert not found[1, 3, 2]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(9, 17, 13), (1, 17, 13), (40, 45, 50)])
def test_box_and_outside_are_nnunets(seed, shape):
    rng = np.random.default_rng(seed)
    image = (rng.random((2, *shape)) > 0.55 + 0.05 * seed).astype(np.int16)
    image[:, : shape[0] // 4] = 0
    image[..., -2:] = 0
    _, seg, box = crop_to_nonzero(image.copy(), None)
    ours = nonzero_box(image)
    assert [list(b) for b in ours] == [list(b) for b in box]
    cropped = image[(slice(None), *(slice(*b) for b in ours))]
    found = outside_mask(cropped)
    np.testing.assert_array_equal(np.zeros(cropped.shape[1:], bool) if found is None else found, seg[0] < 0)


def test_a_large_outside_is_flooded_whole():
    image = np.zeros((1, 60, 80, 80), np.uint8)
    image[0, 30, 40, 40] = 1
    image[0, 0, 0, 0] = image[0, -1, -1, -1] = 1
    np.testing.assert_array_equal(outside_mask(image), ~create_nonzero_mask(image))
