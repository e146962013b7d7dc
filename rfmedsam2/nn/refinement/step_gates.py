"""Learned gates by which SAM 2's masks are added to Step 0's logits.

A gate of 0 leaves Step 0 as it is, whatever the decoder says. Decoders with published weights answer with logits of 20
to 25; added as they are, they would overrule a good Step 0 from the start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StepGates(nn.Module):
    """One gate per step and class, 0 at first.

    The gradient of a gate is that of Step 0's logits times the decoder's, so it opens if the decoder is not silent.

    Args:
        steps: number of steps of SAM 2.
        classes: K, number of classes.
    """

    def __init__(self, steps: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(steps, classes))

    def forward(self, masks: Tensor, classes: Tensor, step: int) -> Tensor:
        """Masks (q, H, W) of objects of `classes` (q,), times their gates in a step (1 or 2)."""
        return masks * self.weight[step - 1, classes][:, None, None]
