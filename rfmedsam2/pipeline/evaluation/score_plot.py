"""Charts of scores by class: all cases of one evaluation, or the differences between two."""

from __future__ import annotations

import numpy as np

from rfmedsam2.choices import ComparedMetric
from rfmedsam2.records.report import LOWER_IS_BETTER, TITLES, Comparison, Evaluation
from rfmedsam2.reporting.training_curves import INK, SERIES, Theme, as_png, new_figure, styled


def spread_png(evaluation: Evaluation, metric: str, label: str, *, theme: Theme = "light") -> bytes:
    """One row per class: a dot per case, and the mean with its confidence interval, as PNG."""
    names = list(evaluation.classes)
    figure = new_figure((9.0, 0.9 + 0.42 * len(names)), theme)
    ax = figure.subplots()
    styled(ax, theme)
    random = np.random.default_rng(0)
    for row, name in enumerate(names):
        found = [getattr(case.classes[name], metric) for case in evaluation.cases]
        values = np.asarray([v for v in found if v is not None], dtype=float)
        ax.scatter(values, row + random.uniform(-0.22, 0.22, len(values)), s=16, color=SERIES[0], alpha=0.45, lw=0)
        interval = evaluation.classes[name][metric]
        if interval.mean is None:
            continue
        if interval.low is not None and interval.high is not None:
            ax.plot([interval.low, interval.high], [row, row], color=SERIES[1], lw=3.5, solid_capstyle="round")
        ax.plot([interval.mean], [row], "D", color=SERIES[1], ms=6, mec=INK[theme][2], mew=1.0)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    if metric in ("dsc", "iou", "nsd"):
        low = min(ax.get_xlim()[0], 0.9)
        ax.set_xlim(max(low, -0.02), 1.01)
    ax.set_xlabel(label)
    return as_png(figure)


def differences_png(comparison: Comparison, metric: ComparedMetric, *, theme: Theme = "light") -> bytes:
    """One row per class and one for their mean: a dot per case at B minus A, and the mean with its interval, as PNG."""
    rows = {**{name: means[metric] for name, means in comparison.classes.items()}, "mean": comparison.mean[metric]}
    figure = new_figure((9.0, 1.1 + 0.42 * len(rows)), theme)
    ax = figure.subplots()
    styled(ax, theme)
    ax.axvline(0.0, color=INK[theme][0], lw=1.0)
    random = np.random.default_rng(0)
    for row, (name, mean) in enumerate(rows.items()):
        pairs = [case.classes[name][metric] for case in comparison.cases if name in case.classes]
        values = np.asarray([b - a for a, b in pairs if a is not None and b is not None], dtype=float)
        ax.scatter(values, row + random.uniform(-0.22, 0.22, len(values)), s=16, color=SERIES[0], alpha=0.45, lw=0)
        found = mean.difference
        if found.mean is None:
            continue
        if found.low is not None and found.high is not None:
            ax.plot([found.low, found.high], [row, row], color=SERIES[1], lw=3.5, solid_capstyle="round")
        ax.plot([found.mean], [row], "D", color=SERIES[1], ms=6, mec=INK[theme][2], mew=1.0)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    better = "left" if metric in LOWER_IS_BETTER else "right"
    unit = ", mm" if metric.endswith("_mm") else ""
    ax.set_xlabel(f"{TITLES[metric]}{unit}: B minus A in each case (B is better on the {better})")
    return as_png(figure)
