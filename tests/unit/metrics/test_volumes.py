"""Metrics whose answer is known by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from rfmedsam2.errors import GeometryError, ImageError
from rfmedsam2.metrics.volumes import case_metrics, confusion, empty_policy, surface_distances
from rfmedsam2.records.dataset import LabelSet

ONE = LabelSet(names={"background": 0, "organ": 1})
TWO = LabelSet(names={"background": 0, "a": 1, "b": 2})


def voxels(*indices: tuple[int, int, int], shape: tuple[int, int, int] = (5, 6, 7), value: int = 1) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    for index in indices:
        array[index] = value
    return array


def test_two_voxels_two_slices_apart_are_two_spacings_apart() -> None:
    # corner surfaces are shifted copies: every corner of one voxel has its nearest counterpart one slice (3 mm) away
    # or two slices (6 mm) away, four corners of equal area each
    score = case_metrics(voxels((1, 2, 2)), voxels((3, 2, 2)), ONE, (3.0, 1.0, 1.0))["organ"]
    assert (score.dsc, score.iou) == (0.0, 0.0)
    assert score.hd95_mm == 6.0
    assert score.nsd == 0.0


def test_two_voxels_side_by_side_share_half_of_their_corners() -> None:
    reference, prediction = voxels((1, 2, 2)), voxels((1, 2, 3))
    distances = surface_distances(reference, prediction, (3.0, 1.0, 2.0))
    assert sorted(distances.reference_to_prediction) == [0, 0, 0, 0, 2, 2, 2, 2]
    assert distances.nsd(1.0) == pytest.approx(0.5)
    assert distances.nsd(2.0) == pytest.approx(1.0)
    assert distances.hausdorff() == 2.0


def test_one_voxel_has_eight_surface_elements_of_equal_area() -> None:
    distances = surface_distances(voxels((0, 0, 0)), voxels((0, 0, 0)), (1.0, 1.0, 1.0))
    assert distances.areas_reference == pytest.approx([math.sqrt(3) / 8] * 8)
    assert distances.reference_to_prediction.tolist() == [0.0] * 8


def test_overlap_and_volumes_by_hand() -> None:
    reference = voxels((0, 0, 0), (0, 0, 1), (0, 0, 2))
    prediction = voxels((0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 0, 4), (0, 0, 5))
    score = case_metrics(reference, prediction, ONE, (10.0, 5.0, 2.0))["organ"]
    assert score.dsc == pytest.approx(4 / 8)
    assert score.iou == pytest.approx(2 / 6)
    assert score.reference_ml == pytest.approx(0.3)
    assert score.predicted_ml == pytest.approx(0.5)
    assert score.volume_error_ml == pytest.approx(0.2)
    assert score.relative_volume_error == pytest.approx(2 / 3)


def test_both_empty_is_undefined_or_perfect_as_asked() -> None:
    empty = voxels()
    skipped = case_metrics(empty, empty, ONE, (1.0, 1.0, 1.0))["organ"]
    assert (skipped.dsc, skipped.iou, skipped.nsd, skipped.hd95_mm) == (None, None, None, None)
    perfect = case_metrics(empty, empty, ONE, (1.0, 1.0, 1.0), both_empty="perfect")["organ"]
    assert (perfect.dsc, perfect.iou, perfect.nsd, perfect.hd95_mm) == (1.0, 1.0, 1.0, 0.0)
    assert perfect.relative_volume_error is None


@pytest.mark.parametrize("missing", ["reference", "prediction"])
def test_one_empty_mask_scores_zero_without_distance(missing: str) -> None:
    full, empty = voxels((1, 1, 1)), voxels()
    pair = (empty, full) if missing == "reference" else (full, empty)
    score = case_metrics(*pair, ONE, (1.0, 1.0, 1.0), both_empty="perfect")["organ"]
    assert (score.dsc, score.iou, score.nsd, score.hd95_mm) == (0.0, 0.0, 0.0, None)
    assert score.relative_volume_error == (None if missing == "reference" else -1.0)


def test_policy_is_said_in_words() -> None:
    assert "left out of means" in empty_policy("skip")
    assert "count as 1" in empty_policy("perfect")


def test_ignored_voxels_count_on_neither_side() -> None:
    labels = LabelSet(names={"background": 0, "organ": 1}, ignore=2)
    reference = voxels((1, 1, 1)) + voxels((1, 1, 2), (1, 1, 3), value=2)
    prediction = voxels((1, 1, 1), (1, 1, 2), (1, 1, 3))
    score = case_metrics(reference, prediction, labels, (1.0, 1.0, 1.0))["organ"]
    assert (score.dsc, score.nsd, score.hd95_mm) == (1.0, 1.0, 0.0)
    assert score.predicted_ml == pytest.approx(0.001)


def test_predicted_ignore_label_is_a_missed_voxel() -> None:
    labels = LabelSet(names={"background": 0, "organ": 1}, ignore=2)
    reference = voxels((1, 1, 1), (1, 1, 2))
    prediction = voxels((1, 1, 1)) + voxels((1, 1, 2), value=2)
    score = case_metrics(reference, prediction, labels, (1.0, 1.0, 1.0))["organ"]
    assert score.dsc == pytest.approx(2 / 3)
    assert score.reference_ml == pytest.approx(0.002)


def test_a_region_is_the_union_of_its_values() -> None:
    labels = LabelSet(names={"background": 0, "whole": (1, 2), "core": 2}, regions_class_order=(1, 2))
    reference = voxels((1, 1, 1)) + voxels((1, 1, 2), value=2)
    prediction = voxels((1, 1, 1), (1, 1, 2))
    scores = case_metrics(reference, prediction, labels, (1.0, 1.0, 1.0))
    assert list(scores) == ["whole", "core"]
    assert (scores["whole"].dsc, scores["whole"].nsd, scores["whole"].hd95_mm) == (1.0, 1.0, 0.0)
    assert (scores["core"].dsc, scores["core"].hd95_mm) == (0.0, None)


def test_confusion_counts_pairs_and_boxes() -> None:
    reference, prediction = voxels((1, 2, 3)), voxels((2, 3, 4), value=2)
    counts, boxes = confusion(reference, prediction, TWO)
    assert counts.tolist() == [[5 * 6 * 7 - 2, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert boxes[1].tolist() == [1, 2, 3, 1, 2, 3]
    assert boxes[2].tolist() == [2, 3, 4, 2, 3, 4]


def test_undeclared_values_of_both_sides_are_listed() -> None:
    with pytest.raises(ImageError, match=r"reference holds 7; the prediction holds 5, 9"):
        case_metrics(
            voxels((0, 0, 0), value=7), voxels((0, 0, 0), value=5) + voxels((1, 1, 1), value=9), ONE, (1, 1, 1)
        )


def test_negative_or_fractional_labels_are_refused() -> None:
    with pytest.raises(ImageError, match="-1 to 0"):
        case_metrics(-voxels((0, 0, 0)).astype(np.int16), voxels().astype(np.int16), ONE, (1, 1, 1))
    with pytest.raises(ImageError, match="integer dtype"):
        case_metrics(voxels().astype(np.float32), voxels(), ONE, (1, 1, 1))


def test_shapes_that_differ_are_refused_with_both_named() -> None:
    with pytest.raises(GeometryError, match=r"\(5, 6, 7\).*\(5, 6, 8\)"):
        case_metrics(voxels(), voxels(shape=(5, 6, 8)), ONE, (1, 1, 1))


@pytest.mark.parametrize("kind", [np.int16, np.int64, np.uint16])
def test_the_integer_type_changes_nothing(kind: type) -> None:
    random = np.random.default_rng(3)
    reference, prediction = (random.integers(0, 3, (4, 5, 6)).astype(np.uint8) for _ in range(2))
    expected = case_metrics(reference, prediction, TWO, (2.0, 1.0, 1.0))
    assert case_metrics(reference.astype(kind), prediction, TWO, (2.0, 1.0, 1.0)) == expected


def test_large_label_values_and_transposed_arrays_are_understood() -> None:
    labels = LabelSet(names={"background": 0, "far": 1000})
    reference = np.zeros((3, 4, 5), np.uint16)
    reference[1, 2] = 1000
    score = case_metrics(reference.T, reference.T, labels, (1, 1, 1))["far"]
    assert (score.dsc, score.nsd, score.hd95_mm) == (1.0, 1.0, 0.0)


def test_importing_metrics_loads_no_torch() -> None:
    code = "import sys, rfmedsam2.metrics.volumes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
