"""Label values of a file: whole numbers in the smallest unsigned type, restored where a format has disguised them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from rfmedsam2.simpleitk import sitk
from rfmedsam2.store.formats.image_header import NotLabelsError

SLICER_ENDINGS = (".seg.nrrd", ".seg.nhdr")
"""Segmentations of 3D Slicer."""
NRRD_ENDINGS = (".nrrd", ".nhdr")
_INTEGER_TOLERANCE = 1e-3  # for labels that were stored as floats
_STORE_AGAIN = "Save the labels again in an integer type, without scaling: dtype=numpy.uint8, and a new header"
_LARGEST_SLOPE = 0.96  # above it rounding takes labels half the way to the next; any number would pass as a label


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """One segment of a Slicer file: its name, and the value of its voxels in its layer."""

    name: str
    value: int
    layer: int


def as_labels(array: np.ndarray, *, where: object, scaling: tuple[float, float] | None = None) -> np.ndarray:
    """Convert an array to uint8, or to uint16 if its values need it.

    Args:
        array: any shape.
        where: the file, for errors.
        scaling: slope and intercept by which stored integers were multiplied. nibabel stores floats in an integer
            header as the nearest multiples of a slope; labels are restored if the slope is small enough that they
            cannot have been anything else.

    Raises:
        NotLabelsError: values that are not whole numbers from 0 to 65535.
    """
    rounding = 0.0 if scaling is None else abs(scaling[0]) / 2
    restorable = 0 < 2 * rounding < _LARGEST_SLOPE
    tolerance = max(_INTEGER_TOLERANCE, 1.01 * rounding) if restorable else _INTEGER_TOLERANCE
    with np.errstate(invalid="ignore"):
        low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise NotLabelsError(
            "A label map holds NaN or infinity",
            where=where,
            expected="whole numbers from 0 to 65535",
            found=f"{np.count_nonzero(~np.isfinite(array))} such voxels",
            remedy="Store the label map as unsigned integers",
        )
    if not (low > -0.5 and high < np.iinfo(np.uint16).max + 0.5):
        raise NotLabelsError(
            "A label map holds values outside the range of labels",
            where=where,
            expected="whole numbers from 0 to 65535",
            found=f"values from {low} to {high}",
            remedy="Give every label a number of that range",
        )
    kind = np.uint8 if high < np.iinfo(np.uint8).max + 0.5 else np.uint16
    if array.dtype.kind in "iu":
        return array.astype(kind, copy=False)
    labels = np.rint(array).astype(kind)
    away = np.abs(array - labels)
    if away.max() <= tolerance and _may_have_lost(scaling, float(high)):
        raise NotLabelsError(
            "A label map may have lost small labels, which its scaling makes equal to 0",
            where=where,
            expected="a slope of 1, a whole number, or below 1",
            found=f"stored values that the header multiplies by {scaling[0]:.6g} (scl_slope)" if scaling else None,
            remedy=_STORE_AGAIN,
        )
    if away.max() > tolerance:
        example = f"for instance {array.flat[away.argmax()]:.6g}"
        slope = "" if scaling is None else f"; its header multiplies stored values by {scaling[0]:.6g} (scl_slope)"
        raise NotLabelsError(
            "A label map holds fractional values",
            where=where,
            expected="integers",
            found=f"{int((away > tolerance).sum())} such voxels, {example}{slope}",
            remedy="Resample label maps with nearest neighbor, and store them as integers"
            if scaling is None
            else _STORE_AGAIN,
        )
    return labels


def _may_have_lost(scaling: tuple[float, float] | None, high: float) -> bool:
    """Whether values were rounded to multiples of a slope above 1, as nibabel does, so that 1 may have become 0."""
    if scaling is None or (slope := abs(scaling[0])) < 1:
        return False
    return abs(slope - round(slope)) * high / slope > _INTEGER_TOLERANCE


def merged_layers(array: np.ndarray, path: Path) -> np.ndarray | None:
    """One label map (1,Z,Y,X) from the layers (C,Z,Y,X) of a Slicer segmentation; None if the file is not one.

    Raises:
        NotLabelsError: segments of different layers overlap, or have the same value.
    """
    segments = _segments(path)
    if not segments:
        return None
    for one, other in combinations(segments, 2):
        if one.layer != other.layer and one.value == other.value:
            raise _not_one_map(path, f"{one.name} and {other.name}, which both have the value {one.value}")
    overlap = np.count_nonzero(array, axis=0) > 1
    if overlap.any():
        at = tuple(int(i) for i in np.argwhere(overlap)[0])
        names = [s.name for s in segments if 0 <= s.layer < len(array) and array[(s.layer, *at)] == s.value]
        raise _not_one_map(path, f"{' and '.join(names) or 'segments'} that overlap in {int(overlap.sum())} voxels")
    return array.max(axis=0, keepdims=True)


def segment_values(path: Path) -> dict[str, int]:
    """Names of the segments of a Slicer segmentation with their values; empty for other files.

    Raises:
        ValueError: a value is not a number.
    """
    if not path.name.lower().endswith(NRRD_ENDINGS):
        return {}
    return {segment.name: segment.value for segment in _segments(path)}


def _not_one_map(path: Path, found: str) -> NotLabelsError:
    return NotLabelsError(
        "This segmentation of 3D Slicer is not one label map",
        where=path,
        expected="segments with different values that do not overlap",
        found=found,
        remedy="In Slicer export the segments to a labelmap (Segmentations, Export), and save that",
    )


def _segments(path: Path) -> list[_Segment]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    keys = reader.GetMetaDataKeys()
    numbers = sorted(int(match[1]) for key in keys if (match := re.fullmatch(r"Segment(\d+)_ID", key)))

    def field(number: int, name: str, default: str) -> str:
        key = f"Segment{number}_{name}"
        return reader.GetMetaData(key).strip() if key in keys else default

    return [  # before Slicer 4.11 each segment had a layer and the value 1
        _Segment(
            name=field(number, "Name", f"segment {number}"),
            value=int(field(number, "LabelValue", "1")),
            layer=int(field(number, "Layer", str(number))),
        )
        for number in numbers
    ]
