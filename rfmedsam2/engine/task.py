"""What the engine is given and what it gives back: the task, the run, how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from rfmedsam2.engine.log import StepReport
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.records.checkpoint import TrainedRecord

Batch = TypeVar("Batch")


class Task(Protocol[Batch]):
    """One thing that is trained. Contains no loop, no ranks, no checkpoints, no logging.

    A batch is a tensor, or a dataclass, dict, list or tuple of tensors; where it has `ids` (case ids), a divergence
    names them.
    """

    @property
    def model(self) -> nn.Module:
        """What is saved; already on its device or not."""
        ...

    def optimizer(self) -> Optimizer:
        """Which parameters learn, and how fast; rates are the schedule's factor times these."""
        ...

    def batches(self, start: int) -> Iterable[Batch]:
        """Micro-batches from number `start` on; number i is a function of (seed, rank, i) alone."""
        ...

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named parts, scalars; their sum is minimized."""
        ...

    def validate(self) -> dict[str, float]:
        """Named scores, averaged over the ranks; "score": higher is better."""
        ...


def silent(report: StepReport) -> None:
    """Show nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where a training leaves what it makes.

    Args:
        folder: for checkpoints and metrics; shared by all ranks.
        record: makes the checkpoint's record from (steps done, scores).
        runtime: device and ranks.
        show: called after every step and validation, on the main rank.
        tensorboard: also write TensorBoard events.
    """

    folder: Path
    record: Callable[[int, dict[str, float]], TrainedRecord]
    runtime: Runtime
    show: Callable[[StepReport], None] = silent
    tensorboard: bool = False

    @property
    def kind(self) -> type[TrainedRecord]:
        """Of the checkpoints' records."""
        return type(self.record(0, {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a call of `fit` ended."""

    status: Literal["finished", "stopped"]
    """stopped: by a signal; the same command goes on from there."""
    signal: str | None
    step: int
    epoch: int
    best: float | None
    scores: dict[str, float]
    seconds: float
    """Over all runs of this training."""
