"""Means over cases with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rfmedsam2.records.report import CaseMetrics, Interval

METRICS: tuple[str, ...] = ("dsc", "iou", "nsd", "hd95_mm", "volume_error_ml", "relative_volume_error")
"""Metrics that are averaged (volumes are not)."""
CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 2000
MINIMUM_CASES = 5
"""Fewest cases of an interval: the means of resamples of four take at most 35 values, too few for tails of 2.5 %."""


def summarize(
    cases: Sequence[CaseMetrics], classes: Sequence[str], *, seed: int = 0
) -> tuple[dict[str, dict[str, Interval]], dict[str, Interval]]:
    """Means with bootstrap confidence intervals.

    Args:
        cases: scores of each case.
        classes: class names.
        seed: seed of the resampling.

    Returns:
        class -> metric -> mean over cases with a defined value; metric -> mean over cases of each case's mean over its
        defined classes, with the number of classes that are defined in any case.
    """
    table = np.array(
        [[[_number(getattr(case.classes[name], m)) for m in METRICS] for name in classes] for case in cases],
        dtype=float,
    ).reshape(len(cases), len(classes), len(METRICS))
    defined = ~np.isnan(table)
    count = defined.sum(axis=1, keepdims=True)
    total = np.where(defined, table, 0.0).sum(axis=1, keepdims=True)
    overall = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    columns = np.concatenate([table, overall], axis=1)
    intervals = bootstrap(columns.reshape(len(cases), -1), seed=seed)
    rows = [
        dict(zip(METRICS, intervals[i : i + len(METRICS)], strict=True)) for i in range(0, len(intervals), len(METRICS))
    ]
    counted = defined.any(axis=0).sum(axis=0)
    mean = {m: rows[-1][m].model_copy(update={"classes": int(n)}) for m, n in zip(METRICS, counted, strict=True)}
    return dict(zip(classes, rows[:-1], strict=True)), mean


def bootstrap(
    values: np.ndarray, *, samples: int = BOOTSTRAP_SAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> list[Interval]:
    """Percentile bootstrap of the mean over cases, with the same draws for all columns.

    Args:
        values: (cases, columns), NaN where undefined; undefined values are left out of means.
        samples: number of bootstrap samples.
        confidence: fraction of the samples' means inside the interval.
        seed: seed of the draws.

    Returns:
        One interval per column; no mean without defined values, no bounds with fewer than `MINIMUM_CASES`.
    """
    cases, columns = values.shape
    defined = ~np.isnan(values)
    number = defined.sum(axis=0)
    filled = np.where(defined, values, 0.0)
    random = np.random.default_rng(seed)
    draws = random.multinomial(cases, np.full(cases, 1.0 / max(cases, 1)), size=samples).astype(float)
    weight = draws @ defined
    means = np.where(weight > 0, draws @ filled / np.maximum(weight, 1), np.nan)
    tail = (1 - confidence) / 2
    bounds = np.full((2, columns), np.nan)
    enough = number >= MINIMUM_CASES
    if enough.any():
        bounds[:, enough] = np.nanquantile(means[:, enough], [tail, 1 - tail], axis=0)
    return [
        Interval(
            mean=float(filled[:, i].sum() / number[i]) if number[i] else None,
            low=float(bounds[0, i]) if enough[i] else None,
            high=float(bounds[1, i]) if enough[i] else None,
            cases=int(number[i]),
        )
        for i in range(columns)
    ]


def _number(value: float | None) -> float:
    return np.nan if value is None else value
