"""Losses where nnU-Net has no counterpart: marks of voxels outside a volume."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.losses import memberships, segmentation_losses
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
