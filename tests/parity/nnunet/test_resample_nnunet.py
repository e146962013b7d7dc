"""Resampling against nnU-Net's own function."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import (
    compute_new_shape,
    determine_do_sep_z_and_axis,
    resample_data_or_seg,
)
from scipy.ndimage import gaussian_filter

from rfmedsam2.transforms.resample import planned_shape, resample_image, resample_label, separate_axis

SHAPES = [
    ((9, 31, 26), (9, 20, 33)),
    ((9, 31, 26), (14, 40, 26)),
    ((12, 17, 30), (7, 17, 30)),
    ((12, 18, 30), (12, 36, 60)),
    ((1, 18, 30), (1, 27, 15)),
    ((3, 5, 4), (11, 9, 13)),
]


def image(shape: tuple[int, ...], channels: int = 2) -> np.ndarray:
    """Noise and structure in normalized units."""
    smooth, rough = np.random.default_rng(0).normal(size=(2, channels, *shape))
    fields = gaussian_filter(smooth, (0, 1, 1, 1)) * 3 + rough
    return (fields / fields.std()).astype(np.float32)


def labels(shape: tuple[int, ...], *, classes: int = 6, seed: int = 1) -> np.ndarray:
    """Blobs of several labels that touch each other and -1, with many exact ties at even factors."""
    rng = np.random.default_rng(seed)
    fields = np.stack([gaussian_filter(rng.normal(size=shape), 1.2) for _ in range(classes)])
    return (fields.argmax(0) - 1).astype(np.int16)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_images_are_within_1e_5_of_nnunet(old, new, order, axis):
    source = image(old)
    theirs = resample_data_or_seg(source, new, False, axis, order, axis is not None, order_z=0)
    ours = resample_image(source, new, separate=axis, order=order)
    assert ours.dtype == np.float32
    assert ours.flags["C_CONTIGUOUS"]
    assert np.abs(ours - theirs).max() <= (1e-5 if order else 0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_linear_between_planes_is_nnunets_too(axis):
    source, new = image((9, 12, 11)), (13, 8, 17)
    theirs = resample_data_or_seg(source, new, False, axis, 3, True, order_z=1)
    assert np.abs(resample_image(source, new, separate=axis, order_z=1) - theirs).max() <= 1e-5


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_labels_differ_from_nnunet_at_no_voxel(old, new, order, axis):
    source = labels(old)
    theirs = resample_data_or_seg(source[None], new, True, axis, order, axis is not None, order_z=0)[0]
    ours = resample_label(source, new, separate=axis, order=order)
    assert ours.dtype == source.dtype
    assert np.count_nonzero(ours != theirs) == 0


@pytest.mark.parametrize("seed", range(4))
def test_ties_of_random_labels_fall_as_in_nnunet(seed):
    source = np.random.default_rng(seed).integers(-1, 4, (6, 8, 10)).astype(np.int16)
    for new in ((12, 16, 20), (3, 4, 5), (9, 12, 15)):
        theirs = resample_data_or_seg(source[None], new, True, None, 1, False)[0]
        np.testing.assert_array_equal(resample_label(source, new), theirs)


@pytest.mark.parametrize("new", [(13, 8, 17), (14, 12, 11), (18, 6, 22)])
def test_labels_with_linear_share_between_planes(new):
    source = labels((9, 12, 11))
    theirs = resample_data_or_seg(source[None], new, True, 0, 1, True, order_z=1)[0]
    np.testing.assert_array_equal(resample_label(source, new, separate=0, order_z=1), theirs)


def test_threads_change_nothing():
    source, marks = image((9, 31, 26)), labels((9, 31, 26))
    for axis in (None, 1):
        one = resample_image(source, (14, 40, 33), separate=axis)
        np.testing.assert_array_equal(one, resample_image(source, (14, 40, 33), separate=axis, threads=3))
        one = resample_label(marks, (14, 40, 33), separate=axis)
        np.testing.assert_array_equal(one, resample_label(marks, (14, 40, 33), separate=axis, threads=3))


SPACINGS = [
    ((3, 0.8, 0.8), (3, 0.7, 0.7)),
    ((1, 1, 1), (1.5, 1.5, 1.5)),
    ((1, 1, 1), (5, 1, 1)),
    ((0.24, 1.25, 1.25), (1, 1, 1)),
    ((1, 4, 1), (5, 1, 1)),
    ((2, 1, 6.1), (1, 1, 1)),
    ((3, 1, 1), (3, 1, 1)),
    ((0.976562, 0.976562, 5), (0.8, 0.8, 2.5)),
]


@pytest.mark.parametrize(("old", "new"), SPACINGS)
def test_the_separate_axis_and_the_new_shape_are_nnunets(old, new):
    separate, axis = determine_do_sep_z_and_axis(None, old, new)
    assert separate_axis(old, new) == (axis if separate else None)
    shape = (37, 411, 255)
    assert planned_shape(shape, old, new) == tuple(compute_new_shape(shape, old, new))
