"""Results of any protocol: metrics of sets and samples, the worst predictions; and the CSV file."""

from __future__ import annotations

import heapq
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rfmedsam2.system.atomic import write_text
from rfmedsam2.system.csv_text import write_rows
from segment_anything_hq.data.datasets import Fault, Sample
from segment_anything_hq.prompts.prompt import Prompt

WORST = 6
"""Number of worst predictions kept with their masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """How a metric is displayed."""

    name: str
    title: str
    meaning: str
    unit: str = ""
    digits: int = 2
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScore:
    """Metrics of one sample by column name; None where a metric is undefined."""

    set: str
    id: str
    values: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrediction:
    """A sample with its predicted mask and the prompts for it.

    Attributes:
        set: name of the sample's set.
        sample: the sample, for its image and ground truth.
        score: the metric that samples are ranked by; lower is worse.
        prediction: (H, W) bool.
        prompt: clicks and box that it was prompted with.
    """

    set: str
    sample: Sample
    score: float
    prediction: np.ndarray
    prompt: Prompt = field(default_factory=Prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of the report's chart."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """The report's chart; y runs from 0 to 1."""

    title: str
    x_title: str
    y_title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolResult:
    """Results of one protocol on one or more sets.

    Attributes:
        protocol: the protocol in words.
        columns: metrics of `sets` and `overall`.
        sets: set name -> metric name -> value.
        overall: metric name -> value over all sets.
        overall_rule: how `overall` is computed, in words.
        sample_columns: metrics of `samples`; samples are ranked by the first.
        samples: one entry per sample.
        chart: the report's chart.
        worst: the worst predictions, worst first.
        skipped: samples that could not be evaluated, with the reason.
    """

    protocol: str
    columns: tuple[Column, ...]
    sets: dict[str, dict[str, float]]
    overall: dict[str, float]
    overall_rule: str
    sample_columns: tuple[Column, ...]
    samples: tuple[SampleScore, ...]
    chart: Chart
    worst: tuple[SamplePrediction, ...]
    skipped: tuple[Fault, ...] = ()


@dataclass(slots=True)
class WorstK:
    """The k predictions with the lowest scores so far; all other masks are dropped."""

    k: int = WORST
    _heap: list[tuple[float, int, SamplePrediction]] = field(default_factory=list)
    _seen: int = 0

    def update(self, prediction: SamplePrediction) -> None:
        """Keep a prediction if it is among the worst."""
        self._seen += 1
        # among equal scores the first is kept
        entry = (-prediction.score, -self._seen, prediction)
        if len(self._heap) < self.k:
            heapq.heappush(self._heap, entry)
        elif self._heap:
            heapq.heappushpop(self._heap, entry)

    def worst_first(self) -> tuple[SamplePrediction, ...]:
        """The kept predictions in order."""
        return tuple(entry[2] for entry in sorted(self._heap, key=lambda e: e[:2], reverse=True))


def mean(values: Sequence[float]) -> float:
    """Mean; NaN if there are no values."""
    return float(np.mean(values)) if len(values) else float("nan")


def write_csv(path: Path, evaluation: ProtocolResult) -> None:
    """Write one row per sample, atomically.

    Raises:
        StoreError: the file cannot be written.
    """
    names = list(dict.fromkeys(name for s in evaluation.samples for name in s.values))
    stream = io.StringIO()
    rows: list[list[str]] = [["set", "id", *names]]
    for sample in evaluation.samples:
        values = (sample.values.get(name) for name in names)
        rows.append([sample.set, sample.id, *("" if v is None else f"{v:.6g}" for v in values)])
    write_rows(stream, rows, line_end="\n")
    write_text(path, stream.getvalue())
