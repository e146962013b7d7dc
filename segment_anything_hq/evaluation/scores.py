"""What an evaluation found, whatever the protocol: figures of sets and samples, the worst cases; and its CSV."""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rfmedsam2.store.atomic import write_text
from segment_anything_hq.data.datasets import Fault, Sample
from segment_anything_hq.prompts.clicks import Click

WORST = 6
"""Worst cases that are kept with their masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """How a figure is shown."""

    name: str
    title: str
    meaning: str
    unit: str = ""
    digits: int = 2
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScore:
    """Figures of one sample, by the names of the sample columns; None where a figure is undefined."""

    set: str
    id: str
    values: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A sample with what was predicted for it.

    Attributes:
        set: its set's name.
        sample: where picture and truth are.
        score: the figure that it is ranked by, lower is worse.
        prediction: (H, W) bool.
        clicks: point prompts in the order they were made.
        box: (4,) xyxy, pixels; None: no box was given.
    """

    set: str
    sample: Sample
    score: float
    prediction: np.ndarray
    clicks: tuple[Click, ...] = ()
    box: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line in the page's chart."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """The page's chart; y runs from 0 to 1."""

    title: str
    x_title: str
    y_title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one protocol found on one or more sets.

    Attributes:
        protocol: the rules, in words.
        columns: figures of `sets` and `overall`.
        sets: set name -> figure name -> value.
        overall: figure name -> value over all sets; `overall_rule` says how.
        overall_rule: in words.
        sample_columns: figures of `samples`; the first is what cases are ranked by.
        samples: one entry a sample.
        chart: what the page draws.
        worst: the worst cases, worst first.
        skipped: samples that could not be evaluated, and why.
    """

    protocol: str
    columns: tuple[Column, ...]
    sets: dict[str, dict[str, float]]
    overall: dict[str, float]
    overall_rule: str
    sample_columns: tuple[Column, ...]
    samples: tuple[SampleScore, ...]
    chart: Chart
    worst: tuple[Case, ...]
    skipped: tuple[Fault, ...] = ()


@dataclass(slots=True)
class WorstK:
    """The worst cases seen so far: no more masks are kept than are shown."""

    most: int = WORST
    _heap: list[tuple[float, int, Case]] = field(default_factory=list)
    _seen: int = 0

    def update(self, case: Case) -> None:
        """Keep a case if it is among the worst."""
        self._seen += 1
        # of equally bad cases the first stays
        entry = (-case.score, -self._seen, case)
        if len(self._heap) < self.most:
            heapq.heappush(self._heap, entry)
        elif self._heap:
            heapq.heappushpop(self._heap, entry)

    def cases(self) -> tuple[Case, ...]:
        """Worst first."""
        return tuple(entry[2] for entry in sorted(self._heap, key=lambda e: e[:2], reverse=True))


def mean(values: Sequence[float]) -> float:
    """Mean; not a number where there is nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def write_csv(path: Path, evaluation: Evaluation) -> None:
    """Write one row a sample, atomically.

    Raises:
        StoreError: the file cannot be written.
    """
    names = list(dict.fromkeys(name for s in evaluation.samples for name in s.values))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["set", "id", *names])
    for sample in evaluation.samples:
        values = (sample.values.get(name) for name in names)
        writer.writerow([sample.set, sample.id, *("" if v is None else f"{v:.6g}" for v in values)])
    write_text(path, stream.getvalue())
