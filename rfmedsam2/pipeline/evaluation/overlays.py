"""Overlay images of a case: contours of reference and prediction on three planes through the largest error.

Radiological convention: axial with anterior up and the patient's left on the right, coronal and sagittal with superior
up; voxels keep their proportions in mm.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rfmedsam2.errors import GeometryError
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.formats.image_header import grids_differ
from rfmedsam2.store.images import read_image, read_label
from rfmedsam2.store.orientation import reoriented
from rfmedsam2.volume import Volume

REFERENCE_COLOR = "#35d07f"
PREDICTION_COLOR = "#ff5ca8"
MARGIN_MM = 25.0
"""Margin shown around all structures, mm."""
PLANES = (("axial", "A", "P", "R", "L"), ("coronal", "S", "I", "R", "L"), ("sagittal", "S", "I", "A", "P"))
"""Name, and labels of the top, bottom, left and right edges, by the normal axis of the plane: z, y, x."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Arrays of one case (z toward superior, y toward posterior, x toward left), cropped to the shown region."""

    image: np.ndarray | None
    reference: np.ndarray
    prediction: np.ndarray
    spacing_zyx_mm: tuple[float, float, float]


def case_png(reference: Path, prediction: Path, image: Path | None, labels: LabelSet | None = None) -> bytes:
    """Draw one case as a PNG image.

    Args:
        reference: label map.
        prediction: label map on the same grid.
        image: image to draw below the contours (its first channel); None: plain background.
        labels: labels of the dataset; the ignore label is not drawn.

    Returns:
        PNG.

    Raises:
        ImageError: a file cannot be read.
        GeometryError: grids differ.
    """
    return scene_png(read_scene(reference, prediction, image, labels))


def read_scene(reference: Path, prediction: Path, image: Path | None, labels: LabelSet | None = None) -> Scene:
    """Read the files of one case, reorient them for display and crop them to the structures."""
    (ground_truth, header), (guess, guess_header) = (read_label(path) for path in (reference, prediction))
    shown, image_header = (None, None) if image is None else read_image(image)
    for other, path in ((guess_header, prediction), *(((image_header, image),) if image_header is not None else ())):
        difference = grids_differ(header, other)
        if difference is not None:
            raise GeometryError("The files of a case are on different grids", where=path, found=difference[0])
    # on one grid, although a file alone may be placed otherwise (see `grids_differ`)
    guess = replace(guess, grid=ground_truth.grid)
    shown = None if shown is None else replace(shown, grid=ground_truth.grid)
    ignore = labels.ignore if labels is not None else None
    arrays = [_display(v) for v in (ground_truth, guess)]
    if ignore is not None:
        kept = arrays[0] != ignore
        arrays = [a * (kept & (a != ignore)) for a in arrays]
    turned = reoriented(ground_truth, "RAS")[0].grid
    spacing = turned.spacing_zyx_mm
    box = _shown_box(arrays[0], arrays[1], spacing)
    return Scene(
        image=None if shown is None else _display(shown)[box],
        reference=arrays[0][box],
        prediction=arrays[1][box],
        spacing_zyx_mm=spacing,
    )


def scene_png(scene: Scene) -> bytes:
    """Draw three planes side by side, at the same scale."""
    where = best_planes(scene.reference, scene.prediction)
    sz, sy, sx = (n * s for n, s in zip(scene.reference.shape, scene.spacing_zyx_mm, strict=True))
    widths, height = (sx, sx, sy), max(sy, sz)
    scale = min(13.0 / sum(widths), 4.2 / height)
    figure = Figure(figsize=(scale * sum(widths) + 0.4, scale * height + 0.35), dpi=110, facecolor="#000000")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        1,
        3,
        gridspec_kw={"width_ratios": widths, "wspace": 0.03, "left": 0.005, "right": 0.995, "bottom": 0.0, "top": 0.93},
    )
    window = _window(scene)
    for axis, ax in enumerate(axes):
        _draw_plane(ax, scene, axis, where[axis], window)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def best_planes(reference: np.ndarray, prediction: np.ndarray) -> tuple[int, int, int]:
    """Index along z, y, x of the planes with the most wrong voxels; with the most foreground if there are none."""
    shown = reference != prediction
    if not shown.any():
        shown = reference > 0
    planes = [int(np.argmax(shown.sum(axis=tuple(a for a in range(3) if a != axis)))) for axis in range(3)]
    return planes[0], planes[1], planes[2]


def _display(volume: Volume) -> np.ndarray:
    """First channel with z toward superior, y toward posterior, x toward left."""
    return reoriented(volume, "RAS")[0].array[0, :, ::-1, ::-1]


def _shown_box(
    reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float, float]
) -> tuple[slice, slice, slice]:
    """Bounding box of all structures with a margin; the whole volume if there are none."""
    found = (reference > 0) | (prediction > 0)
    slices = [slice(None)] * 3
    for axis in range(3):
        filled = np.flatnonzero(found.any(axis=tuple(a for a in range(3) if a != axis)))
        if filled.size:
            margin = max(round(MARGIN_MM / spacing[axis]), 1)
            slices[axis] = slice(max(int(filled[0]) - margin, 0), int(filled[-1]) + 1 + margin)
    return slices[0], slices[1], slices[2]


def _window(scene: Scene) -> tuple[float, float]:
    """Intensity window: the range of the structures, extended by its own width on both sides."""
    if scene.image is None:
        return 0.0, 1.0
    inside = (scene.reference > 0) | (scene.prediction > 0)
    values = scene.image[inside] if inside.any() else scene.image.ravel()
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, [1.0, 99.0]))
    margin = max(0.75 * (high - low), 1e-6)
    least, most = float(np.nanmin(scene.image)), float(np.nanmax(scene.image))
    return max(low - margin, least), max(min(high + margin, most), low + 1e-6)


def _draw_plane(ax: Axes, scene: Scene, axis: int, index: int, window: tuple[float, float]) -> None:
    name, top, bottom, left, right = PLANES[axis]
    height, width = (s for a, s in enumerate(scene.spacing_zyx_mm) if a != axis)
    ground_truth, guess = (np.take(a, index, axis) for a in (scene.reference, scene.prediction))
    rows, columns = ground_truth.shape
    # the first row is at the top of axial planes (anterior) and at the bottom of the others (inferior)
    extent = (0, columns * width, rows * height, 0) if axis == 0 else (0, columns * width, 0, rows * height)
    origin = "upper" if axis == 0 else "lower"
    ground = np.zeros(ground_truth.shape, np.float32) if scene.image is None else np.take(scene.image, index, axis)
    ax.imshow(
        ground, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, origin=origin, interpolation="bilinear"
    )
    for labels, color, line in ((ground_truth, REFERENCE_COLOR, 1.6), (guess, PREDICTION_COLOR, 1.1)):
        _contours(ax, labels, (height, width), color, line)
    ax.set_xlim(0, columns * width)
    ax.set_ylim((rows * height, 0) if axis == 0 else (0, rows * height))
    ax.set_aspect("equal", anchor="N")
    ax.set_axis_off()
    ax.set_title(name, color="#cfd6de", fontsize=8, pad=3)
    places = ((0.5, 0.985, top), (0.5, 0.015, bottom), (0.015, 0.5, left), (0.985, 0.5, right))
    for across, up, letter in places:
        ax.text(
            across, up, letter, transform=ax.transAxes, color="#cfd6de", fontsize=7.5, alpha=0.85,
            ha="left" if across < 0.2 else "right" if across > 0.8 else "center",
            va="bottom" if up < 0.2 else "top" if up > 0.8 else "center",
        )  # fmt: skip


def _contours(ax: Axes, labels: np.ndarray, spacing: tuple[float, float], color: str, line: float) -> None:
    """Draw the outline of every label value; padded with background, so that outlines close at the border."""
    y, x = ((np.arange(n + 2) - 0.5) * s for n, s in zip(labels.shape, spacing, strict=True))
    padded = np.pad(labels, 1)
    for value in np.unique(labels[labels > 0]):
        ax.contour(x, y, (padded == value).astype(np.float32), levels=[0.5], colors=[color], linewidths=line)
