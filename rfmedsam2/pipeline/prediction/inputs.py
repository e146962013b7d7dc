"""What a program may hand to a predictor - files, arrays, images of other libraries - as a volume and box prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name
from nibabel.spatialimages import SpatialImage

from rfmedsam2.errors import GeometryError, UsageError
from rfmedsam2.geometry import Grid
from rfmedsam2.inference.box_prompts import BoxPrompts
from rfmedsam2.records.box_prompts import BoxPrompt
from rfmedsam2.store.formats.image_header import ImageHeader, disagreement, repaired
from rfmedsam2.store.images import as_labels, read_channels
from rfmedsam2.volume import Volume, kind_of

ImageInput = str | Path | Sequence[str | Path] | np.ndarray | Volume | SpatialImage | sitk.Image
"""A file (or a DICOM folder), files of one channel each, an array, a volume, a nibabel or a SimpleITK image."""
BoxInput = np.ndarray | Volume | Sequence[BoxPrompt | Mapping[str, Any]]
"""A label map (Z, Y, X) whose classes are boxed slice by slice, or boxes one by one (`BoxPrompt` or its JSON form)."""


def as_volume(
    image: ImageInput, spacing_zyx_mm: Sequence[float] | np.ndarray | None = None
) -> tuple[Volume, ImageHeader | None]:
    """The volume of any input, with its file's header if it is one.

    Args:
        image: any kind.
        spacing_zyx_mm: of an array, for which it is needed; all other kinds know theirs.

    Raises:
        UsageError: another kind of thing, a spacing for what has one, none for an array.
        ImageError: a file that cannot be read, an array that is no volume.
        GeometryError: an impossible spacing, affine or direction.
    """
    if isinstance(image, np.ndarray):
        if spacing_zyx_mm is None:
            raise UsageError(
                "An array has no voxel spacing",
                expected="spacing_zyx_mm=(z, y, x) in mm",
                remedy="Give the spacing, or a Volume, a nibabel or a SimpleITK image, which know theirs",
            )
        return Volume.from_numpy(image, spacing_zyx_mm=spacing_zyx_mm), None
    if spacing_zyx_mm is not None:
        raise UsageError(
            "spacing_zyx_mm is for arrays only: other images know their spacing",
            expected="a NumPy array with spacing_zyx_mm, or an image without",
            found=kind_of(image),
        )
    if isinstance(image, str | Path):
        return read_channels([Path(image)])
    if isinstance(image, Volume):
        return image, None
    if isinstance(image, SpatialImage):
        return Volume.from_nibabel(image), None
    if isinstance(image, sitk.Image):
        return Volume.from_sitk(image), None
    if isinstance(image, Sequence) and image and all(isinstance(path, str | Path) for path in image):
        return read_channels([Path(path) for path in image])
    raise UsageError(
        "This cannot be predicted",
        expected="a file, files of one channel each, a NumPy array, a Volume, a nibabel or a SimpleITK image",
        found=kind_of(image),
        remedy="Give tensor.detach().cpu().numpy()" if hasattr(image, "detach") else None,
    )


def straightened(volume: Volume) -> Volume:
    """The same voxels on perpendicular axes, as image files are read.

    Raises:
        GeometryError: axes further from perpendicular than is repaired.
    """
    grid, _ = repaired(volume.grid, where="the image")
    return replace(volume, grid=grid)


def as_boxes(boxes: BoxInput, grid: Grid) -> BoxPrompts:
    """Box prompts of any kind, for an image on `grid`.

    Raises:
        UsageError: another kind of thing.
        ImageError: a label map whose values are not whole numbers from 0 to 65535.
        GeometryError: a label volume of another grid.
        RecordError: a box with faults, all listed.
    """
    if isinstance(boxes, Volume):
        differ = disagreement(grid, boxes.grid)
        if len(boxes.array) != 1 or (differ is not None and not differ[1]):
            found = f"{len(boxes.array)} channels" if differ is None else differ[0]
            raise GeometryError("The label map of the boxes does not lie on the grid of its image", found=found)
        return as_labels(boxes.array[0], where="boxes")
    if isinstance(boxes, np.ndarray) and boxes.dtype.kind in "iufb" and boxes.size:
        return as_labels(boxes, where="boxes")
    if isinstance(boxes, Sequence) and not isinstance(boxes, str | bytes):
        return [box if isinstance(box, BoxPrompt) else BoxPrompt.parse(box, where="boxes") for box in boxes]
    raise UsageError(
        "These are not box prompts",
        expected="a label map (Z, Y, X), or a list of BoxPrompt(label=..., slice=..., box=(x0, y0, x1, y1))",
        found=f"{boxes.dtype} {boxes.shape}" if isinstance(boxes, np.ndarray) else kind_of(boxes),
    )
