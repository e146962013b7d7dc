"""The loss of boxes against torchvision's."""

from __future__ import annotations

import torch
from torchvision.ops import generalized_box_iou_loss as official_loss

from rfmedsam2.losses import generalized_box_iou_loss


def boxes(seed: int, count: int = 200) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def test_values_and_gradients_are_torchvisions():
    found, wanted = boxes(0).requires_grad_(), boxes(1)
    found.data[:3] = wanted[:3]  # equal boxes
    found.data[3] = torch.tensor([0.5, 0.5, 0.5, 0.5])  # an empty one
    found.data[4] = torch.tensor([5.0, 6, 7, 8])  # one apart
    mine = generalized_box_iou_loss(found, wanted)
    theirs = official_loss(found, wanted)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss[3:].sum(), found)[0] for loss in (mine, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_no_box_at_all_is_no_loss():
    none = torch.zeros(0, 4)
    assert generalized_box_iou_loss(none, none).sum() == 0
