"""Results of a paired comparison of two sets of predictions, case by case."""

from __future__ import annotations

from typing import Literal

from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.report import Interval

ComparedMetric = Literal["dsc", "iou", "nsd", "hd95_mm"]


class PairedCase(Record):
    """Scores of one case: class -> metric -> (of A, of B). None: undefined."""

    id: str
    classes: dict[str, dict[ComparedMetric, tuple[float | None, float | None]]]


class PairedMean(Record):
    """One metric over the cases in which it is defined for both A and B."""

    mean_a: float | None
    mean_b: float | None
    difference: Interval
    """Mean of B minus A over cases, with its bootstrap confidence interval."""
    wins: int
    """Number of cases in which B is better: a higher overlap, or a smaller distance."""
    ties: int
    losses: int


class Comparison(VersionedRecord):
    """Contents of comparison.json."""

    format: Literal[1] = 1
    a: str
    """Path of the predictions or the evaluation called A."""
    b: str
    nsd_tolerance_mm: float
    empty_policy: str
    """Text: how classes with an empty reference or prediction are scored."""
    confidence: float
    bootstrap_samples: int
    minimum_cases: int
    """Fewest cases of a confidence interval."""
    cases: tuple[PairedCase, ...]
    classes: dict[str, dict[ComparedMetric, PairedMean]]
    mean: dict[ComparedMetric, PairedMean]
    """Over cases, of each case's means over the classes that are defined for both A and B."""
    only_a: tuple[str, ...] = ()
    """Cases that are left out because B does not have them."""
    only_b: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences on what the figures leave out."""
