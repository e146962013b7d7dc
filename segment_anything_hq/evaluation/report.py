"""The HTML report of evaluations, one self-contained page: metrics, a chart, the worst samples, all samples."""

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
    sample_png,
)
from segment_anything_hq.evaluation.scores import Chart, Column, ProtocolResult, SamplePrediction

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html.j2")
MAX_ROWS = 2000
"""Samples listed on the page, worst first; the CSV file has all."""
CURVE_COLORS = ("#3f7fd0", "#d9772b", "#3f9f63", "#b04fb5", "#c2435a", "#2aa1b3", "#8a7a2e")
WIDTH, HEIGHT, MARGIN = 720, 300, 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """A drawn sample: `source` is the PNG as a data URI."""

    title: str
    score: float
    source: str
    prompts: str


def write_page(
    path: Path, evaluations: Sequence[ProtocolResult], *, title: str, about: Mapping[str, str] | None = None
) -> None:
    """Write the report.

    Args:
        path: the HTML file, written atomically.
        evaluations: results to show, one section each.
        title: heading of the page.
        about: facts shown below the heading, name -> text: the model, its weights, the machine.

    Raises:
        UsageError: there are no evaluations.
        StoreError: the file cannot be written.
    """
    if not evaluations:
        raise UsageError("There are no evaluations to report", where=path)
    context = {
        "title": title,
        "facts": dict(about or {}),
        "sections": [_section(evaluation) for evaluation in evaluations],
        "colors": {
            "ground truth": GROUND_TRUTH_COLOR,
            "prediction": PREDICTION_COLOR,
            "missed object": MISSED_COLOR,
            "wrong prediction": WRONG_COLOR,
        },
    }
    write_html(path, TEMPLATE, context, figure=_metric)


def _metric(value: float | None, column: Column) -> str:
    """Format a value as its column says; a dash if it is undefined."""
    if value is None or math.isnan(value):
        return "–"
    return f"{column.scale * value:.{column.digits}f}".replace("-", "−")


def _section(evaluation: ProtocolResult) -> dict[str, object]:
    first = evaluation.sample_columns[0].name
    ranked = sorted(evaluation.samples, key=lambda s: (s.values.get(first) is not None, s.values.get(first) or 0.0))
    overlays, unshown = _overlays(evaluation.worst)
    return {
        "protocol": evaluation.protocol,
        "columns": evaluation.columns,
        "sets": evaluation.sets,
        "overall": evaluation.overall,
        "overall_rule": evaluation.overall_rule,
        "chart": _chart_geometry(evaluation.chart),
        "overlays": overlays,
        "ranked_by": evaluation.sample_columns[0],
        "unshown": [*unshown, *(f"not evaluated: {fault}" for fault in evaluation.skipped)],
        "sample_columns": evaluation.sample_columns,
        "samples": ranked[:MAX_ROWS],
        "left_out": max(len(ranked) - MAX_ROWS, 0),
    }


def _overlays(predictions: Sequence[SamplePrediction]) -> tuple[list[Overlay], list[str]]:
    """Draw samples; returns the drawings, and sentences for the samples that could not be drawn."""
    overlays: list[Overlay] = []
    unshown: list[str] = []
    for prediction in predictions:
        try:
            png = sample_png(prediction)
        except RfMedSamError as error:
            unshown.append(f"not shown: {prediction.sample.id}: {error}")
            continue
        source = png_uri(png)
        title = f"{prediction.set} {prediction.sample.id}"
        overlays.append(
            Overlay(title=title, score=prediction.score, source=source, prompts=_describe_prompts(prediction))
        )
    return overlays, unshown


def _describe_prompts(prediction: SamplePrediction) -> str:
    """The prompts in words: "a box, 2 positive and 1 negative clicks"."""
    clicks = prediction.prompt.clicks
    positive = sum(c.positive for c in clicks)
    negative = len(clicks) - positive
    named = [f"{n} {kind}" for n, kind in ((positive, "positive"), (negative, "negative")) if n]
    points = f"{' and '.join(named)} click{'s' if len(clicks) != 1 else ''}" if named else ""
    return ", ".join(part for part in ("a box" if prediction.prompt.box is not None else "", points) if part)


def _chart_geometry(chart: Chart) -> dict[str, object]:
    """SVG coordinates of the chart's lines and ticks; the page sets the colors of background and text."""
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
