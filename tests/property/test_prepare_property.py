"""What preparation must hold for any volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfmedsam2.geometry import Grid
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Normalization, Plan, Resampling, Stage
from rfmedsam2.transforms.crop import nonzero_box, outside_mask
from rfmedsam2.transforms.prepare import prepare
from rfmedsam2.transforms.resample import nearest_index, resample_image, resample_label
from rfmedsam2.volume import Volume

pytestmark = pytest.mark.slow

SIZE = st.integers(1, 9)
SPACING = st.floats(0.3, 6.0)
SHAPE = st.tuples(SIZE, SIZE, SIZE)
SPACINGS = st.tuples(SPACING, SPACING, SPACING)
ORDERS = st.permutations([0, 1, 2]).map(tuple)
SEED = st.integers(0, 10_000)


def plan(spacing, order, resampling) -> Plan:
    model = UNetConfig(
        features=(4, 4),
        kernel_sizes=((3, 3, 3),) * 2,
        strides=((1, 1, 1), (2, 2, 2)),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    stage = Stage(
        spacing_mm=spacing,
        median_shape=(8, 8, 8),
        patch_size=(8, 8, 8),
        batch_size=1,
        normalization=(Normalization(kind="none"),),
        resampling=resampling,
        model=model,
    )
    statistics = IntensityStatistics(mean=0, median=0, std=1, min=0, max=1, percentile_00_5=0, percentile_99_5=1)
    return Plan(
        name="p",
        dataset="Dataset001_Test",
        fingerprint="none",
        channels=("MR",),
        labels=LabelSet(names={"background": 0, "a": 1, "b": 2}),
        file_ending=".nii.gz",
        transpose_forward=order,
        intensities=(statistics,),
        stages={"stage": stage},
    )


@settings(max_examples=60, deadline=None)
@given(SHAPE, SPACINGS, SPACINGS, ORDERS, SEED, st.sampled_from([0, 1, 3]), st.sampled_from([0, 1]))
def test_a_prepared_case_is_sound_and_its_input_untouched(shape, spacing, target, order, seed, kind, vote):
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 4, (1, *shape)).astype(np.int16)
    label = rng.integers(0, 3, shape).astype(np.uint8)
    before = array.copy(), label.copy()
    volume = Volume(array=array, grid=Grid(shape_zyx=shape, spacing_zyx_mm=spacing))
    resampling = Resampling(order_image=kind, order_label=vote)
    prepared = prepare(volume, plan(target, order, resampling), "stage", label=label)
    restore = prepared.restore
    assert prepared.image.shape == (1, *restore.shape_planned)
    assert prepared.label is not None
    assert prepared.label.shape == restore.shape_planned
    assert prepared.label.dtype == np.int16
    assert set(np.unique(prepared.label)) <= {0, 1, 2}
    assert prepared.image.min() >= array.min() - 1e-5
    assert prepared.image.max() <= array.max() + 1e-5
    assert tuple(restore.box[a][1] - restore.box[a][0] for a in order) == restore.shape_cropped
    np.testing.assert_array_equal(array, before[0])
    np.testing.assert_array_equal(label, before[1])


@settings(max_examples=60, deadline=None)
@given(SHAPE, SHAPE, SEED, st.sampled_from([None, 0, 1, 2]))
def test_resampling_mirrors_with_its_input(shape, new, seed, separate):
    """Cubic resampling knows no direction: mirrored input gives mirrored output."""
    if separate is not None and shape[separate] != new[separate]:
        new = tuple(shape[a] if a == separate else n for a, n in enumerate(new))
    image = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
    straight = resample_image(image, new, separate=separate)
    mirrored = resample_image(np.ascontiguousarray(image[:, ::-1, ::-1, ::-1]), new, separate=separate)
    np.testing.assert_allclose(straight, mirrored[:, ::-1, ::-1, ::-1], atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(SHAPE, SEED, st.integers(1, 3), st.sampled_from([None, 0, 1, 2]))
def test_an_odd_enlargement_keeps_every_voxel_center(shape, seed, half, separate):
    """Enlarged by an odd factor every source voxel has a target voxel at its center, which keeps its value."""
    factor = 2 * half + 1
    new = tuple(n * factor for n in shape)
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(1, *shape)).astype(np.float32)
    label = rng.integers(0, 4, shape).astype(np.int16)
    centers = slice(half, None, factor)
    at_centers = resample_image(image, new, separate=separate)[0][centers, centers, centers]
    np.testing.assert_allclose(at_centers, image[0], atol=2e-5)
    np.testing.assert_array_equal(resample_label(label, new, separate=separate)[centers, centers, centers], label)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_nearest_indices_cover_the_source_in_order(n_in, n_out):
    index = nearest_index(n_in, n_out)
    assert np.all(np.diff(index) >= 0)
    assert len(np.unique(index)) == min(n_in, n_out)


@settings(max_examples=60, deadline=None)
@given(SHAPE, SEED, st.floats(0.05, 0.95))
def test_the_crop_loses_nothing_and_is_tight(shape, seed, share):
    image = (np.random.default_rng(seed).random((1, *shape)) < share).astype(np.int16)
    box = nonzero_box(image)
    cropped = image[(slice(None), *(slice(*limits) for limits in box))]
    assert cropped.sum() == image.sum()
    if image.any():
        assert all(np.moveaxis(cropped[0], axis, 0)[k].any() for axis in range(3) for k in (0, -1))
        outside = outside_mask(cropped)
        assert outside is None or not np.any(outside & (cropped[0] != 0))
