"""Overlay images of a case: contours of reference and prediction on three planes through the largest error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from rfmedsam2.errors import GeometryError
from rfmedsam2.pipeline.evaluation.planes import (
    as_displayed,
    as_png,
    displayed_spacing,
    draw_plane,
    intensity_window,
    planes_with_most,
    shown_box,
    three_axes,
)
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.formats.image_header import grids_differ
from rfmedsam2.store.images import read_image, read_label

REFERENCE_COLOR = "#35d07f"
PREDICTION_COLOR = "#ff5ca8"


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
    arrays = [as_displayed(v) for v in (ground_truth, guess)]
    if ignore is not None:
        kept = arrays[0] != ignore
        arrays = [a * (kept & (a != ignore)) for a in arrays]
    spacing = displayed_spacing(ground_truth)
    box = shown_box((arrays[0] > 0) | (arrays[1] > 0), spacing)
    return Scene(
        image=None if shown is None else as_displayed(shown)[box],
        reference=arrays[0][box],
        prediction=arrays[1][box],
        spacing_zyx_mm=spacing,
    )


def scene_png(scene: Scene) -> bytes:
    """Draw three planes side by side, at the same scale."""
    where = best_planes(scene.reference, scene.prediction)
    figure, axes = three_axes(scene.reference.shape, scene.spacing_zyx_mm)
    window = intensity_window(scene.image, (scene.reference > 0) | (scene.prediction > 0))
    for axis, ax in enumerate(axes):
        height, width = (s for a, s in enumerate(scene.spacing_zyx_mm) if a != axis)
        ground_truth, guess = (np.take(a, where[axis], axis) for a in (scene.reference, scene.prediction))
        image = scene.image
        gray = np.zeros(ground_truth.shape, np.float32) if image is None else np.take(image, where[axis], axis)
        draw_plane(ax, gray, axis, (height, width), window)
        for labels, color, line in ((ground_truth, REFERENCE_COLOR, 1.6), (guess, PREDICTION_COLOR, 1.1)):
            _contours(ax, labels, (height, width), color, line)
    return as_png(figure)


def best_planes(reference: np.ndarray, prediction: np.ndarray) -> tuple[int, int, int]:
    """Index along z, y, x of the planes with the most wrong voxels; with the most foreground if there are none."""
    shown = reference != prediction
    return planes_with_most(shown if shown.any() else reference > 0)


def _contours(ax: Axes, labels: np.ndarray, spacing: tuple[float, float], color: str, line: float) -> None:
    """Draw the outline of every label value; padded with background, so that outlines close at the border."""
    y, x = ((np.arange(n + 2) - 0.5) * s for n, s in zip(labels.shape, spacing, strict=True))
    padded = np.pad(labels, 1)
    for value in np.unique(labels[labels > 0]):
        ax.contour(x, y, (padded == value).astype(np.float32), levels=[0.5], colors=[color], linewidths=line)
