"""The RFMedSAM 2 task: losses of the slices that a step drew."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rfmedsam2.losses import segmentation_losses
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import SegmentationLoss
from rfmedsam2.tasks.refinement_losses import losses_of_part

LABELS = LabelSet(names={"background": 0, "a": 1, "b": 2})


@pytest.mark.parametrize("together", [True, False])
def test_only_the_frames_that_were_drawn_count(together: bool) -> None:
    loss = partial(segmentation_losses, labels=LABELS, config=SegmentationLoss(batch_dice=together))
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, 6, 8, 8, generator=draw, requires_grad=True)
    target = torch.randint(3, (3, 6, 8, 8), generator=draw)
    frames = torch.zeros(3, 6, dtype=torch.bool)
    frames[0, 1:4] = frames[2, 3:5] = True
    found = losses_of_part(logits, target, frames.flatten(), loss, together=together)
    sum(found.values()).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum((1, 3, 4)) > 0, frames)
    drawn = ((0, slice(1, 4)), (2, slice(3, 5)))
    first, last = ((logits[b : b + 1, :, part], target[b : b + 1, part]) for b, part in drawn)
    if together:
        expected = loss(torch.cat([first[0], last[0]], 2), torch.cat([first[1], last[1]], 1))
    else:
        expected = {name: (loss(*first)[name] + loss(*last)[name]) / 2 for name in found}
    for name, part in found.items():
        torch.testing.assert_close(part, expected[name])


def test_all_frames_are_the_loss_of_the_patch() -> None:
    loss = partial(segmentation_losses, labels=LABELS, config=SegmentationLoss())
    logits, target = torch.randn(2, 3, 4, 8, 8), torch.randint(3, (2, 4, 8, 8))
    found = losses_of_part(logits, target, torch.ones(8, dtype=torch.bool), loss, together=True)
    for name, part in loss(logits, target).items():
        torch.testing.assert_close(found[name], part)
