"""How work tells how far it is: one protocol for cases, tiles, slices, patches and training steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step, or the validation after it (`scores`)."""

    step: int
    """Steps done."""
    total: int
    epoch: int
    loss: float
    lr: float
    seconds: float
    eta_seconds: float
    memory_mb: float | None
    """Peak memory on the GPU, None without one."""
    scores: dict[str, float] | None = None


class Track(Protocol):
    """Shows progress. Calls may be nested: cases, and within a case its tiles."""

    def __call__(self, items: Iterable[T], description: str, total: int, /) -> Iterable[T]:
        """Pass `items` through; an item counts as done when the next one is asked for.

        Args:
            items: what is worked on.
            description: what the items are, or what is done with them: "Predicting", "tiles".
            total: their number.
        """
        ...

    def step(self, report: StepReport, /) -> None:
        """Show a training step or a validation's scores."""
        ...


class Silent:
    """Shows nothing."""

    def __call__(self, items: Iterable[T], description: str, total: int, /) -> Iterable[T]:  # noqa: ARG002
        """Pass `items` through."""
        return items

    def step(self, report: StepReport, /) -> None:
        """Show nothing."""


class OnStep(Silent):
    """Hands every training step and validation to a function, and shows nothing else."""

    def __init__(self, function: Callable[[StepReport], None]) -> None:
        self._function = function

    def step(self, report: StepReport, /) -> None:
        """Call the function."""
        self._function(report)


silent = Silent()


class Speed:
    """Recent speed: what is older than half a minute, or than a few units where those take longer, fades away."""

    MEMORY_SECONDS = 30.0
    MOST_FORGOTTEN = 0.2
    """Of the past, by one addition: at least about five of them count."""

    def __init__(self) -> None:
        self._units = self._seconds = 0.0

    def add(self, units: float, seconds: float) -> None:
        """Record `units` of work that took `seconds`."""
        kept = math.exp(-min(max(seconds, 0.0) / self.MEMORY_SECONDS, self.MOST_FORGOTTEN))
        self._units, self._seconds = self._units * kept + units, self._seconds * kept + seconds

    @property
    def seconds_per_unit(self) -> float | None:
        """None before the first unit is done."""
        return self._seconds / self._units if self._units > 0 else None
