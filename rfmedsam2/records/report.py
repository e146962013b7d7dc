"""Evaluation results: metrics per case and class, and the rules they were computed by."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from rfmedsam2.errors import MissingPackageError
from rfmedsam2.records.base import Record, VersionedRecord


class ClassMetrics(Record):
    """One class (or region) in one case. None: undefined (both masks empty, or a distance to an empty mask)."""

    dsc: float | None
    iou: float | None
    nsd: float | None
    hd95_mm: float | None
    volume_error_ml: float
    """Predicted minus reference volume."""
    relative_volume_error: float | None
    """(predicted - reference) / reference; None without reference voxels."""
    reference_ml: float
    predicted_ml: float


class CaseMetrics(Record):
    """All classes of one case."""

    id: str
    reference: str
    prediction: str
    classes: dict[str, ClassMetrics]


class Interval(Record):
    """A mean over cases with its bootstrap confidence interval."""

    mean: float | None
    low: float | None
    high: float | None
    cases: int
    """Number of cases with a defined value."""


class Evaluation(VersionedRecord):
    """Contents of metrics.json."""

    format: Literal[1] = 1
    nsd_tolerance_mm: float
    empty_policy: str
    """Text: how classes with an empty reference or prediction are scored."""
    confidence: float
    bootstrap_samples: int
    cases: tuple[CaseMetrics, ...]
    classes: dict[str, dict[str, Interval]]
    """Class -> metric -> mean over cases."""
    mean: dict[str, Interval]
    """Metric -> mean over cases of each case's mean over classes."""
    warnings: tuple[str, ...] = ()
    """What was excluded, for instance predictions without a reference."""

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame`, one row per case and class: case, class, and a column for each field of `ClassMetrics`.

        Undefined scores are NaN.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")  # only here: a record loads nothing heavy
        except ImportError:
            raise MissingPackageError("A table needs pandas", remedy="Run pip install pandas") from None
        names = tuple(ClassMetrics.model_fields)
        rows = [
            (case.id, name, *(getattr(scores, field) for field in names))
            for case in self.cases
            for name, scores in case.classes.items()
        ]
        return pandas.DataFrame(rows, columns=["case", "class", *names]).astype(dict.fromkeys(names, float))
