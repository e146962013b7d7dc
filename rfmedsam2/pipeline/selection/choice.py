"""The choice between the best model and the best ensemble: the simpler one unless the other is clearly better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rfmedsam2.pipeline.evaluation.bootstrap import bootstrap
from rfmedsam2.records.report import Evaluation, Interval

Scores = Mapping[str, Sequence[float]]
"""Case -> DSC of every class, NaN where it is undefined."""


def scores_of(evaluation: Evaluation) -> dict[str, tuple[float, ...]]:
    """DSC of every case and class of an evaluation."""
    found = {case.id: [case.classes[name].dsc for name in evaluation.classes] for case in evaluation.cases}
    return {id: tuple(float("nan") if dsc is None else dsc for dsc in row) for id, row in found.items()}


def gain_of(ensemble: Scores, single: Scores) -> Interval:
    """Mean rise of the DSC over the cases of both, and of each over the classes that are defined in both."""
    cases = sorted(set(ensemble) & set(single))
    rises = np.array([_mean(np.subtract(ensemble[case], single[case])) for case in cases], dtype=float)
    return bootstrap(rises.reshape(-1, 1))[0]


def is_clear(gain: Interval) -> bool:
    """Whether the interval of a gain lies above 0; without an interval, of few cases, nothing is clear."""
    return gain.low is not None and gain.low > 0


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
