"""Overlays of evaluated samples: contours of ground truth and prediction with the prompts, beside an error map."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from segment_anything_hq.evaluation.scores import SamplePrediction
from segment_anything_hq.prompts.clicks import IGNORE

GROUND_TRUTH_COLOR = "#35d07f"
PREDICTION_COLOR = "#ff5ca8"
MISSED_COLOR = "#ffb020"
WRONG_COLOR = "#4aa8ff"
LONGER_SIDE = 440
"""Longer side of a drawn image, pixels."""


def sample_png(sample: SamplePrediction) -> bytes:
    """Draw one sample: the image with contours and prompts, and beside it in gray with missed and wrong pixels.

    Raises:
        ImageError: the sample's image or mask cannot be read.
    """
    image, ground_truth = sample.sample.read_image(), sample.sample.ground_truth()
    height, width = ground_truth.shape
    scale = min(1.0, LONGER_SIDE / max(height, width))
    shown = np.asarray(Image.fromarray(image).resize(_scaled_size(width, height, scale), Image.Resampling.BOX))
    inches = (max(width * scale, 120) / 100, max(height * scale, 120) / 100)
    figure = Figure(figsize=(2 * inches[0] + 0.08, inches[1]), dpi=100, facecolor="#000000")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.02, "left": 0, "right": 1, "bottom": 0, "top": 1})
    extent = (0.0, float(width), float(height), 0.0)
    left.imshow(shown, extent=extent, interpolation="bilinear")
    for mask, color, line in ((ground_truth == 1, GROUND_TRUTH_COLOR, 1.6), (sample.prediction, PREDICTION_COLOR, 1.1)):
        _contour(left, mask, color, line)
    _draw_prompts(left, sample)
    right.imshow(_error_map(shown, ground_truth, sample.prediction), extent=extent, interpolation="nearest")
    for ax in (left, right):
        ax.set_xlim(0, width)
        ax.set_ylim(height, 0)
        ax.set_aspect("equal")
        ax.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    return max(1, round(width * scale)), max(1, round(height * scale))


def _contour(ax: Axes, mask: np.ndarray, color: str, line: float) -> None:
    """Draw a mask's contour; one pixel of background around the mask closes it at the image's edge."""
    if not mask.any():
        return
    # every k-th pixel is enough for a line, and contours of large masks are slow
    step = max(1, max(mask.shape) // (2 * LONGER_SIDE))
    rows, columns = ((np.arange(-1, n + 1) + 0.5) * step for n in mask[::step, ::step].shape)
    padded = np.pad(mask[::step, ::step], 1).astype(np.float32)
    ax.contour(columns, rows, padded, levels=[0.5], colors=[color], linewidths=line)


def _draw_prompts(ax: Axes, sample: SamplePrediction) -> None:
    if sample.prompt.box is not None:
        x0, y0, x1, y1 = sample.prompt.box
        frame = Rectangle((x0, y0), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor="#ffffff", linewidth=1.2, ls="--")
        ax.add_patch(frame)
    for positive, marker in ((True, "P"), (False, "X")):
        places = [(c.x + 0.5, c.y + 0.5) for c in sample.prompt.clicks if c.positive == positive]
        if places:
            x, y = zip(*places, strict=True)
            color = GROUND_TRUTH_COLOR if positive else "#ff4d4d"
            ax.scatter(x, y, s=34, marker=marker, c=color, edgecolors="#ffffff", linewidths=0.8, zorder=3)


def _error_map(shown: np.ndarray, ground_truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 in the size of `shown`: the image in gray, missed and wrong pixels in color."""
    height, width = shown.shape[:2]
    gray = 0.45 * shown.mean(-1, keepdims=True).repeat(3, -1) + 20
    for wrong, color in (
        ((ground_truth == 1) & ~prediction, MISSED_COLOR),
        ((ground_truth == 0) & prediction, WRONG_COLOR),
        (ground_truth == IGNORE, "#808080"),
    ):
        size = (width, height)
        share = np.asarray(Image.fromarray(wrong.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX), np.float32)
        strength = (0.85 if color != "#808080" else 0.35) * share[..., None] / 255
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], np.float32)
        gray = gray * (1 - strength) + rgb * strength
    return np.clip(gray, 0, 255).astype(np.uint8)
