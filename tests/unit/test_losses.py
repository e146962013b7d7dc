"""Losses where nnU-Net has no counterpart: marks of voxels outside a volume."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.losses import deep_supervision_losses, deep_supervision_weights, memberships, segmentation_losses
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import SegmentationLoss

CLASSES = LabelSet.model_validate({"names": {"background": 0, "liver": 1, "spleen": 2}})
REGIONS = LabelSet.model_validate(
    {"names": {"background": 0, "whole": (1, 2), "core": (2,)}, "regions_class_order": (1, 2)}
)


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_what_lies_outside_is_background(labels):
    random = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 4, 5, 6), generator=random)
    logits = torch.randn(2, labels.num_outputs, 4, 5, 6, generator=random)
    outside = target.clone()
    outside[target == 0] = -1
    if labels.has_regions:
        assert torch.equal(memberships(outside, labels), memberships(target, labels))
    expected = segmentation_losses(logits, target, labels, SegmentationLoss())
    found = segmentation_losses(logits, outside, labels, SegmentationLoss())
    assert found["cross_entropy"] == expected["cross_entropy"]


@pytest.mark.parametrize(
    ("lowest", "weights"), [(True, [8 / 15, 4 / 15, 2 / 15, 1 / 15]), (False, [4 / 7, 2 / 7, 1 / 7, 0])]
)
def test_deep_supervision_halves_to_the_last_level_where_the_plan_says_so(lowest, weights):
    assert deep_supervision_weights(4, lowest=lowest) == pytest.approx(weights)
    assert deep_supervision_weights(1, lowest=lowest) == [1.0]
    outputs = [torch.zeros(1, 2, size, size, requires_grad=True) for size in (16, 8, 4, 2)]
    found = deep_supervision_losses(
        outputs, torch.zeros(1, 16, 16), lambda logits, _: {"mean": logits.mean()}, lowest=lowest
    )
    found["mean"].backward()
    assert [float(output.grad.sum()) for output in outputs] == pytest.approx(weights)


def test_balanced_classes_weigh_as_the_root_of_their_voxels():
    target = torch.zeros(1, 1, 4, 25, dtype=torch.int64)
    target[..., 0, :16] = 1
    target[..., 1, :4] = 2  # 80, 16 and 4 voxels
    logits = torch.zeros(1, 3, 1, 4, 25)
    logits[:, 2] = 1.0
    entropies = -logits[0, :, 0, 0, 0].log_softmax(0)
    counts = torch.tensor([80.0, 16.0, 4.0])
    for balance in (0.0, 0.5, 1.0):
        shares = counts ** (1 - balance) / (counts ** (1 - balance)).sum()
        found = segmentation_losses(logits, target, CLASSES, SegmentationLoss(class_balance=balance))
        assert found["cross_entropy"] == pytest.approx(float((shares * entropies).sum()), rel=1e-5)


def test_balance_counts_neither_ignored_voxels_nor_absent_classes():
    labels = LabelSet.model_validate({"names": {"background": 0, "liver": 1, "spleen": 2}, "ignore": 9})
    target = torch.tensor([0, 0, 0, 1, 9, 9, 9, 9]).view(1, 2, 2, 2)
    logits = torch.randn(1, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    found = segmentation_losses(logits, target, labels, SegmentationLoss(class_balance=1.0))
    entropies = torch.nn.functional.cross_entropy(
        logits.flatten(2)[..., :4], target.flatten(1)[:, :4], reduction="none"
    )
    assert found["cross_entropy"] == pytest.approx(float((entropies[0, :3].mean() + entropies[0, 3]) / 2), rel=1e-5)
