"""Optimizers: SGD and AdamW, built from the plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from typing_extensions import assert_never

from rfmedsam2.records.plan import AdamW, Sgd, TrainConfig


def build_optimizer(parameters: Iterable[torch.Tensor] | Iterable[dict[str, Any]], config: TrainConfig) -> Optimizer:
    """Build the plan's optimizer for the trainable parameters.

    Args:
        parameters: tensors, or groups as torch takes them ("params", optionally "lr", "weight_decay"); tensors that
            do not require a gradient are left out.
        config: kind, learning rate and weight decay.
    """
    groups = [p if isinstance(p, dict) else {"params": [p]} for p in parameters]
    if all(len(g) == 1 for g in groups):
        groups = [{"params": [p for g in groups for p in g["params"]]}]
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    rate, decay = config.learning_rate, config.weight_decay
    match config.optimizer:
        case Sgd(momentum=momentum, nesterov=nesterov):
            return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=nesterov, weight_decay=decay)
        case AdamW(betas=betas, eps=eps):
            return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, weight_decay=decay)
        case _:
            assert_never(config.optimizer)
