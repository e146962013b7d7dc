"""Scores of two masks: Dice, normalized surface Dice (NSD) and the 95th percentile Hausdorff distance (HD95).

Masks are arrays (or tensors, or nested lists) of bool, or of whole numbers with the `label` that is meant; spacings are
mm along z, y, x. Equal to DeepMind's surface-distance, and for Dice to MONAI. Whole label maps with regions and ignored
voxels are scored in one pass by `metrics.volumes.case_metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rfmedsam2.arrays import as_array
from rfmedsam2.errors import GeometryError, ImageError, UsageError
from rfmedsam2.geometry import spacing_of
from rfmedsam2.metrics.volumes import HD_PERCENT, NSD_TOLERANCE_MM, surface_distances

Mask = np.ndarray | Sequence[Any] | Any
"""A NumPy array, a tensor of torch, or nested lists."""


def dice(reference: Mask, prediction: Mask, *, label: int | None = None) -> float:
    """Dice similarity coefficient, 2 |A and B| / (|A| + |B|), of two masks with any number of axes.

    Args:
        reference: mask, or label map with `label`.
        prediction: of the same shape.
        label: the value that is meant; None: the arrays are masks (bool, or 0 and 1).

    Returns:
        0 to 1; NaN where both masks are empty.

    Raises:
        GeometryError: shapes differ.
        ImageError: an array of fractions.
        UsageError: not an array, or a label map without `label`.
    """
    one, two = _masks(reference, prediction, label)
    total = int(one.sum()) + int(two.sum())
    return 2 * int((one & two).sum()) / total if total else math.nan


def nsd(
    reference: Mask,
    prediction: Mask,
    spacing_zyx_mm: Sequence[float] | np.ndarray,
    *,
    tolerance_mm: float = NSD_TOLERANCE_MM,
    label: int | None = None,
) -> float:
    """Normalized surface Dice: the share of both surfaces' area that lies within a tolerance of the other surface.

    Args:
        reference: mask (Z, Y, X), or label map with `label`.
        prediction: of the same shape.
        spacing_zyx_mm: distance of voxel centers along z, y, x, mm.
        tolerance_mm: inclusive, 0 or more.
        label: the value that is meant; None: the arrays are masks (bool, or 0 and 1).

    Returns:
        0 to 1; 0 where one mask is empty, NaN where both are.

    Raises:
        GeometryError: shapes differ, not three axes, an impossible spacing.
        ImageError: an array of fractions.
        UsageError: not an array, a label map without `label`, a negative tolerance.
    """
    if not isinstance(tolerance_mm, int | float | np.number) or not tolerance_mm >= 0:
        raise UsageError("tolerance_mm must be 0 or more", found=repr(tolerance_mm))
    one, two = _volumes(reference, prediction, label)
    distances = surface_distances(one, two, spacing_of(spacing_zyx_mm))
    return distances.nsd(tolerance_mm) if one.any() or two.any() else math.nan


def hd95(
    reference: Mask,
    prediction: Mask,
    spacing_zyx_mm: Sequence[float] | np.ndarray,
    *,
    label: int | None = None,
) -> float:
    """95th percentile Hausdorff distance in mm: the larger of both directions' area-weighted percentiles.

    Args:
        reference: mask (Z, Y, X), or label map with `label`.
        prediction: of the same shape.
        spacing_zyx_mm: distance of voxel centers along z, y, x, mm.
        label: the value that is meant; None: the arrays are masks (bool, or 0 and 1).

    Returns:
        mm; infinite where one mask is empty, NaN where both are.

    Raises:
        GeometryError: shapes differ, not three axes, an impossible spacing.
        ImageError: an array of fractions.
        UsageError: not an array, or a label map without `label`.
    """
    one, two = _volumes(reference, prediction, label)
    distances = surface_distances(one, two, spacing_of(spacing_zyx_mm))
    if one.any() and two.any():
        return distances.hausdorff(HD_PERCENT)
    return math.inf if one.any() or two.any() else math.nan


def _masks(reference: Mask, prediction: Mask, label: int | None) -> tuple[np.ndarray, np.ndarray]:
    one, two = _mask("reference", reference, label), _mask("prediction", prediction, label)
    if one.shape != two.shape:
        raise GeometryError("The shapes of reference and prediction do not match", expected=one.shape, found=two.shape)
    return one, two


def _volumes(reference: Mask, prediction: Mask, label: int | None) -> tuple[np.ndarray, np.ndarray]:
    one, two = _masks(reference, prediction, label)
    if one.ndim != 3:
        raise GeometryError("Distances are measured between volumes", expected="masks (Z, Y, X)", found=one.shape)
    return one, two


def _mask(side: str, mask: Mask, label: int | None) -> np.ndarray:
    array = as_array(mask, f"The {side}")
    if np.ma.is_masked(array):
        raise ImageError(
            f"The {side} is a masked array",
            expected="a value for every voxel",
            found=f"{np.ma.count_masked(array)} masked voxels",
            remedy="Give array.filled(VALUE), or leave these voxels out of both masks",
        )
    if array.dtype.kind not in "iub":
        raise ImageError(f"The {side} is not a mask", expected="bool or whole numbers", found=array.dtype)
    if label is not None:
        if not isinstance(label, int | np.integer):
            raise UsageError("label is not the value of a class", expected="a whole number", found=repr(label))
        return array == label
    if array.dtype.kind != "b" and array.size and (array.min() < 0 or array.max() > 1):
        raise UsageError(
            f"The {side} is a label map, not a mask",
            expected="bool, or 0 and 1",
            found=f"values from {array.min()} to {array.max()}",
            remedy="Give label=... to score one of its values",
        )
    return array.astype(bool, copy=False)
