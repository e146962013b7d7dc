"""Optimizers: SGD, Adam, AdamW and Adan, built from the plan."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import assert_never

from rfmedsam2.errors import PlanError, shortlist
from rfmedsam2.records.training import Adam, AdamW, Adan, Sgd, TrainConfig


def freeze(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Freeze the parameters whose learning rate has a factor of 0 (`TrainConfig.rate_factors`).

    Raises:
        PlanError: a name fits no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in factors:
        if not any(name.startswith(part) for name in names):
            there = sorted({name.partition(".")[0] + "." for name in names})
            raise PlanError(
                "No parameter of the network has such a name",
                where=f"train.rate_factors, {part}",
                expected=f"a beginning such as {shortlist(there)}",
            )
    for name, parameter in model.named_parameters():
        if _factor(name, factors) == 0:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError("The plan freezes the whole network", where=f"train.rate_factors, {dict(factors)}")


def rate_groups(named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one learning rate, by `config.rate_factors`."""
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault(_factor(name, config.rate_factors), []).append(parameter)
    own = {f: {"params": parameters, "lr": f * config.learning_rate} for f, parameters in groups.items() if f != 1}
    return [{"params": groups[1.0]}, *(own[f] for f in sorted(own))]


def _factor(name: str, factors: Mapping[str, float]) -> float:
    """Factor of a parameter's learning rate: that of the longest beginning of its name."""
    return factors[max(fitting, key=len)] if (fitting := [part for part in factors if name.startswith(part)]) else 1.0


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
        case AdamW() | Adam() as own:
            kind = torch.optim.AdamW if isinstance(own, AdamW) else torch.optim.Adam
            return kind(groups, lr=rate, betas=own.betas, eps=own.eps, weight_decay=decay, amsgrad=own.amsgrad)
        case Adan(betas=betas, eps=eps):
            # timm takes longer to import than all else that a training needs
            adan = importlib.import_module("timm.optim").Adan
            return adan(groups, lr=rate, betas=betas, eps=eps, weight_decay=decay)
        case _:
            assert_never(config.optimizer)
