"""Metrics of a step: averaged over the ranks and copied from the device asynchronously, read later.

The stop and save flags of every rank are reduced in the same all-reduce, so that all ranks act at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfmedsam2.engine.runtime import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Metrics of one step, equal on every rank."""

    losses: dict[str, float]
    gradient_norm: float
    stop: bool
    save: bool

    @property
    def finite(self) -> bool:
        """Whether all losses and the gradient norm are finite."""
        return all(abs(value) < float("inf") for value in (*self.losses.values(), self.gradient_norm))


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingMetrics:
    """One step whose metrics may still be on the device.

    Attributes:
        number: number of the step, from 0.
        ids: cases of this rank's batches.
        lr: learning rate of the first parameter group.
        seconds: time between the ends of the previous step and this one.
        names: names of the loss parts.
        values: losses, gradient norm, stop, save.
        ready: event after which `values` can be read; None: at once.
    """

    number: int
    ids: tuple[str, ...]
    lr: float
    seconds: float
    names: tuple[str, ...]
    values: Tensor
    ready: torch.cuda.Event | None

    def read(self) -> StepMetrics:
        """Wait for the metrics and return them."""
        if self.ready is not None:
            self.ready.synchronize()
        *losses, norm, stop, save = self.values.tolist()
        named = dict(zip(self.names, losses, strict=True))
        return StepMetrics(losses=named, gradient_norm=norm, stop=stop > 0, save=save > 0)


def reduce_async(values: Tensor, flags: tuple[bool, bool], runtime: Runtime) -> tuple[Tensor, torch.cuda.Event | None]:
    """Average values over the ranks and start the copy to the CPU.

    Args:
        values: (n,) float32 on the device.
        flags: whether this rank was asked to stop, and to save.
        runtime: device and ranks.

    Returns:
        (n + 2,) float32 on the CPU, and the event after which it can be read (None: at once).
    """
    packed = torch.tensor(flags, dtype=torch.float32)
    mean = runtime.mean(torch.cat([values, packed.to(runtime.device, non_blocking=True)]))
    if runtime.device.type != "cuda":
        return mean, None
    host = torch.empty(mean.shape, pin_memory=True).copy_(mean, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
