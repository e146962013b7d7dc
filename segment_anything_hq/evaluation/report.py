"""One self-contained HTML page for evaluations: figures, a chart, the worst cases, all samples; light and dark."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rfmedsam2.errors import RfMedSamError, UsageError
from rfmedsam2.reporting.html import png_uri, write_html
from segment_anything_hq.evaluation.overlays import (
    GROUND_TRUTH_COLOR,
    MISSED_COLOR,
    PREDICTION_COLOR,
    WRONG_COLOR,
    case_png,
)
from segment_anything_hq.evaluation.scores import Case, Chart, Column, Evaluation

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_ROWS = 2000
"""Samples listed on the page, worst first; the CSV holds all."""
CURVE_COLORS = ("#3f7fd0", "#d9772b", "#3f9f63", "#b04fb5", "#c2435a", "#2aa1b3", "#8a7a2e")
WIDTH, HEIGHT, MARGIN = 720, 300, 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A pictured case."""

    title: str
    score: float
    source: str
    prompts: str


def write_page(
    path: Path, evaluations: Sequence[Evaluation], *, title: str, about: Mapping[str, str] | None = None
) -> None:
    """Write the page.

    Args:
        path: the HTML file, written atomically.
        evaluations: one section each.
        title: heading.
        about: facts for the head of the page, name -> text: the model, its weights, the machine.

    Raises:
        UsageError: no evaluation.
        StoreError: the file cannot be written.
    """
    if not evaluations:
        raise UsageError("A page needs an evaluation", where=path)
    context = {
        "title": title,
        "facts": dict(about or {}),
        "sections": [_section(evaluation) for evaluation in evaluations],
        "colors": {
            "truth": GROUND_TRUTH_COLOR,
            "prediction": PREDICTION_COLOR,
            "missed object": MISSED_COLOR,
            "wrong prediction": WRONG_COLOR,
        },
    }
    write_html(path, TEMPLATE, context, figure=_figure)


def _figure(value: float | None, column: Column) -> str:
    """Format a figure as its column says; a dash where it is undefined."""
    if value is None or math.isnan(value):
        return "–"
    return f"{column.scale * value:.{column.digits}f}".replace("-", "−")


def _section(evaluation: Evaluation) -> dict[str, object]:
    first = evaluation.sample_columns[0].name
    ranked = sorted(evaluation.samples, key=lambda s: (s.values.get(first) is not None, s.values.get(first) or 0.0))
    images, unshown = _images(evaluation.worst)
    return {
        "protocol": evaluation.protocol,
        "columns": evaluation.columns,
        "sets": evaluation.sets,
        "overall": evaluation.overall,
        "overall_rule": evaluation.overall_rule,
        "chart": _drawn(evaluation.chart),
        "pictures": images,
        "ranked_by": evaluation.sample_columns[0],
        "unshown": [*unshown, *(f"not evaluated: {fault}" for fault in evaluation.skipped)],
        "sample_columns": evaluation.sample_columns,
        "samples": ranked[:MOST_ROWS],
        "left_out": max(len(ranked) - MOST_ROWS, 0),
    }


def _images(cases: Sequence[Case]) -> tuple[list[Picture], list[str]]:
    """Draw the cases; what could not be drawn, and why."""
    images: list[Picture] = []
    unshown: list[str] = []
    for case in cases:
        try:
            png = case_png(case)
        except RfMedSamError as error:
            unshown.append(f"not shown: {case.sample.id}: {error}")
            continue
        source = png_uri(png)
        title = f"{case.set} {case.sample.id}"
        images.append(Picture(title=title, score=case.score, source=source, prompts=_prompts(case)))
    return images, unshown


def _prompts(case: Case) -> str:
    positive = sum(c.positive for c in case.clicks)
    negative = len(case.clicks) - positive
    named = [f"{n} {kind}" for n, kind in ((positive, "positive"), (negative, "negative")) if n]
    points = f"{' and '.join(named)} click{'s' if len(case.clicks) != 1 else ''}" if named else ""
    return ", ".join(part for part in ("a box" if case.box is not None else "", points) if part)


def _drawn(chart: Chart) -> dict[str, object]:
    """Coordinates of the chart's lines and ticks; colors of ground and text are the page's."""
    xs = [x for curve in chart.curves for x in curve.x]
    low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    across = (WIDTH - 2 * MARGIN) / max(high - low, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN + (x - low) * across, HEIGHT - MARGIN - y * (HEIGHT - MARGIN - 16)

    lines = []
    for number, curve in enumerate(chart.curves):
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(place, curve.x, curve.y))
        lines.append({"name": curve.name, "points": points, "color": CURVE_COLORS[number % len(CURVE_COLORS)]})
    whole = high - low > 1.5
    steps = [low + i * (high - low) / 5 for i in range(6)]
    x_ticks = sorted({float(round(v)) for v in steps}) if whole else steps
    return {
        "title": chart.title,
        "x_title": chart.x_title,
        "y_title": chart.y_title,
        "width": WIDTH,
        "height": HEIGHT,
        "lines": lines,
        "x_ticks": [(place(v, 0)[0], f"{v:g}" if whole else f"{v:.1f}") for v in x_ticks],
        "y_ticks": [(place(low, v / 5)[1], f"{v / 5:.1f}") for v in range(6)],
        "left": MARGIN,
        "right": WIDTH - MARGIN,
        "bottom": HEIGHT - MARGIN,
    }
