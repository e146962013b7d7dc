"""Interface of the engine: `Task` (what is trained), `Run` (where), `Progress` (how it ended)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rfmedsam2.engine.checkpoint import provenance
from rfmedsam2.engine.monitoring.trackers import Tracking
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.records.checkpoint import TaskRecord, TrainedRecord
from rfmedsam2.system.progress import Track, silent

Batch = TypeVar("Batch")


class Task(Protocol[Batch]):
    """What is trained. Contains no loop, no ranks, no checkpoints, no logging.

    A batch is a tensor, or a dataclass, dict, list or tuple of tensors; if it has `ids` (case ids), they are named when
    training diverges.
    """

    @property
    def model(self) -> nn.Module:
        """The model to train and save, on any device."""
        ...

    def optimizer(self) -> Optimizer:
        """The optimizer; its learning rates are multiplied by the schedule's factor."""
        ...

    def batches(self, start: int) -> Iterable[Batch]:
        """Micro-batches from number `start` on; number i depends only on (seed, rank, i)."""
        ...

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named loss parts, scalars; their sum is minimized."""
        ...

    def validate(self) -> dict[str, float]:
        """Named scores, averaged over the ranks; "score" selects the best checkpoint (higher is better)."""
        ...


def plain_record(step: int, scores: dict[str, float]) -> TrainedRecord:
    """Make the record of a checkpoint that says nothing of what was trained."""
    return TaskRecord(step=step, scores=scores, **provenance())


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Output and runtime of a training.

    Args:
        folder: folder of checkpoints and metrics; shared by all ranks.
        record: makes the checkpoint's record from (completed steps, scores).
        runtime: device and ranks (`runtime.start_runtime`); by default one process on the CPU.
        track: shows every step and validation, on the main rank.
        tracking: trackers that get the metrics, on the main rank.
    """

    folder: Path
    record: Callable[[int, dict[str, float]], TrainedRecord] = plain_record
    runtime: Runtime = field(default_factory=lambda: Runtime(device=torch.device("cpu")))
    track: Track = silent
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))  # programs give text, too

    @property
    def kind(self) -> type[TrainedRecord]:
        """Class of the checkpoints' records."""
        return type(self.record(0, {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Result of a call of `fit`."""

    status: Literal["finished", "stopped"]
    """stopped: by a signal; the same command resumes."""
    signal: str | None
    """The signal that stopped it; None: not stopped, or another rank got it."""
    step: int
    epoch: int
    best: float | None
    scores: dict[str, float]
    seconds: float
    """Seconds over all runs of this training."""
