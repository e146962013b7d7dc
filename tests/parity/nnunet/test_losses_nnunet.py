"""Our losses against nnU-Net's on the same logits and targets: classes, ignore label, regions, deep supervision."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.robust_ce_loss import TopKLoss

from rfmedsam2.losses import deep_supervision_losses, deep_supervision_weights, memberships, segmentation_losses
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import SegmentationLoss

CLASSES = LabelSet(names={"background": 0, "a": 1, "b": 2})
IGNORING = LabelSet(names={"background": 0, "a": 1, "b": 2}, ignore=3)
REGIONS = LabelSet(names={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "tip": 3}, regions_class_order=(1, 2, 3))
REGIONS_IGNORING = REGIONS.model_copy(update={"ignore": 4})


def logits_and_target(labels: LabelSet, shape=(2, 6, 8, 10)):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(shape[0], labels.num_outputs, *shape[1:], generator=rng, requires_grad=True)
    values = torch.tensor(labels.allowed_values)
    target = values[torch.randint(len(values), shape, generator=rng)].to(torch.int16)
    return logits, target


def reference(labels: LabelSet, batch_dice: bool):
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": labels.has_regions, "ddp": False}
    if labels.has_regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=labels.ignore is not None)
    return DC_and_CE_loss(dice, {}, ignore_label=labels.ignore, dice_class=MemoryEfficientSoftDiceLoss)


def nnunet_target(target: torch.Tensor, labels: LabelSet) -> torch.Tensor:
    if not labels.has_regions:
        return target[:, None].float()
    channels = [torch.isin(target, torch.tensor(v, dtype=target.dtype)) for v in labels.foreground.values()]
    if labels.ignore is not None:
        channels.append(target == labels.ignore)
    return torch.stack(channels, 1).float()


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("labels", [CLASSES, IGNORING, REGIONS, REGIONS_IGNORING])
def test_value_and_gradient_equal_nnunets(labels, batch_dice):
    logits, target = logits_and_target(labels)
    ours = sum(segmentation_losses(logits, target, labels, SegmentationLoss(batch_dice=batch_dice)).values())
    (gradient,) = torch.autograd.grad(ours, logits)
    theirs = reference(labels, batch_dice)(logits, nnunet_target(target, labels))
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("batch_dice", [True, False])
def test_top_k_equals_nnunets(batch_dice):
    logits, target = logits_and_target(CLASSES)
    whole = nnunet_target(target, CLASSES)
    ours = segmentation_losses(logits, target, CLASSES, SegmentationLoss(batch_dice=batch_dice, top_k=10))
    (gradient,) = torch.autograd.grad(sum(ours.values()), logits)
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    (expected,) = torch.autograd.grad(DC_and_topk_loss(dice, {"k": 10, "label_smoothing": 0.0})(logits, whole), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(ours["cross_entropy"], TopKLoss(k=10)(logits, whole), rtol=1e-5, atol=1e-6)


def test_top_k_with_an_ignore_label_is_of_the_annotated_voxels():
    """nnU-Net takes a tenth of all voxels; where most are ignored, that is more than are annotated."""
    logits, target = logits_and_target(IGNORING, shape=(1, 4, 5, 10))
    target[:, 1:] = 3
    found = segmentation_losses(logits, target, IGNORING, SegmentationLoss(top_k=10))["cross_entropy"]
    alone = segmentation_losses(logits[:, :, :1], target[:, :1], IGNORING, SegmentationLoss(top_k=10))["cross_entropy"]
    known = target[:, :1] != 3
    entropies = torch.nn.functional.cross_entropy(logits[:, :, :1], target[:, :1].long().clamp(0, 2), reduction="none")
    largest = entropies[known].sort(descending=True).values[: int(known.sum()) // 10]
    assert found.item() == pytest.approx(alone.item()) == pytest.approx(largest.mean().item())


def test_deep_supervision_equals_nnunets():
    outputs = [torch.randn(2, 3, 16 // 2**i, 8 // 2**i, 8 // 2**i) for i in range(3)]
    target = torch.randint(0, 3, (2, 16, 8, 8), dtype=torch.int16)
    loss = partial(segmentation_losses, labels=CLASSES, config=SegmentationLoss(batch_dice=False))
    ours = sum(deep_supervision_losses(outputs, target, loss).values())
    weights = np.array([1, 0.5, 0]) / 1.5
    whole = target[:, None].float()
    levels = [torch.nn.functional.interpolate(whole, o.shape[2:], mode="nearest-exact") for o in outputs]
    theirs = DeepSupervisionWrapper(reference(CLASSES, False), weights)(outputs, levels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_level_weights_halve_and_sum_to_one():
    assert deep_supervision_weights(4) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    assert deep_supervision_weights(1) == [1.0]


def test_all_voxels_ignored_gives_a_finite_loss():
    logits = torch.randn(1, 3, 4, 4, 4)
    target = torch.full((1, 4, 4, 4), 3, dtype=torch.int16)
    for config in (SegmentationLoss(), SegmentationLoss(top_k=10, focal_gamma=2)):
        parts = segmentation_losses(logits, target, IGNORING, config)
        assert all(torch.isfinite(part) for part in parts.values())


def test_memberships_of_nested_regions():
    members = memberships(torch.tensor([[0, 1, 2, 3]]), REGIONS)[0]
    assert members.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
