"""Drawings of label maps over their images: one PNG a case, every class in its own color, with names and volumes."""

from __future__ import annotations

import colorsys
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from rfmedsam2.arguments import option, whole_number
from rfmedsam2.errors import GeometryError, RfMedSamError, UsageError, shortlist
from rfmedsam2.pipeline.evaluation.label_tables import agreed_labels, numbered
from rfmedsam2.pipeline.evaluation.planes import (
    TEXT_COLOR,
    as_displayed,
    as_png,
    displayed_spacing,
    draw_plane,
    figure_width,
    intensity_window,
    planes_with_most,
    shown_box,
    three_axes,
)
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.case_files import channel_file, label_files_in
from rfmedsam2.store.formats.image_header import grids_differ
from rfmedsam2.store.images import read_image, read_label
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.atomic import atomic, is_taken
from rfmedsam2.system.ordinary_files import require_folder
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent

logger = logging.getLogger(__name__)
OPACITY = 0.45
NAMED_CLASSES = 24
"""Largest number of classes in a legend, by volume."""
SQUARE_INCHES, CHARACTER_INCHES, LINE_INCHES = 0.55, 0.068, 0.2
"""Sizes of the legend: a colored square with its margins, a character, a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnCase:
    """A label map to draw; `image`: drawn below it (None: nothing), `channel`: of a file with several."""

    id: str
    label: Path
    image: Path | None
    channel: int = 0


def cases_of_dataset(dataset: RawDataset, channel: int = 0) -> list[DrawnCase]:
    """The training cases of a dataset with their labels.

    Raises:
        UsageError: there is no such channel.
    """
    if not 0 <= channel < len(dataset.json.channels):
        expected = f"one of 0 to {len(dataset.json.channels) - 1}"
        raise UsageError("The dataset does not have this channel", expected=expected, found=channel)
    return [
        DrawnCase(id=case.id, label=case.label, image=case.images[min(channel, len(case.images) - 1)], channel=channel)
        for case in dataset.training
        if case.label is not None
    ]


def cases_of_folder(labels: Path, images: Path | None, channel: int = 0) -> list[DrawnCase]:
    """The label maps of a folder with images of the same ids in another (CASE_0000.nii.gz or CASE.nii.gz).

    Raises:
        UsageError: a folder does not exist, holds no label maps, or no image of any; a negative channel.
    """
    channel = whole_number(channel, "channel", least=0)
    require_folder(labels, "folder of label maps")
    if images is not None:
        require_folder(images, "folder of images")
    cases = [
        DrawnCase(
            id=id, label=path, image=None if images is None else channel_file(images, id, channel), channel=channel
        )
        for id, path in label_files_in(labels).items()
    ]
    if not cases:
        raise UsageError("The folder holds no label maps", where=labels, expected="files such as CASE.nii.gz")
    if images is not None and all(case.image is None for case in cases):
        raise UsageError(
            "No image has the id of a label map",
            where=images,
            expected=f"{cases[0].id}_{channel:04d} or {cases[0].id} with the ending of an image",
        )
    return cases


def write_drawings(
    cases: Sequence[DrawnCase],
    out: Path,
    labels: LabelSet | None,
    *,
    opacity: float = OPACITY,
    overwrite: bool = False,
    workers: int = 2,
    track: Track = silent,
) -> list[Path]:
    """Draw every case into CASE.png: the planes with the most foreground.

    Args:
        cases: what to draw.
        out: folder of the drawings.
        labels: names of the values; None: those beside the label maps, else their numbers.
        opacity: of the colors over an image, 0 to 1.
        overwrite: replace files that are there.
        workers: cases drawn in parallel.
        track: progress display.

    Raises:
        UsageError: files would be replaced; the opacity is out of range.
        RfMedSamError: cases could not be drawn; names them and the reasons, all others are written.
    """
    if not 0 <= opacity <= 1:
        raise UsageError("The opacity is out of range", expected="0 to 1", found=opacity)
    elsewhere = f"Choose another folder with {option('out', flag='-o')}"
    among = {path.parent.resolve() for case in cases for path in (case.label, case.image) if path is not None}
    if out.resolve() in among:
        raise UsageError(
            "The drawings would lie among the images or label maps, where they would be taken for more of them",
            where=out,
            remedy=elsewhere,
        )
    there = [f"{case.id}.png" for case in cases if is_taken(out / f"{case.id}.png")]
    if there and not overwrite:
        raise UsageError(
            f"{len(there)} file(s) would be replaced",
            where=out,
            found=shortlist(there),
            remedy=f"{elsewhere}, or replace them with {option('overwrite', True)}",
        )
    if labels is None:
        labels = agreed_labels(cases[0].label.parent, cases[0].label.parent)

    def draw(case: DrawnCase) -> Path | str:
        try:
            png = drawing_png(case, labels, opacity=opacity)
        except RfMedSamError as error:
            return f"{case.id}: {str(error).rstrip('.')}"
        target = out / f"{case.id}.png"
        with atomic(target) as temporary:
            temporary.write_bytes(png)
        return target

    done = list(map_cases(draw, cases, workers=workers, name=lambda case: case.id, track=track, description="Drawing"))
    faults = [each for each in done if isinstance(each, str)]
    if faults:
        raise RfMedSamError(
            f"{len(faults)} of {len(cases)} cases could not be drawn", where=out, found="; ".join(faults)
        )
    return [each for each in done if isinstance(each, Path)]


def drawing_png(case: DrawnCase, labels: LabelSet | None = None, *, opacity: float = OPACITY) -> bytes:
    """Draw one case as a PNG image; see `write_drawings`.

    Raises:
        ImageError: a file cannot be read.
        GeometryError: label map and image are on different grids, or the image lacks the channel.
    """
    label, header = read_label(case.label)
    shown = None
    if case.image is not None:
        volume, image_header = read_image(case.image)
        difference = grids_differ(header, image_header)
        if difference is not None:
            raise GeometryError("Image and label map are on different grids", where=case.image, found=difference[0])
        # on one grid, although a file alone may be placed otherwise (see `grids_differ`)
        shown = as_displayed(replace(volume, grid=label.grid), min(case.channel, len(volume.array) - 1))
    values, spacing = as_displayed(label), displayed_spacing(label)
    table = labels or numbered(values)
    box = shown_box(values > 0, spacing)
    voxel_ml = float(np.prod(spacing)) / 1000
    volumes = {int(v): n * voxel_ml for v, n in zip(*np.unique(values, return_counts=True), strict=True) if v > 0}
    values, shown = values[box], None if shown is None else shown[box]
    return _drawn(values, shown, spacing, volumes, _names(table), opacity)


def _drawn(
    values: np.ndarray,
    image: np.ndarray | None,
    spacing: tuple[float, float, float],
    volumes: Mapping[int, float],
    names: Mapping[int, str],
    opacity: float,
) -> bytes:
    largest = sorted(volumes, key=lambda value: -volumes[value])[:NAMED_CLASSES]
    words = [f"{names.get(value, value)} {_ml(volumes[value])}" for value in largest]
    longest = max(map(len, words), default=0)
    columns = max(1, int(figure_width(values.shape, spacing) / (SQUARE_INCHES + CHARACTER_INCHES * longest)))
    figure, axes = three_axes(values.shape, spacing, below=LINE_INCHES * (1 + len(words) // columns))
    window = intensity_window(image, values > 0)
    for axis, (ax, index) in enumerate(zip(axes, planes_with_most(values > 0), strict=True)):
        height, width = (s for a, s in enumerate(spacing) if a != axis)
        plane = np.take(values, index, axis)
        gray = np.zeros(plane.shape, np.float32) if image is None else np.take(image, index, axis)
        extent, origin = draw_plane(ax, gray, axis, (height, width), window)
        _fill(ax, plane, extent, origin, 1.0 if image is None else opacity)
    shown = [Patch(color=class_color(value), label=text) for value, text in zip(largest, words, strict=True)]
    if len(volumes) > len(largest):
        shown.append(Patch(alpha=0, label=f"and {len(volumes) - len(largest)} more"))
    if shown:
        style = {"fontsize": 7.5, "frameon": False, "labelcolor": TEXT_COLOR}
        figure.legend(handles=shown, loc="lower left", ncols=min(columns, len(shown)), **style)
    else:
        figure.text(0.01, 0.01, "no foreground", color=TEXT_COLOR, fontsize=7.5)
    return as_png(figure)


def _fill(ax: Axes, plane: np.ndarray, extent: tuple[float, float, float, float], origin: str, opacity: float) -> None:
    colored = np.zeros((*plane.shape, 4), np.float32)
    for value in np.unique(plane[plane > 0]):
        colored[plane == value] = (*class_color(int(value)), opacity)
    ax.imshow(colored, extent=extent, origin="upper" if origin == "upper" else "lower", interpolation="nearest")


def class_color(value: int) -> tuple[float, float, float]:
    """Color of a label value, the same in all drawings: hues by the golden ratio, so that neighbors differ."""
    hue = (value - 1) * 0.618034 % 1.0
    return colorsys.hsv_to_rgb(hue, 0.85 if value % 2 else 0.6, 1.0)


def _names(labels: LabelSet) -> dict[int, str]:
    """Names of the values in a label map; of regions, the one that is painted with the value."""
    if labels.regions_class_order is not None and labels.has_regions:
        named = dict(zip(labels.regions_class_order, labels.foreground, strict=True))
    else:
        named = {values[0]: name for name, values in labels.foreground.items()}
    return named if labels.ignore is None else {**named, labels.ignore: "ignore"}


def _ml(volume: float) -> str:
    return f"{volume:.3g} ml" if volume < 1000 else f"{volume / 1000:.2f} l"
