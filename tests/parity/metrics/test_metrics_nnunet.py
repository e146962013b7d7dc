"""Dice and IoU against nnU-Net's evaluate_predictions, with ignore label and regions."""

from __future__ import annotations

import numpy as np
import pytest

from rfmedsam2.metrics.volumes import case_metrics
from rfmedsam2.records.dataset import LabelSet

peer = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")

SETS = {
    "classes": LabelSet(names={"background": 0, "a": 1, "b": 2, "c": 3, "absent": 4}),
    "classes with ignore": LabelSet(names={"background": 0, "a": 1, "b": 2}, ignore=3),
    "regions": LabelSet(
        names={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": 3}, regions_class_order=(1, 2, 3)
    ),
    "regions with ignore": LabelSet(
        names={"background": 0, "whole": (1, 2), "core": 2}, regions_class_order=(1, 2), ignore=3
    ),
}


class _Arrays:
    """Stands for nnU-Net's reader: "files" are arrays."""

    def read_seg(self, array: np.ndarray) -> tuple[np.ndarray, dict]:
        return array[None], {}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("seed", range(3))
def test_dice_and_iou_are_those_of_nnunet(kind: str, seed: int) -> None:
    labels = SETS[kind]
    random = np.random.default_rng(seed)
    reference, prediction = (random.integers(0, 4, (5, 8, 9)).astype(np.uint8) for _ in range(2))
    wanted = [v if len(v) > 1 else v[0] for v in labels.foreground.values()]
    found = case_metrics(reference, prediction, labels, (1.0, 1.0, 1.0))
    expected = peer.compute_metrics(reference, prediction, _Arrays(), wanted, labels.ignore)["metrics"]
    for score, theirs in zip(found.values(), (expected[w] for w in wanted), strict=True):
        if np.isnan(theirs["Dice"]):
            assert score.dsc is None
            assert score.iou is None
            continue
        assert score.dsc == pytest.approx(theirs["Dice"], abs=1e-12)
        assert score.iou == pytest.approx(theirs["IoU"], abs=1e-12)
        assert score.reference_ml * 1000 == pytest.approx(theirs["n_ref"])
        assert score.predicted_ml * 1000 == pytest.approx(theirs["n_pred"])


def test_undefined_and_zero_cases_agree() -> None:
    labels = LabelSet(names={"background": 0, "a": 1})
    empty, full = np.zeros((3, 3, 3), np.uint8), np.ones((3, 3, 3), np.uint8)
    for pair in ((empty, empty), (empty, full), (full, empty)):
        theirs = peer.compute_metrics(*pair, _Arrays(), [1])["metrics"][1]["Dice"]
        ours = case_metrics(*pair, labels, (1.0, 1.0, 1.0))["a"].dsc
        assert (ours is None and np.isnan(theirs)) or ours == theirs
