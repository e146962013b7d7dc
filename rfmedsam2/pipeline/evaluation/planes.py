"""Drawing of a volume's axial, coronal and sagittal planes.

Radiological convention: axial with anterior up and the patient's left on the right, coronal and sagittal with superior
up; voxels keep their proportions in mm.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rfmedsam2.geometry import Triple
from rfmedsam2.store.orientation import reoriented
from rfmedsam2.volume import Volume

MARGIN_MM = 25.0
"""Margin shown around all structures, mm."""
PLANES = (("axial", "A", "P", "R", "L"), ("coronal", "S", "I", "R", "L"), ("sagittal", "S", "I", "A", "P"))
"""Name, and labels of the top, bottom, left and right edges, by the normal axis of the plane: z, y, x."""
TEXT_COLOR = "#cfd6de"


def as_displayed(volume: Volume, channel: int = 0) -> np.ndarray:
    """One channel (Z, Y, X) with z toward superior, y toward posterior, x toward left."""
    return reoriented(volume, "RAS")[0].array[channel, :, ::-1, ::-1]


def displayed_spacing(volume: Volume) -> Triple:
    """Spacing of `as_displayed` along z, y, x, mm."""
    return reoriented(volume, "RAS")[0].grid.spacing_zyx_mm


def shown_box(found: np.ndarray, spacing: Triple) -> tuple[slice, slice, slice]:
    """Bounding box of all structures with a margin; the whole volume if there are none."""
    slices = [slice(None)] * 3
    for axis in range(3):
        filled = np.flatnonzero(found.any(axis=tuple(a for a in range(3) if a != axis)))
        if filled.size:
            margin = max(round(MARGIN_MM / spacing[axis]), 1)
            slices[axis] = slice(max(int(filled[0]) - margin, 0), int(filled[-1]) + 1 + margin)
    return slices[0], slices[1], slices[2]


def planes_with_most(shown: np.ndarray) -> tuple[int, int, int]:
    """Index along z, y, x of the planes with the most true voxels."""
    planes = [int(np.argmax(shown.sum(axis=tuple(a for a in range(3) if a != axis)))) for axis in range(3)]
    return planes[0], planes[1], planes[2]


def intensity_window(image: np.ndarray | None, inside: np.ndarray) -> tuple[float, float]:
    """Shown intensities: the range of the structures, extended by its own width on both sides."""
    if image is None:
        return 0.0, 1.0
    values = image[inside] if inside.any() else image.ravel()
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, [1.0, 99.0]))
    margin = max(0.75 * (high - low), 1e-6)
    least, most = float(np.nanmin(image)), float(np.nanmax(image))
    return max(low - margin, least), max(min(high + margin, most), low + 1e-6)


def figure_width(shape: Sequence[int], spacing: Triple) -> float:
    """Width of the figure of `three_axes`, inches."""
    widths, _, scale = _sizes(shape, spacing)
    return scale * sum(widths) + 0.4


def _sizes(shape: Sequence[int], spacing: Triple) -> tuple[Triple, float, float]:
    """Widths of the three planes and the height of the highest, mm; inches for a mm."""
    sz, sy, sx = (n * s for n, s in zip(shape, spacing, strict=True))
    widths, height = (sx, sx, sy), max(sy, sz)
    return widths, height, min(13.0 / sum(widths), 4.2 / height)


def three_axes(shape: Sequence[int], spacing: Triple, *, below: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    """A black figure with axes for the three planes side by side, at the same scale.

    Args:
        shape: number of voxels along z, y, x.
        spacing: along z, y, x, mm.
        below: free height below the planes, inches.
    """
    widths, height, scale = _sizes(shape, spacing)
    tall = scale * height + 0.35 + below
    figure = Figure(figsize=(figure_width(shape, spacing), tall), dpi=110, facecolor="#000000")
    FigureCanvasAgg(figure)
    top = 0.93 + 0.07 * below / tall
    places = {"wspace": 0.03, "left": 0.005, "right": 0.995, "bottom": below / tall, "top": top}
    return figure, figure.subplots(1, 3, gridspec_kw={"width_ratios": widths, **places})


def draw_plane(
    ax: Axes, image: np.ndarray, axis: int, spacing: tuple[float, float], window: tuple[float, float]
) -> tuple[tuple[float, float, float, float], str]:
    """Draw one plane of an image in gray with the directions at its edges.

    Args:
        ax: where.
        image: (rows, columns) of the plane.
        axis: normal axis of the plane: 0, 1, 2 for z, y, x.
        spacing: of rows and columns, mm.
        window: intensities of black and white.

    Returns:
        Extent and origin for further images of the plane.
    """
    name, top, bottom, left, right = PLANES[axis]
    height, width = spacing
    rows, columns = image.shape
    # the first row is at the top of axial planes (anterior) and at the bottom of the others (inferior)
    extent = (0, columns * width, rows * height, 0) if axis == 0 else (0, columns * width, 0, rows * height)
    origin = "upper" if axis == 0 else "lower"
    ax.imshow(
        image, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, origin=origin, interpolation="bilinear"
    )
    ax.set_xlim(0, columns * width)
    ax.set_ylim((rows * height, 0) if axis == 0 else (0, rows * height))
    ax.set_aspect("equal", anchor="N")
    ax.set_axis_off()
    ax.set_title(name, color=TEXT_COLOR, fontsize=8, pad=3)
    places = ((0.5, 0.985, top), (0.5, 0.015, bottom), (0.015, 0.5, left), (0.985, 0.5, right))
    for across, up, letter in places:
        ax.text(
            across, up, letter, transform=ax.transAxes, color=TEXT_COLOR, fontsize=7.5, alpha=0.85,
            ha="left" if across < 0.2 else "right" if across > 0.8 else "center",
            va="bottom" if up < 0.2 else "top" if up > 0.8 else "center",
        )  # fmt: skip
    return extent, origin


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG image, the same for the same drawing."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
