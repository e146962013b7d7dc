"""Focal loss and Tversky index against MONAI's: classes, regions, ignore label."""

from __future__ import annotations

import pytest
import torch
from monai.losses import FocalLoss, TverskyLoss

from rfmedsam2.losses import memberships, segmentation_losses
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import SegmentationLoss

CLASSES = LabelSet(names={"background": 0, "a": 1, "b": 2})
REGIONS = LabelSet(names={"background": 0, "whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
IGNORING = CLASSES.model_copy(update={"ignore": 3})
REGIONS_IGNORING = REGIONS.model_copy(update={"ignore": 3})
ALL = [CLASSES, REGIONS, IGNORING, REGIONS_IGNORING]


def drawn(labels: LabelSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, target, and members and mask for MONAI."""
    rng = torch.Generator().manual_seed(2)
    logits = torch.randn(2, labels.num_outputs, 5, 6, 7, generator=rng, requires_grad=True)
    target = torch.randint(len(labels.allowed_values), (2, 5, 6, 7), generator=rng)
    mask = (target != (-9 if labels.ignore is None else labels.ignore))[:, None].float()
    return logits, target, memberships(torch.where(mask[:, 0] > 0, target, 0), labels).float(), mask


@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("labels", ALL)
def test_focal_loss(labels, gamma):
    logits, target, members, mask = drawn(labels)
    ours = segmentation_losses(logits, target, labels, SegmentationLoss(focal_gamma=gamma))["cross_entropy"]
    theirs = FocalLoss(gamma=gamma, use_softmax=not labels.has_regions, reduction="none")(logits, members) * mask
    # MONAI averages over channels, of which the softmax has one that counts; with a mask, ours sums them up
    channels = labels.num_outputs if labels.ignore is not None or not labels.has_regions else 1
    expected = theirs.sum() / (mask.sum() * labels.num_outputs) * channels
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    one, two = (torch.autograd.grad(loss, logits)[0] for loss in (ours, expected))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (1.0, 1.0)])
@pytest.mark.parametrize("labels", ALL)
def test_tversky_index(labels, weights, batch):
    logits, target, members, mask = drawn(labels)
    config = SegmentationLoss(tversky=weights, batch_dice=batch, dice_smooth=0.02)
    ours = segmentation_losses(logits, target, labels, config)["dice"]
    probabilities = logits.sigmoid() if labels.has_regions else logits.softmax(1)
    theirs = TverskyLoss(
        include_background=labels.has_regions,
        alpha=weights[0],
        beta=weights[1],
        smooth_nr=0.01,  # of the overlap, not of twice the overlap
        smooth_dr=0.01,
        batch=batch,
    )(probabilities * mask, members * mask)
    torch.testing.assert_close(ours, theirs - 1, rtol=1e-4, atol=1e-6)
    one, two = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-7)


def test_a_certain_voxel_has_a_finite_gradient():
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True).view(1, 3, 1, 1, 1)
    parts = segmentation_losses(logits, torch.zeros(1, 1, 1, 1), CLASSES, SegmentationLoss(focal_gamma=0.5))
    (gradient,) = torch.autograd.grad(parts["cross_entropy"], logits)
    assert torch.isfinite(gradient).all()
