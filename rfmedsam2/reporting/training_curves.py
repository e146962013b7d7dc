"""Training charts (loss, scores, learning rate) from metrics.jsonl, and the style shared by all charts.

Uses matplotlib's object-oriented interface: no global state, no display, thread-safe.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from rfmedsam2.engine.monitoring.log import EVENTS, Epochs, read_events
from rfmedsam2.errors import RecordError
from rfmedsam2.system.atomic import atomic

Theme = Literal["light", "dark"]

PROGRESS = "progress.png"
RAW_POINTS = 1500
"""Largest number of points drawn for single steps; more are averaged in groups."""
MAX_SCORE_LINES = 20
STEP_SCORE = re.compile(r"step(?P<step>\d+)/dsc(?:/(?P<class>.+))?")
"""Pattern of the names of scores of RFMedSAM 2's steps."""
SERIES = ("#3b6fb6", "#d1763c", "#4c9a62", "#b6579e", "#8a7ac8", "#b3a02f", "#4aa3b0", "#c25656", "#7d8a96", "#9c6b4a")
INK: dict[Theme, tuple[str, str, str]] = {
    "light": ("#1d2733", "#d9dee5", "#ffffff"),
    "dark": ("#dfe6ee", "#38424e", "#161b22"),
}
"""Text, grid lines, background."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Metrics of one training.

    Attributes:
        steps: numbers of the logged optimizer steps (n,).
        losses: loss of each step (n,).
        epochs: one row of means per epoch: epoch, step, loss, loss/PART, lr, seconds, and scores if validated.
    """

    steps: np.ndarray
    losses: np.ndarray
    epochs: tuple[dict[str, float], ...]

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of validation scores, the main one first."""
        own = {"epoch", "step", "loss", "lr", "seconds"}
        names = dict.fromkeys(n for row in self.epochs for n in row if n not in own and not n.startswith("loss/"))
        return tuple(sorted(names, key=lambda n: n != "score"))

    def scores_by_step(self) -> dict[str, dict[str, float]]:
        """DSC of RFMedSAM 2 at the last validation: class (or "mean") -> "Step 0" ... -> value; else empty."""
        last = next((row for row in reversed(self.epochs) if "score" in row), {})
        table: dict[str, dict[str, float]] = {}
        for name, value in last.items():
            if match := STEP_SCORE.fullmatch(name):
                table.setdefault(match["class"] or "mean", {})[f"Step {match['step']}"] = value
        return dict(sorted(table.items(), key=lambda item: item[0] == "mean"))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one column of the epochs, for epochs that have it."""
        pairs = [(row["step"], row[name]) for row in self.epochs if name in row]
        values = np.asarray(pairs, dtype=float).reshape(-1, 2)
        return values[:, 0], values[:, 1]


def read_training(folder: Path) -> Training:
    """Read a training folder's metrics.jsonl; an incomplete last line is ignored.

    Raises:
        RecordError: the file does not exist, or it holds lines that are not training events.
    """
    path = folder / EVENTS
    if not path.is_file():
        raise RecordError("The training metrics do not exist", where=path, remedy="Name the folder of a trained fold")
    epochs = Epochs()
    points: dict[int, float] = {}
    try:
        for event in read_events(path):
            epochs.add(event)
            if event["event"] == "step":
                points[int(event["step"])] = float(event["loss"])
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"The training metrics hold a line that is not a training event ({error!r})", where=path
        ) from None
    steps = np.asarray(sorted(points), dtype=float)
    losses = np.asarray([points[int(s)] for s in steps], dtype=float)
    return Training(steps=steps, losses=losses, epochs=tuple(epochs.rows()))


def progress_png(folder: Path) -> Path:
    """Draw progress.png from metrics.jsonl of a training folder, atomically; returns its path.

    Raises:
        RecordError: metrics.jsonl does not exist or is invalid.
    """
    path = folder / PROGRESS
    image = training_png(read_training(folder), theme="light")
    with atomic(path) as temporary:
        temporary.write_bytes(image)
    return path


def training_png(training: Training, *, theme: Theme = "light") -> bytes:
    """Loss, validation scores and learning rate over steps, in panels below each other, as PNG."""
    panels = [_draw_loss, *([_draw_scores] if training.score_names else []), _draw_rate]
    heights = [2.4, *([2.6] if training.score_names else []), 1.0]
    figure = new_figure((9.0, 1.05 * sum(heights)), theme)
    axes = figure.subplots(len(panels), 1, sharex=True, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    for draw, ax in zip(panels, axes, strict=True):
        styled(ax, theme)
        draw(ax, training)
    if len(training.steps):
        last = max(training.steps[-1], 1)
        axes[-1].set_xlim(min(0.0, training.steps[0] - 1), 1.01 * last)  # do not clip the last marker
    axes[-1].set_xlabel("optimizer step")
    return as_png(figure)


def _draw_loss(ax: Axes, training: Training) -> None:
    steps, losses = _thinned(training.steps, training.losses)
    ax.plot(steps, losses, color=SERIES[0], alpha=0.28, lw=0.9, label="single steps")
    parts = sorted({name for row in training.epochs for name in row if name.startswith("loss/")})
    _line(ax, training, "loss", "mean of epoch", SERIES[0], 2.0)
    if len(parts) > 1:
        for i, name in enumerate(parts):
            _line(ax, training, name, name.removeprefix("loss/"), SERIES[(i + 1) % len(SERIES)], 1.2)
    ax.set_ylabel("training loss")
    _legend(ax)


def _draw_scores(ax: Axes, training: Training) -> None:
    # per-class scores of the single steps are left out
    names = [n for n in training.score_names if not ((match := STEP_SCORE.fullmatch(n)) and match["class"])]
    for i, name in enumerate(names[:MAX_SCORE_LINES]):
        _line(ax, training, name, name.removeprefix("dsc/"), SERIES[i % len(SERIES)], 2.4 if name == "score" else 1.2)
        ax.lines[-1].set_linestyle("-" if i < len(SERIES) else "--")
    ax.set_ylabel("validation score")
    _legend(ax)


def _draw_rate(ax: Axes, training: Training) -> None:
    _line(ax, training, "lr", "learning rate", SERIES[8], 1.6)
    ax.set_ylabel("learning rate")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))


def _line(ax: Axes, training: Training, name: str, label: str, color: str, width: float) -> None:
    steps, values = training.series(name)
    marker = "o" if len(steps) < 25 else None
    ax.plot(steps, values, color=color, lw=width, marker=marker, ms=width + 1.5, label=label)


def _legend(ax: Axes) -> None:
    columns = 1 + (len(ax.get_legend_handles_labels()[0]) - 1) // 15
    ax.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8, labelcolor="linecolor", ncols=columns
    )


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce to at most RAW_POINTS points by averaging neighbors."""
    group = -(-len(steps) // RAW_POINTS) if len(steps) else 1
    whole = len(steps) // group * group
    return steps[:whole].reshape(-1, group).mean(axis=1), values[:whole].reshape(-1, group).mean(axis=1)


def new_figure(size: tuple[float, float], theme: Theme) -> Figure:
    """Make an empty figure of (width, height) inches."""
    return Figure(figsize=size, dpi=150, layout="constrained", facecolor=INK[theme][2])


def styled(ax: Axes, theme: Theme) -> None:
    """Apply the common chart style to axes."""
    text, line, ground = INK[theme]
    ax.set_facecolor(ground)
    ax.grid(visible=True, color=line, lw=0.7)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(line)
    ax.tick_params(colors=text, labelsize=8.5, length=0)
    ax.yaxis.get_offset_text().set_color(text)
    ax.yaxis.get_offset_text().set_fontsize(8)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(text)
        label.set_fontsize(9)


def as_png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # savefig would lay it out and draw it twice
    stream = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).save(stream, "PNG")
    return stream.getvalue()
