"""Dice, NSD and HD95 of two masks: by hand, against surface-distance and MONAI, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import surface_distance
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance

from rfmedsam2.errors import GeometryError, ImageError, UsageError
from rfmedsam2.metrics import dice, hd95, nsd

SPACING = (3.0, 0.7, 1.1)


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two ragged masks that overlap."""
    rng = np.random.default_rng(seed)
    one, two = np.zeros((2, 9, 14, 13), bool)
    one[2:7, 3:10, 3:9] = True
    two[3:8, 4:12, 2:8] = True
    return one ^ (rng.random(one.shape) < 0.05), two ^ (rng.random(one.shape) < 0.05)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_surface_distance(seed: int) -> None:
    one, two = blobs(seed)
    distances = surface_distance.compute_surface_distances(one, two, SPACING)
    assert dice(one, two) == pytest.approx(surface_distance.compute_dice_coefficient(one, two))
    assert hd95(one, two, SPACING) == pytest.approx(surface_distance.compute_robust_hausdorff(distances, 95))
    for tolerance in (0.0, 0.8, 2.0):
        expected = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)
        assert nsd(one, two, SPACING, tolerance_mm=tolerance) == pytest.approx(expected)


def test_dice_is_that_of_monai() -> None:
    one, two = blobs(7)
    expected = compute_dice(*(torch.from_numpy(m)[None, None].float() for m in (two, one)))
    assert dice(one, two) == pytest.approx(float(expected))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_hd95_of_a_shifted_block_is_that_of_monai(shift: int) -> None:
    """Surfaces are defined otherwise there (border voxels), which makes no difference for parallel faces."""
    one = np.zeros((10, 20, 20), bool)
    one[2:8, 4:14, 4:14] = True
    two = np.roll(one, shift, axis=2)
    pair = (torch.from_numpy(m)[None, None].float() for m in (two, one))
    expected = compute_hausdorff_distance(*pair, percentile=95, spacing=SPACING)
    assert hd95(one, two, SPACING) == pytest.approx(float(expected)) == pytest.approx(shift * 1.1)


def test_one_label_of_a_label_map_is_its_mask() -> None:
    one, two = blobs(1)
    maps = [np.where(mask, 3, 1).astype(np.int16) for mask in (one, two)]
    assert dice(*maps, label=3) == dice(one, two)
    assert nsd(*maps, SPACING, label=3) == nsd(one, two, SPACING)
    assert hd95(*maps, SPACING, label=3) == hd95(one, two, SPACING)
    assert dice(one.astype(np.uint8), two.astype(int)) == dice(one, two)
    assert dice(one[0], two[0]) == dice(one[:1], two[:1])


def test_empty_masks() -> None:
    some, none = np.ones((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
    assert (dice(some, none), nsd(none, some, SPACING), hd95(some, none, SPACING)) == (0, 0, math.inf)
    assert hd95(none, some, SPACING) == math.inf
    assert all(math.isnan(score) for score in (dice(none, none), nsd(none, none, SPACING), hd95(none, none, SPACING)))
    assert (dice(some, some), nsd(some, some, SPACING), hd95(some, some, SPACING)) == (1, 1, 0)


def test_what_cannot_be_scored_is_a_sentence() -> None:
    mask = np.ones((3, 4, 5), bool)
    with pytest.raises(GeometryError, match="shapes"):
        dice(mask, mask[1:])
    with pytest.raises(ImageError, match="not a mask"):
        dice(mask, mask.astype(float))
    with pytest.raises(UsageError, match="label="):
        dice(mask, mask.astype(int) * 2)
    with pytest.raises(UsageError, match="not an array of numbers"):
        dice("mask.nii.gz", mask)
    with pytest.raises(UsageError, match="of equal lengths"):
        dice([[True, False], [True]], [[True]])
    with pytest.raises(UsageError, match=r"not the value of a class.*'liver'"):
        dice(mask.astype(int), mask.astype(int), label="liver")
    with pytest.raises(UsageError, match=r"tolerance_mm.*'1'"):
        nsd(mask, mask, SPACING, tolerance_mm="1")
    with pytest.raises(GeometryError, match="spacing"):
        hd95(mask, mask, (1, 1))
    with pytest.raises(GeometryError, match="spacing"):
        nsd(mask, mask, (1, 0, 1))
    with pytest.raises(UsageError, match="tolerance_mm"):
        nsd(mask, mask, SPACING, tolerance_mm=-1)
    for spacing in (SPACING, SPACING[1:]):
        with pytest.raises(GeometryError, match=r"between volumes.*\(Z, Y, X\).*\(4, 5\)"):
            hd95(mask[0], mask[0], spacing)


def test_tensors_and_nested_lists_are_masks() -> None:
    one, other = np.zeros((2, 3, 4, 5), bool)
    one[1:, 1:3, 1:4], other[1:, 1:3, 2:5] = True, True
    expected = dice(one, other), nsd(one, other, SPACING), hd95(one, other, SPACING)
    assert expected[0] == pytest.approx(2 / 3)
    for make in (torch.from_numpy, np.ndarray.tolist):
        a, b = make(one), make(other)
        assert (dice(a, b), nsd(a, b, SPACING), hd95(a, b, SPACING)) == expected
    labels = torch.from_numpy(one.astype(np.int64) * 3).float().requires_grad_().long()
    assert dice(labels, other.astype(int) * 3, label=3) == expected[0]


def test_masked_arrays_are_refused() -> None:
    one = np.ones((3, 4, 5), np.uint8)
    hidden = np.ma.array(one, mask=np.zeros_like(one))
    assert dice(one, hidden) == 1.0
    hidden[0, 0, 0] = np.ma.masked
    for score in (dice, lambda a, b: nsd(a, b, SPACING), lambda a, b: hd95(a, b, SPACING)):
        with pytest.raises(ImageError, match=r"The prediction is a masked array.*1 masked voxels"):
            score(one, hidden)
