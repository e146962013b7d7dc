"""The formats in which label maps are given to other programs, with names, colors and codes of the labels in the file.

None of them gets overlapping segments: a label map of regions is written by its values (`codes.segments_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.errors import GeometryError, UsageError
from rfmedsam2.geometry import Grid
from rfmedsam2.store.exchange.codes import Segment
from rfmedsam2.store.exchange.dicom_segmentation import require_highdicom, source_files, write_segmentation
from rfmedsam2.store.exchange.headers import caret_extension, json_field, slicer_fields
from rfmedsam2.store.formats.dicom import read_dicom_header
from rfmedsam2.store.formats.image_header import ImageHeader
from rfmedsam2.store.formats.itk import write_itk_label
from rfmedsam2.store.formats.label_values import as_labels
from rfmedsam2.store.formats.nifti import write_nifti_label
from rfmedsam2.system.atomic import atomic

ENDINGS = {
    "nifti": ".nii.gz",
    "nrrd": ".nrrd",
    "seg.nrrd": ".seg.nrrd",
    "mha": ".mha",
    "dicom-seg": ".dcm",
    "dicom-seg-labelmap": ".dcm",
}
"""File ending of each format."""
NO_SERIES = "A DICOM segmentation needs the DICOM series of its image"
_DICOM = {"dicom-seg": "BINARY", "dicom-seg-labelmap": "LABELMAP"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSource:
    """A label map that is written, and what is known of it.

    Attributes:
        labels_zyx: the labels.
        header: of the map, or of its image.
        segments: what the values are.
        series: DICOM series that it belongs to.
        automatic: whether a model made it.
    """

    labels_zyx: np.ndarray
    header: ImageHeader
    segments: Sequence[Segment]
    series: Path | None = None
    automatic: bool = False


def needs_series(formats: Sequence[str]) -> bool:
    """Whether any of these formats is written from a source series."""
    return not _DICOM.keys().isdisjoint(formats)


def exchange_path(folder: Path, case: str, format: str) -> Path:
    """Path of a label map of a case: in a folder of the format, so that all commands take it as a folder of maps."""
    return folder / format / f"{case}{ENDINGS[format]}"


def require_exchangeable(source: LabelSource, formats: Sequence[str]) -> None:
    """Check before anything is written that a label map can be written in these formats.

    Raises:
        MissingPackageError: highdicom is needed, and not installed.
        UsageError: a DICOM-SEG is wanted of a map without series, or without labels.
        GeometryError: the map is not on the grid of its series.
        ImageError: the series cannot be read.
    """
    if not needs_series(formats):
        return
    require_highdicom()
    if source.series is None:
        raise UsageError(NO_SERIES)
    if not source.segments:
        raise UsageError("A DICOM segmentation needs at least one label", found="only background, and no label table")
    _on_series(source.labels_zyx, source.header, source.series)
    source_files(source.series)


def write_exchange(path: Path, source: LabelSource, *, format: str, keep_empty: bool = False) -> None:
    """Write a label map in a format, atomically.

    Args:
        path: the file.
        source: the label map.
        format: one of `ENDINGS`.
        keep_empty: write frames without labels of a DICOM-SEG, too.

    Raises:
        StoreError: the folder cannot be written, or the series lacks what a DICOM-SEG takes over from it.
        RfMedSamError: see `require_exchangeable`.
    """
    labels, segments, header = as_labels(source.labels_zyx, where=path), source.segments, source.header
    with atomic(path) as temporary:
        if format == "nifti":
            write_nifti_label(temporary, labels, header, caret_extension(segments))
        elif format == "seg.nrrd":
            write_itk_label(temporary, labels, header, slicer_fields(segments, labels))
        elif format in _DICOM:
            if source.series is None:
                raise UsageError(NO_SERIES)
            placed = _on_series(labels, header, source.series)
            kind = _DICOM[format]
            write_segmentation(
                temporary,
                placed,
                segments,
                source.series,
                kind=kind,
                keep_empty=keep_empty,
                automatic=source.automatic,
            )
        else:
            write_itk_label(temporary, labels, header, json_field(segments))


def _on_series(labels_zyx: np.ndarray, header: ImageHeader, series: Path) -> np.ndarray:
    """The labels with the axes of a series, which may run in another order or direction in the map."""
    target = read_dicom_header(series).grid
    turned = turned_to(labels_zyx, header.grid, target)
    if turned is None:
        raise GeometryError(
            "The label map is not on the grid of its DICOM series",
            where=series,
            expected=f"{target.shape_zyx} (z, y, x) of {_rounded(target)} mm",
            found=f"{header.grid.shape_zyx} of {_rounded(header.grid)} mm",
            remedy=f"Resample the label map to the series, or name the series of its image ({option('series')})",
        )
    return turned


def turned_to(array_zyx: np.ndarray, grid: Grid, target: Grid) -> np.ndarray | None:
    """An array with its axes reordered and flipped to another grid; None if that does not bring them together."""
    steps = np.linalg.inv(target.affine_lps) @ grid.affine_lps
    axes = np.rint(steps[:3, :3])
    if not (np.abs(axes).sum(axis=0) == 1).all() or not (np.abs(axes).sum(axis=1) == 1).all():
        return None
    order = [int(np.argmax(np.abs(axes[2 - zyx]))) for zyx in range(3)]  # target z, y, x -> index x, y, z of the map
    turned = array_zyx.transpose([2 - xyz for xyz in order])
    turned = turned[tuple(slice(None, None, int(axes[2 - zyx, xyz])) for zyx, xyz in enumerate(order))]
    if turned.shape != target.shape_zyx:
        return None
    size = np.array(array_zyx.shape[::-1]) - 1
    corners = np.array(np.meshgrid(*([0, n] for n in size))).reshape(3, -1)
    landed = steps[:3, :3] @ corners + steps[:3, 3:]
    start = np.where(axes.sum(axis=1) < 0, np.array(target.shape_zyx[::-1]) - 1, 0)[:, None]
    return turned if np.abs(landed - (axes @ corners + start)).max() < 0.5 else None


def _rounded(grid: Grid) -> tuple[float, ...]:
    return tuple(round(s, 4) for s in grid.spacing_zyx_mm)
