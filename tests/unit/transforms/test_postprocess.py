"""Postprocessing of arrays: which components stay, which holes are filled and with what."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from rfmedsam2.errors import RecordError
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PostprocessingRule, PostprocessingStep
from rfmedsam2.transforms.postprocess import postprocess

LABELS = LabelSet(names={"background": 0, "liver": 1, "spleen": 2})
VOXEL_ML = 0.5


def step(action, of=None, ml=None) -> PostprocessingStep:
    return PostprocessingStep(action=action, of=of, smallest_ml=ml)


def apply(label_map, *steps, labels=LABELS):
    return postprocess(label_map, steps, labels, voxel_ml=VOXEL_ML)


@pytest.fixture
def blocks() -> np.ndarray:
    """Liver of 12 and 2 voxels, spleen of 6 beside the small liver and 1 apart."""
    volume = np.zeros((6, 8, 9), np.uint8)
    volume[0:3, 0:2, 0:2] = 1
    volume[5, 7, 0:2] = 1
    volume[5, 7, 2:8] = 2
    volume[0, 7, 8] = 2
    return volume


def test_the_largest_component_of_a_class_is_kept_and_other_classes_stay(blocks) -> None:
    before = blocks.copy()
    after = apply(blocks, step("keep_largest", "liver"))
    assert (after == 1).sum() == 12
    np.testing.assert_array_equal(after == 2, blocks == 2)
    np.testing.assert_array_equal(blocks, before)


def test_the_foreground_is_one_mask(blocks) -> None:
    blocks[0:3, 0:2, 0:2] = 0
    after = apply(blocks, step("keep_largest"))
    assert ((after == 1).sum(), (after == 2).sum()) == (2, 6)


def test_components_hang_together_by_corners(blocks) -> None:
    blocks[3, 2, 2] = 1
    assert (apply(blocks, step("keep_largest", "liver")) == 1).sum() == 13


def test_volumes_are_in_ml_and_the_smallest_one_stays(blocks) -> None:
    assert (apply(blocks, step("drop_small", "liver", 1.0)) == 1).sum() == 14
    assert (apply(blocks, step("drop_small", "liver", 1.01)) == 1).sum() == 12
    assert (apply(blocks, step("drop_small", None, 1.0)) == 2).sum() == 6


def test_holes_are_what_is_enclosed_and_only_background_is_filled() -> None:
    volume = np.zeros((9, 9, 9), np.uint8)
    volume[1:8, 1:8, 1:8] = 1
    volume[3:6, 3:6, 3:6] = 0
    volume[4, 4, 4] = 2
    volume[1, 1, 1] = volume[2, 2, 2] = 0  # one open at the corner, one closed that touches it with an edge
    after = apply(volume, step("fill_holes", "liver"))
    expected = ndimage.binary_fill_holes(volume == 1)
    np.testing.assert_array_equal(after == 1, expected & (volume != 2))
    assert after[4, 4, 4] == 2
    assert after[1, 1, 1] == 0


def test_a_hole_between_classes_gets_the_value_that_is_most_frequent_around_it() -> None:
    volume = np.full((3, 3, 3), 1, np.uint8)
    volume[:, :, 2] = 2
    volume[1, 1, 1] = 0
    assert apply(volume, step("fill_holes"))[1, 1, 1] == 1
    volume[0, 1, 1] = volume[2, 1, 1] = volume[1, 0, 1] = 2
    assert apply(volume, step("fill_holes"))[1, 1, 1] == 2


def test_a_tunnel_is_open_and_a_slice_of_its_own_has_holes() -> None:
    volume = np.ones((3, 5, 5), np.uint8)
    volume[:, 2, 2] = 0
    np.testing.assert_array_equal(apply(volume, step("fill_holes", "liver")), volume)
    assert apply(volume[:1], step("fill_holes", "liver")).all()


def test_a_region_is_one_mask_of_its_values() -> None:
    regions = LabelSet(names={"background": 0, "whole": (1, 2), "core": 2}, regions_class_order=(1, 2))
    volume = np.zeros((1, 4, 9), np.uint8)
    volume[0, 0, :3], volume[0, 0, 3:5], volume[0, 3, 8] = 1, 2, 2
    after = apply(volume, step("keep_largest", "whole"), labels=regions)
    assert ((after == 1).sum(), (after == 2).sum()) == (3, 2)


def test_nothing_is_done_to_what_is_absent() -> None:
    empty = np.zeros((2, 3, 4), np.uint16)
    steps = [step("keep_largest", "liver"), step("drop_small", None, 1), step("fill_holes")]
    np.testing.assert_array_equal(apply(empty, *steps), empty)


def test_random_maps_equal_a_slow_reference() -> None:
    rng = np.random.default_rng(0)
    for density in (0.05, 0.2, 0.5):
        volume = (rng.random((7, 11, 13)) < density).astype(np.uint8) * rng.integers(1, 3, (7, 11, 13)).astype(np.uint8)
        components, count = ndimage.label(volume == 1, np.ones((3, 3, 3)))
        sizes = ndimage.sum_labels(volume == 1, components, np.arange(count + 1))
        small = np.isin(components, np.flatnonzero(sizes * VOXEL_ML < 1.5)) & (components > 0)
        np.testing.assert_array_equal(
            apply(volume, step("drop_small", "liver", 1.5)), np.where(small, np.uint8(0), volume)
        )


def test_a_rule_is_checked_and_its_digest_is_of_what_it_does() -> None:
    with pytest.raises(RecordError, match="drop_small needs smallest_ml"):
        step("drop_small", "liver")
    with pytest.raises(RecordError, match="keep_largest has no smallest_ml"):
        step("keep_largest", "liver", 2)
    with pytest.raises(RecordError, match="kidney"):
        PostprocessingRule(dataset="D", labels=LABELS.names, steps=(step("keep_largest", "kidney"),))
    rule = PostprocessingRule(dataset="D", labels=LABELS.names, steps=(step("keep_largest", "liver"),))
    learned = rule.model_copy(update={"cases": 7, "steps": (rule.steps[0].model_copy(update={"gain": 0.1}),)})
    assert learned.digest == rule.digest
    assert rule.model_copy(update={"steps": (step("keep_largest", "spleen"),)}).digest != rule.digest
