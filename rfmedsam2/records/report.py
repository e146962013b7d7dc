"""Evaluation results: metrics per case and class, the rules they were computed by, and paired comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import Field

from rfmedsam2.choices import ComparedMetric
from rfmedsam2.errors import MissingPackageError, shortlist
from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PostprocessingRule
from rfmedsam2.system.file_names import Name

TITLES: dict[ComparedMetric, str] = {"dsc": "DSC", "iou": "IoU", "nsd": "NSD", "hd95_mm": "HD95"}
LOWER_IS_BETTER: tuple[ComparedMetric, ...] = ("hd95_mm",)
Score = Annotated[float, Field(ge=0, le=1 + 1e-6)]
"""From 0 to 1, but for the rounding of sums; not NaN."""


class ClassMetrics(Record):
    """One class (or region) in one case. None: undefined (both masks empty, or a distance to an empty mask)."""

    dsc: Score | None
    iou: Score | None
    nsd: Score | None
    hd95_mm: Annotated[float, Field(ge=0)] | None
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
    reference_sha256: str | None = None
    """Of the label map that was scored against, with its data files; None in evaluations of earlier versions."""
    prediction_sha256: str | None = None


class Interval(Record):
    """A mean over cases with its bootstrap confidence interval."""

    mean: float | None
    low: float | None
    high: float | None
    cases: int
    """Number of cases with a defined value."""
    classes: int | None = None
    """Of a mean over classes: number of classes with a defined value in any case."""


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
    minimum_cases: int = 2
    """Fewest cases of a confidence interval."""
    trained_on: tuple[str, ...] = ()
    """Scored cases that the model was trained on."""
    labels: LabelSet | None = None
    """What the values of the label maps mean; None in evaluations of earlier versions."""

    def notes(self) -> tuple[str, ...]:
        """Sentences on what the scores do not say: training cases, undefined scores, intervals that are left out."""
        return tuple(note for note in (self._on_training(), *self._on_undefined(), self._on_intervals()) if note)

    def _on_training(self) -> str | None:
        if not self.trained_on:
            return None
        named = "" if len(self.trained_on) == len(self.cases) else f" ({shortlist(self.trained_on)})"
        return (
            f"The model was trained on {len(self.trained_on)} of these {len(self.cases)} cases{named}: "
            "scores of training cases do not tell how well it segments new ones."
        )

    def _on_undefined(self) -> Iterator[str]:
        scores = [(name, found) for case in self.cases for name, found in case.classes.items()]
        defined: dict[ComparedMetric, tuple[int, int]] = {}
        for metric in TITLES:
            names = [name for name, found in scores if getattr(found, metric) is not None]
            defined[metric] = (len(names), len(set(names)))
        return on_undefined(defined, len(scores), len(self.classes))

    def _on_intervals(self) -> str | None:
        means = [*self.mean.values(), *(mean for found in self.classes.values() for mean in found.values())]
        if not any(0 < mean.cases < self.minimum_cases for mean in means):
            return None
        return f"Confidence intervals of fewer than {self.minimum_cases} cases are left out."

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame`, one row per case and class: case, class, and a column for each field of `ClassMetrics`.

        Undefined scores are NaN.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = _pandas()
        names = tuple(ClassMetrics.model_fields)
        rows = [
            (case.id, name, *(getattr(scores, field) for field in names))
            for case in self.cases
            for name, scores in case.classes.items()
        ]
        return pandas.DataFrame(rows, columns=["case", "class", *names]).astype(dict.fromkeys(names, float))


def on_undefined(
    defined: Mapping[ComparedMetric, tuple[int, int]],
    scores: int,
    classes: int,
    *,
    what: str = "scores",
    where: str = "",
) -> Iterator[str]:
    """Sentences on undefined scores, one for all metrics with the same numbers.

    Args:
        defined: metric -> numbers of defined scores, and of classes with one in any case.
        scores: number of all scores.
        classes: number of all classes.
        what: what is counted.
        where: words on where the others are undefined.
    """
    alike: dict[tuple[int, int], list[str]] = {}
    for metric, counts in defined.items():
        alike.setdefault(counts, []).append(TITLES[metric])
    for (count, some), titles in alike.items():
        if count < scores:
            yield (
                f"Means of {', '.join(titles)} count {count} of {scores} {what} and {some} of {classes} classes; "
                f"the others are undefined{where}."
            )


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


class CandidateScore(Record):
    """Scores of one candidate in one fold, or pooled over the cases of all folds, of one class or their mean."""

    candidate: str
    fold: str
    """Name of a fold, or "all"."""
    name: str
    """A class or region, or "mean"."""
    dsc: float | None
    iou: float | None
    nsd: float | None
    hd95_mm: float | None
    cases: int
    """Number of cases with a defined DSC."""


class Candidate(Record):
    """A trained model whose folds were all validated, or an ensemble of two of them."""

    name: Name
    """PLAN__STAGE, its folder in the results of the dataset; of an ensemble PLAN__STAGE+PLAN__STAGE."""
    members: tuple[Name, ...] = ()
    """Of an ensemble, its models."""
    dsc: Interval
    """Mean over the cases of all folds of each case's mean over classes, undefined scores left out."""
    difference: Interval
    """Mean over cases of its DSC minus the selected candidate's, with its bootstrap confidence interval."""
    rule: PostprocessingRule | None = None
    """What was learned for it; None: no step raised its scores, or nothing was learned."""
    unprocessed_dsc: float | None = None
    """If a rule was to be learned, the mean over classes of means over cases of its DSC without the rule."""
    postprocessed_dsc: float | None = None
    """The same with the rule."""


class Selection(VersionedRecord):
    """Contents of selection.json: what cross-validation says of all trained models of a dataset."""

    format: Literal[1] = 1
    dataset: Name
    folds: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    """The selected one first, then by their mean DSC."""
    left_out: dict[str, str]
    """Model -> which of the folds it lacks."""
    scores: tuple[CandidateScore, ...]
    rule: PostprocessingRule | None
    """What was learned for the selected candidate; None: no step raised its scores, or nothing was learned."""
    postprocessed_dsc: float | None = None
    """Mean DSC of the selected candidate with the rule, over classes of means over cases."""
    unprocessed_dsc: float | None = None
    """The same without the rule."""
    ensemble_gain: Interval | None = None
    """Mean over cases of the DSC of the best ensemble minus that of the best single model, each with its rule."""
    notes: tuple[str, ...] = ()

    @property
    def winner(self) -> str:
        """Name of the selected candidate."""
        return self.candidates[0].name

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row per candidate, fold and class; undefined scores are NaN.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = _pandas()
        metrics = ["dsc", "iou", "nsd", "hd95_mm"]
        frame = pandas.DataFrame([score.model_dump() for score in self.scores], columns=[*CandidateScore.model_fields])
        return frame.astype(dict.fromkeys(metrics, float))


def _pandas() -> Any:
    try:
        return import_module("pandas")  # only here: a record loads nothing heavy
    except ImportError:
        raise MissingPackageError("A table needs pandas", remedy="Run pip install pandas") from None
