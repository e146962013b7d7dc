"""NSD and HD95 against DeepMind's surface-distance on the same masks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from rfmedsam2.metrics.volumes import case_metrics, surface_distances
from rfmedsam2.records.dataset import LabelSet

peer = pytest.importorskip("surface_distance.metrics")

SHAPES = [(1, 9, 9), (9, 1, 5), (6, 14, 11), (12, 12, 12), (20, 30, 25)]
SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.7, 0.7), (0.5, 2.0, 1.25), (5.0, 0.78125, 0.9)]


def _masks(shape: tuple[int, int, int], seed: int, smooth: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    noise = [ndimage.gaussian_filter(random.random(shape), smooth) for _ in range(2)]
    masks = [n > np.quantile(n, 0.7) for n in noise]
    return masks[0], masks[1]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smooth", [0.0, 1.5])
def test_nsd_and_hd95_are_those_of_surface_distance(shape, spacing, smooth) -> None:
    reference, prediction = _masks(shape, 7, smooth)
    expected = peer.compute_surface_distances(reference, prediction, spacing)
    found = surface_distances(reference, prediction, spacing)
    for tolerance in (0.0, 0.9, 1.0, 2.0, 3.0):
        assert found.nsd(tolerance) == pytest.approx(
            peer.compute_surface_dice_at_tolerance(expected, tolerance), abs=1e-12
        )
    for percent in (50, 95, 100):
        assert found.hausdorff(percent) == pytest.approx(peer.compute_robust_hausdorff(expected, percent), abs=1e-12)


def test_every_surface_element_has_the_same_distance_and_area() -> None:
    reference, prediction = _masks((14, 15, 16), 11, 1.0)
    spacing = (2.5, 0.8, 0.9)
    expected = peer.compute_surface_distances(reference, prediction, spacing)
    found = surface_distances(reference, prediction, spacing)
    order = np.lexsort((found.areas_prediction, found.prediction_to_reference))
    np.testing.assert_array_equal(found.prediction_to_reference[order], expected["distances_pred_to_gt"])
    np.testing.assert_array_equal(found.areas_prediction[order], expected["surfel_areas_pred"])


def test_masks_far_apart_in_a_large_volume() -> None:
    reference, prediction = np.zeros((2, 30, 60, 70), bool)
    reference[1:4, 3:9, 2:11] = True
    prediction[25:28, 50:57, 60:68] = True
    spacing = (3.0, 0.7, 0.7)
    expected = peer.compute_surface_distances(reference, prediction, spacing)
    assert surface_distances(reference, prediction, spacing).hausdorff() == peer.compute_robust_hausdorff(expected, 95)


def test_all_classes_at_once_equal_one_by_one() -> None:
    random = np.random.default_rng(5)
    reference = random.integers(0, 5, (6, 10, 12)).repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8)
    prediction = np.roll(reference, 1, axis=2)
    labels = LabelSet(names={"background": 0, **{f"c{i}": i for i in range(1, 5)}})
    spacing = (4.0, 1.0, 1.5)
    scores = case_metrics(reference, prediction, labels, spacing, nsd_tolerance_mm=1.0)
    for value in range(1, 5):
        expected = peer.compute_surface_distances(reference == value, prediction == value, spacing)
        score = scores[f"c{value}"]
        assert score.nsd == pytest.approx(peer.compute_surface_dice_at_tolerance(expected, 1.0), abs=1e-12)
        assert score.hd95_mm == peer.compute_robust_hausdorff(expected, 95)
        dsc = peer.compute_dice_coefficient(reference == value, prediction == value)
        assert score.dsc == pytest.approx(dsc, abs=1e-12)


def test_real_organs_have_the_same_scores(data_root) -> None:
    nibabel = pytest.importorskip("nibabel")
    folder = data_root / "hippocampus" / "Dataset004_Hippocampus" / "labelsTr"
    files = sorted(folder.glob("*.nii.gz"))[:3]
    for file in files:
        image = nibabel.load(file)
        reference = np.asarray(image.dataobj).astype(np.uint8)
        prediction = np.roll(ndimage.grey_erosion(reference, 2), 1, axis=0)
        labels = LabelSet(names={"background": 0, "anterior": 1, "posterior": 2})
        scores = case_metrics(reference, prediction, labels, (1.0, 1.0, 1.0))
        for name, value in (("anterior", 1), ("posterior", 2)):
            expected = peer.compute_surface_distances(reference == value, prediction == value, (1.0, 1.0, 1.0))
            assert scores[name].nsd == pytest.approx(peer.compute_surface_dice_at_tolerance(expected, 2.0), abs=1e-12)
            assert scores[name].hd95_mm == peer.compute_robust_hausdorff(expected, 95)
