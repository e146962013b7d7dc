"""A step's figures on their way from the device: sent without waiting, averaged over the ranks, read later.

The wishes of any rank to stop or to save travel with them, so that all ranks act at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfmedsam2.engine.runtime import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What one step came to, the same on every rank."""

    losses: dict[str, float]
    gradient_norm: float
    stop: bool
    save: bool

    @property
    def finite(self) -> bool:
        """Neither a loss nor the gradient is infinite or not a number."""
        return all(abs(value) < float("inf") for value in (*self.losses.values(), self.gradient_norm))


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingMetrics:
    """One step whose figures may still be on their way.

    Attributes:
        number: of the step, from 0.
        ids: cases of this rank's batches.
        lr: learning rate of the first group.
        seconds: between the ends of the step before and of this one.
        names: of the loss parts.
        values: losses, gradient norm, stop, save.
        ready: when `values` have arrived; None: they are here.
    """

    number: int
    ids: tuple[str, ...]
    lr: float
    seconds: float
    names: tuple[str, ...]
    values: Tensor
    ready: torch.cuda.Event | None

    def read(self) -> StepMetrics:
        """Wait for the figures."""
        if self.ready is not None:
            self.ready.synchronize()
        *losses, norm, stop, save = self.values.tolist()
        named = dict(zip(self.names, losses, strict=True))
        return StepMetrics(losses=named, gradient_norm=norm, stop=stop > 0, save=save > 0)


def reduce_async(values: Tensor, flags: tuple[bool, bool], runtime: Runtime) -> tuple[Tensor, torch.cuda.Event | None]:
    """Average over the ranks and start the copy to the CPU.

    Args:
        values: (n,) float32 on the device.
        flags: this rank is asked to stop, to save.
        runtime: device and ranks.

    Returns:
        (n + 2,) float32 on the CPU, and the event after which it may be read (None: at once).
    """
    packed = torch.tensor(flags, dtype=torch.float32)
    mean = runtime.mean(torch.cat([values, packed.to(runtime.device, non_blocking=True)]))
    if runtime.device.type != "cuda":
        return mean, None
    host = torch.empty(mean.shape, pin_memory=True).copy_(mean, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
