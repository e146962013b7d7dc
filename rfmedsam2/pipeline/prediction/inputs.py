"""Converting a predictor's inputs (files, arrays, images of other libraries) to volumes and box prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name
from nibabel.spatialimages import SpatialImage

from rfmedsam2.arrays import as_array, is_array
from rfmedsam2.errors import GeometryError, UsageError, type_name
from rfmedsam2.geometry import Grid
from rfmedsam2.inference.box_prompts import BoxPrompts
from rfmedsam2.records.box_prompts import BoxPrompt
from rfmedsam2.store.formats.image_header import ImageHeader, disagreement, parsing, repaired
from rfmedsam2.store.formats.label_values import as_labels
from rfmedsam2.store.images import read_channels
from rfmedsam2.volume import Volume, unmasked

ImageInput = str | Path | Sequence[str | Path] | np.ndarray | Volume | SpatialImage | sitk.Image
"""A file (or a DICOM folder), one file per channel, an array (also a tensor or nested lists), a volume, a nibabel or a
SimpleITK image."""
BoxInput = np.ndarray | Volume | Sequence[BoxPrompt | Mapping[str, Any]]
"""A label map (Z, Y, X) whose boxes are taken slice by slice, or a list of boxes (`BoxPrompt` or its JSON form)."""


def as_volume(
    image: ImageInput, spacing_zyx_mm: Sequence[float] | np.ndarray | None = None
) -> tuple[Volume, ImageHeader | None]:
    """Convert any input to a volume, with the file's header if it is a file.

    Args:
        image: an image of any supported type.
        spacing_zyx_mm: spacing of an array, for which it is required; other images have their own.

    Raises:
        UsageError: an unsupported type, a spacing for an image with its own, or none for an array.
        ImageError: a file cannot be read, or an array is not a volume.
        GeometryError: an invalid spacing, affine or direction.
    """
    paths = isinstance(image, list | tuple) and bool(image) and all(isinstance(path, str | Path) for path in image)
    if not paths and is_array(image):
        if spacing_zyx_mm is None:
            raise UsageError(
                "An array has no voxel spacing",
                expected="spacing_zyx_mm=(z, y, x) in mm",
                remedy="Give the spacing, or use a Volume, a nibabel or a SimpleITK image, which have their own",
            )
        return Volume.from_numpy(image, spacing_zyx_mm=spacing_zyx_mm), None
    if spacing_zyx_mm is not None:
        raise UsageError(
            "spacing_zyx_mm is only for arrays, because other images have their own spacing",
            expected="a NumPy array with spacing_zyx_mm, or an image without",
            found=type_name(image),
        )
    if isinstance(image, str | Path):
        return read_channels([Path(image)])
    if isinstance(image, Volume):
        return image, None
    if isinstance(image, SpatialImage):
        with parsing(Path(image.get_filename() or "the image")):  # nibabel reads voxels when they are asked for
            return Volume.from_nibabel(image), None
    if isinstance(image, sitk.Image):
        return Volume.from_sitk(image), None
    if paths:
        return read_channels([Path(path) for path in image])  # type: ignore[union-attr]
    raise UsageError(
        "This type of image is not supported",
        expected="a file, one file per channel, an array or tensor, a Volume, a nibabel or a SimpleITK image",
        found=type_name(image),
    )


def paths_of(image: ImageInput) -> list[Path]:
    """The files of an image, one or one per channel; none if it is in memory."""
    if isinstance(image, str | Path):
        return [Path(image)]
    return [Path(path) for path in image if isinstance(path, str | Path)] if isinstance(image, Sequence) else []


def straightened(volume: Volume) -> Volume:
    """The volume with its axes made perpendicular, as when reading image files.

    Raises:
        GeometryError: the axes are too far from perpendicular to be corrected.
    """
    grid, _ = repaired(volume.grid, where="the image")
    return replace(volume, grid=grid)


def as_boxes(boxes: BoxInput, grid: Grid) -> BoxPrompts:
    """Convert box prompts of any supported type, for an image on `grid`.

    Raises:
        UsageError: an unsupported type.
        ImageError: a label map whose values are not whole numbers from 0 to 65535.
        GeometryError: a label volume on another grid.
        RecordError: a box has faults; lists all of them.
    """
    if isinstance(boxes, Volume):
        differ = disagreement(grid, boxes.grid)
        if len(boxes.array) != 1 or (differ is not None and not differ[1]):
            found = f"{len(boxes.array)} channels" if differ is None else differ[0]
            raise GeometryError("The label map of the boxes is not on the grid of its image", found=found)
        return as_labels(boxes.array[0], where="boxes")
    if isinstance(boxes, np.ndarray) or (is_array(boxes) and not isinstance(boxes, Sequence)):
        array = as_array(boxes, "The label map of the boxes")
        if array.dtype.kind in "iufb" and array.size:
            return as_labels(unmasked(array, "The label map of the boxes"), where="boxes")
    if isinstance(boxes, Sequence) and not isinstance(boxes, str | bytes):
        return [box if isinstance(box, BoxPrompt) else BoxPrompt.parse(box, where="boxes") for box in boxes]
    raise UsageError(
        "This type of box prompts is not supported",
        expected="a label map (Z, Y, X), or a list of BoxPrompt(label=..., slice=..., box=(x0, y0, x1, y1))",
        found=f"{boxes.dtype} {boxes.shape}" if isinstance(boxes, np.ndarray) else type_name(boxes),
    )
