"""Chart of an evaluation's scores: all cases by class."""

from __future__ import annotations

import numpy as np

from rfmedsam2.records.report import Evaluation
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
