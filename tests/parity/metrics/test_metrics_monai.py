"""Dice and IoU against MONAI's metric functions."""

from __future__ import annotations

import numpy as np
import pytest

from rfmedsam2.metrics.volumes import case_metrics
from rfmedsam2.records.dataset import LabelSet

monai = pytest.importorskip("monai.metrics")
torch = pytest.importorskip("torch")

LABELS = LabelSet(names={"background": 0, "a": 1, "b": 2, "c": 3})


def _one_hot(array: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.from_numpy(array == value) for value in range(4)])[None].float()


@pytest.mark.parametrize("seed", range(3))
def test_dice_and_iou_are_those_of_monai(seed: int) -> None:
    random = np.random.default_rng(seed)
    reference, prediction = (random.integers(0, 3, (4, 7, 6)).astype(np.uint8) for _ in range(2))
    prediction[0, 0, 0] = 3
    pair = _one_hot(prediction), _one_hot(reference)
    dice = monai.compute_dice(*pair, include_background=False, ignore_empty=False)[0].tolist()
    iou = monai.compute_iou(*pair, include_background=False, ignore_empty=False)[0].tolist()
    scores = list(case_metrics(reference, prediction, LABELS, (1.0, 1.0, 1.0)).values())
    assert [s.dsc for s in scores] == pytest.approx(dice, abs=1e-6)
    assert [s.iou for s in scores] == pytest.approx(iou, abs=1e-6)


def test_both_empty_is_skipped_or_one_as_in_monai() -> None:
    empty = np.zeros((2, 3, 4), np.uint8)
    pair = _one_hot(empty), _one_hot(empty)
    skipped = monai.compute_dice(*pair, include_background=False, ignore_empty=True)
    counted = monai.compute_dice(*pair, include_background=False, ignore_empty=False)
    assert torch.isnan(skipped).all()
    assert all(s.dsc is None for s in case_metrics(empty, empty, LABELS, (1, 1, 1)).values())
    perfect = case_metrics(empty, empty, LABELS, (1, 1, 1), both_empty="perfect").values()
    assert [s.dsc for s in perfect] == counted[0].tolist()
