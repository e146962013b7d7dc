"""torch.compile and DDP, each decided by a dry run of one training step that leaves no trace."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rfmedsam2.engine.rng import preserved
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.system.memory import memory_ran_out
from rfmedsam2.system.private_apis import private

logger = logging.getLogger(__name__)
Loss = Callable[[Any], dict[str, Tensor]]


def compile_model(model: nn.Module, loss: Loss, batch: object, runtime: Runtime) -> bool:
    """Compile the model in place (names of its tensors stay) if a dry run succeeds; else leave it unchanged.

    Returns:
        Whether the model is compiled now.
    """
    # a missing C compiler, headers or Triton show only when code for the first pass is generated
    try:
        model.compile()
        _dry_run(model, loss, batch, runtime)
    except (RuntimeError, ImportError, OSError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        if memory_ran_out(error):
            raise
        first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        logger.warning("torch.compile failed, training continues without it (%s)", first)
        private(model, "_compiled_call_impl", package="torch")  # torch has no way to take compile() back
        model._compiled_call_impl = None
        model.zero_grad(set_to_none=True)
        return False
    return True


def wrap_ddp(model: nn.Module, loss: Loss, batch: object, runtime: Runtime) -> DistributedDataParallel:
    """Wrap a task's loss so that the ranks' gradients are averaged; called with a batch it gives the loss parts.

    A batch may leave parameters unused, and different ones on each rank. If the first batch leaves any unused on any
    rank, DDP searches the graph of every step for them (`find_unused_parameters`). Otherwise the search would be wasted
    almost always, so every parameter is tied to the loss instead, and unused ones get a gradient of zero.
    """
    missing = _dry_run(model, loss, batch, runtime)
    if missing:
        logger.info("%d parameters get no gradient from the loss, for instance %s", len(missing), missing[0])
    search = runtime.any(bool(missing))
    return DistributedDataParallel(_LossModule(model, loss, tied=not search), find_unused_parameters=search)


class _LossModule(nn.Module):
    """The task's loss as a module, so that DDP covers the whole forward pass and tasks need not know about ranks."""

    def __init__(self, model: nn.Module, loss: Loss, *, tied: bool) -> None:
        super().__init__()
        self.model = model
        self._loss, self._tied = loss, tied

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Compute the task's loss parts."""
        parts = self._loss(batch)
        if self._tied:
            name, part = next(iter(parts.items()))
            learning = [p for p in self.model.parameters() if p.requires_grad]
            parts = parts | {name: _Tied.apply(part, *learning)}
        return parts


class _Tied(torch.autograd.Function):
    """A loss as it is, with parameters in its graph that get no gradient from here.

    DDP waits for the hook of every parameter; the hook runs for a gradient that is not there, too. No value of a
    parameter is read, so this costs nothing and one that is not finite cannot spread.
    """

    @staticmethod
    def forward(_ctx: Any, loss: Tensor, *_parameters: Tensor) -> Tensor:
        """Give the loss."""
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Pass the gradient to the loss alone."""
        return grads[0], *[None] * (len(ctx.needs_input_grad) - 1)


def _dry_run(model: nn.Module, loss: Loss, batch: object, runtime: Runtime) -> list[str]:
    """Run one step; returns the parameters without gradient. RNG state and buffers are restored, gradients dropped."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with preserved(runtime.device):
        try:
            with runtime.autocast():
                parts = loss(batch)
            torch.stack([part.float() for part in parts.values()]).sum().backward()
            return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        finally:
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
