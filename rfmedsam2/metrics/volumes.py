"""DSC, IoU, NSD, HD95 and volume error of all classes of a label map against a reference.

Overlap comes from one joint histogram of both label maps. Surfaces follow the definition of DeepMind's surface-distance
(Nikolov et al. 2018, arXiv:1809.04430): surface elements lie at voxel corners, are weighted by their area (marching
cubes), and everything outside the volume is background. Its table of areas is used; distances come from our own exact
Euclidean transform, restricted to the union box of a class and completed only at the surface points.

Arrays are (Z, Y, X), spacings mm along z, y, x. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

from rfmedsam2.errors import GeometryError, ImageError
from rfmedsam2.geometry import Triple
from rfmedsam2.metrics.kernels import distances_at, joint_histogram, surface_codes
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.report import ClassMetrics

BothEmpty = Literal["skip", "perfect"]
"""Score of a class that is absent from both masks: undefined (left out of means), or a perfect match."""

NSD_TOLERANCE_MM = 2.0
HD_PERCENT = 95.0
OUTSIDE_TABLE = 65535
"""Largest supported label value (size of the lookup table)."""


def empty_policy(both_empty: BothEmpty) -> str:
    """The rules for empty masks as text, for records and reports."""
    both = {
        "skip": "Both masks empty: all scores are undefined and left out of means.",
        "perfect": "Both masks empty: DSC, IoU and NSD count as 1, HD95 as 0 mm.",
    }[both_empty]
    return (
        f"{both} Reference empty, prediction not: DSC, IoU and NSD are 0, HD95 and the relative volume error are "
        "undefined. Prediction empty, reference not: DSC, IoU and NSD are 0, HD95 is undefined."
    )


def case_metrics(
    reference: np.ndarray,
    prediction: np.ndarray,
    labels: LabelSet,
    spacing_zyx_mm: Triple,
    *,
    nsd_tolerance_mm: float = NSD_TOLERANCE_MM,
    both_empty: BothEmpty = "skip",
) -> dict[str, ClassMetrics]:
    """Score every foreground class (or region) of one case.

    Args:
        reference: label map (Z, Y, X), integer or bool. Voxels of the ignore label are left out of both masks.
        prediction: label map of the same shape. The ignore label in it counts as background, as in nnU-Net.
        labels: names of the label values; regions are unions of their values.
        spacing_zyx_mm: voxel spacing along z, y, x.
        nsd_tolerance_mm: surfaces within this distance (inclusive) count as agreeing.
        both_empty: see `empty_policy`.

    Returns:
        Class name -> scores, in declared order.

    Raises:
        GeometryError: shapes differ.
        ImageError: undeclared label values; lists all of them.
    """
    reference, prediction = _comparable(reference, prediction)
    counts, boxes = confusion(reference, prediction, labels)
    position = {value: i for i, value in enumerate(labels.values)}
    voxel_ml = float(np.prod(spacing_zyx_mm)) / 1000.0
    scores: dict[str, ClassMetrics] = {}
    for name, (both, *sizes) in overlaps(counts, labels).items():
        values = labels.foreground[name]
        surfaces = None
        if min(sizes) > 0:
            box = _union_box(boxes[[position[value] for value in values]])
            masks = _Masks(reference=reference, prediction=prediction, values=values, ignore=labels.ignore)
            surfaces = _surfaces(masks, box, spacing_zyx_mm)
        scores[name] = _scores(both, (sizes[0], sizes[1]), surfaces, voxel_ml, nsd_tolerance_mm, both_empty)
    return scores


def overlaps(counts: np.ndarray, labels: LabelSet) -> dict[str, tuple[int, int, int]]:
    """Voxels of every foreground class (or region): in both label maps, in the reference, in the prediction.

    Args:
        counts: of `confusion`.
        labels: names of the label values.
    """
    position = {value: i for i, value in enumerate(labels.values)}
    kept = counts[: len(position), : len(position)]
    # a voxel predicted as the ignore label has no class: it counts for the reference's volume only
    unclassified = counts[: len(position), len(position) :].sum(axis=1)
    found: dict[str, tuple[int, int, int]] = {}
    for name, values in labels.foreground.items():
        rows = [position[value] for value in values]
        both = int(kept[np.ix_(rows, rows)].sum())
        found[name] = both, int(kept[rows].sum() + unclassified[rows].sum()), int(kept[:, rows].sum())
    return found


def absent_class(both_empty: BothEmpty) -> ClassMetrics:
    """Scores of a class that neither label map of a case holds."""
    return _scores(0, (0, 0), None, 0.0, NSD_TOLERANCE_MM, both_empty)


def confusion(reference: np.ndarray, prediction: np.ndarray, labels: LabelSet) -> tuple[np.ndarray, np.ndarray]:
    """Joint histogram of two label maps and the bounding box of every value, in one pass.

    Args:
        reference: label map (Z, Y, X).
        prediction: label map (Z, Y, X).
        labels: names of the label values.

    Returns:
        counts: int64 (n, n), voxels with reference value i and prediction value j in the order of
            `labels.allowed_values` (ignore last).
        boxes: int64 (n, 6), first z, y, x and last z, y, x of each value in either map (ignored voxels left out);
            first > last for an absent value.

    Raises:
        GeometryError: shapes differ.
        ImageError: undeclared label values.
    """
    reference, prediction = _comparable(reference, prediction)
    known = labels.allowed_values
    table = np.full(int(np.iinfo(reference.dtype).max) + 1, len(known), np.int32)
    for i, value in enumerate(known):
        if value < len(table):
            table[value] = i
    counts = np.zeros((len(known) + 1, len(known) + 1), np.int64)
    boxes = np.zeros((len(known) + 1, 6), np.int64)
    boxes[:, :3] = np.asarray(reference.shape)
    boxes[:, 3:] = -1
    joint_histogram(reference, prediction, table, len(known) - 1 if labels.ignore is not None else -1, counts, boxes)
    undeclared = (("reference", reference, counts[-1].sum()), ("prediction", prediction, counts[:, -1].sum()))
    faults = [
        f"the {side} holds {', '.join(map(str, sorted(set(np.unique(array).tolist()) - set(known))))}"
        for side, array, number in undeclared
        if number
    ]
    if faults:
        raise ImageError(
            "Undeclared label values",
            expected=f"only {', '.join(map(str, known))}",
            found="; ".join(faults),
            remedy="Correct the label map, or declare the value under labels in dataset.json",
        )
    return counts[:-1, :-1], boxes[:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurfaceDistances:
    """Surface elements of two masks: distance (mm) to the other surface and area (mm^2), in scan order.

    The distances are infinite where the other mask is empty; the arrays of an empty mask are empty.
    """

    reference_to_prediction: np.ndarray
    prediction_to_reference: np.ndarray
    areas_reference: np.ndarray
    areas_prediction: np.ndarray

    def nsd(self, tolerance_mm: float) -> float:
        """Normalized surface Dice: share of both surfaces' area within the tolerance of the other surface."""
        near = self.areas_reference[self.reference_to_prediction <= tolerance_mm].sum()
        near += self.areas_prediction[self.prediction_to_reference <= tolerance_mm].sum()
        return float(near / (self.areas_reference.sum() + self.areas_prediction.sum()))

    def hausdorff(self, percent: float = HD_PERCENT) -> float:
        """Robust Hausdorff distance in mm: the larger of both directions' area-weighted percentiles."""
        return max(
            _weighted_percentile(self.reference_to_prediction, self.areas_reference, percent),
            _weighted_percentile(self.prediction_to_reference, self.areas_prediction, percent),
        )


def surface_distances(reference: np.ndarray, prediction: np.ndarray, spacing_zyx_mm: Triple) -> SurfaceDistances:
    """Surface elements of two bool masks (Z, Y, X) and their distances to each other.

    Equal to surface-distance's `compute_surface_distances` up to the order of elements.

    Raises:
        GeometryError: shapes differ.
    """
    reference, prediction = _comparable(reference.astype(bool), prediction.astype(bool))
    box = _box_of(reference | prediction)
    if box is None:
        none = np.zeros(0)
        return SurfaceDistances(
            reference_to_prediction=none, prediction_to_reference=none, areas_reference=none, areas_prediction=none
        )
    masks = _Masks(reference=reference, prediction=prediction, values=(1,), ignore=None)
    return _surfaces(masks, box, spacing_zyx_mm)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Masks:
    """The two masks of one class, as views into the label maps."""

    reference: np.ndarray
    prediction: np.ndarray
    values: tuple[int, ...]
    ignore: int | None


def _comparable(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both maps as C-contiguous arrays of one unsigned dtype, so that kernels compile once; copied only if needed."""
    if reference.shape != prediction.shape or reference.ndim != 3:
        raise GeometryError(
            "The shapes of reference and prediction do not match",
            expected=f"{reference.shape} (z, y, x), the reference's",
            found=prediction.shape,
        )
    pair = [a.view(np.uint8) if a.dtype == bool else a for a in (reference, prediction)]
    if any(a.dtype != np.uint8 for a in pair):
        for side, array in zip(("reference", "prediction"), pair, strict=True):
            _require_lookup(side, array)
        pair = [a.astype(np.uint16, copy=False) for a in pair]
    return np.ascontiguousarray(pair[0]), np.ascontiguousarray(pair[1])


def _require_lookup(side: str, array: np.ndarray) -> None:
    if not np.issubdtype(array.dtype, np.integer):
        raise ImageError(f"The {side} is not a label map", expected="an integer dtype", found=array.dtype)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > OUTSIDE_TABLE:
        raise ImageError(
            f"The {side} holds undeclared label values",
            expected=f"label values from 0 to {OUTSIDE_TABLE}",
            found=f"{low} to {high}",
        )


def _scores(
    both: int,
    sizes: tuple[int, int],
    surfaces: SurfaceDistances | None,
    voxel_ml: float,
    tolerance_mm: float,
    both_empty: BothEmpty,
) -> ClassMetrics:
    """Scores of one class from its voxel counts (intersection; reference, prediction) and its surfaces, if any."""
    reference, prediction = sizes
    dsc: float | None = None
    iou: float | None = None
    nsd: float | None = None
    hd95: float | None = None
    if surfaces is not None:
        nsd, hd95 = surfaces.nsd(tolerance_mm), surfaces.hausdorff()
    if reference or prediction:
        dsc = 2 * both / (reference + prediction)
        iou = both / (reference + prediction - both)
        nsd = 0.0 if nsd is None else nsd
    elif both_empty == "perfect":
        dsc, iou, nsd, hd95 = 1.0, 1.0, 1.0, 0.0
    return ClassMetrics(
        dsc=dsc,
        iou=iou,
        nsd=nsd,
        hd95_mm=hd95,
        volume_error_ml=(prediction - reference) * voxel_ml,
        relative_volume_error=(prediction - reference) / reference if reference else None,
        reference_ml=reference * voxel_ml,
        predicted_ml=prediction * voxel_ml,
    )


def _weighted_percentile(distances: np.ndarray, areas: np.ndarray, percent: float) -> float:
    if not distances.size:
        return float("inf")
    order = np.lexsort((areas, distances))
    cumulative = np.cumsum(areas[order])
    index = int(np.searchsorted(cumulative / cumulative[-1], percent / 100.0))
    return float(distances[order[min(index, len(order) - 1)]])


def _union_box(boxes: np.ndarray) -> np.ndarray:
    """First and last index of each axis over several values: (6,)."""
    return np.concatenate([boxes[:, :3].min(axis=0), boxes[:, 3:].max(axis=0)])


def _box_of(mask: np.ndarray) -> np.ndarray | None:
    filled = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    if not filled[0].size:
        return None
    return np.array([f[0] for f in filled] + [f[-1] for f in filled], np.int64)


def _surfaces(masks: _Masks, box: np.ndarray, spacing_zyx_mm: Triple) -> SurfaceDistances:
    """Surface elements of one class inside its union box."""
    member = np.zeros(int(np.iinfo(masks.reference.dtype).max) + 1, np.uint8)
    member[list(masks.values)] = 1
    kept = np.ones_like(member)
    if masks.ignore is not None and masks.ignore < len(kept):
        kept[masks.ignore] = 0
    spacing = np.asarray(spacing_zyx_mm, dtype=np.float64)
    area_of_code = _areas(tuple(float(s) for s in spacing_zyx_mm))
    codes = [np.empty(tuple(box[3:] - box[:3] + 2), np.uint8) for _ in range(2)]
    surface_codes(masks.reference, masks.reference, member, kept, box, codes[0])
    surface_codes(masks.prediction, masks.reference, member, kept, box, codes[1])
    # 0: all eight voxels outside, 255: all inside; every other code is on the surface. Subtracting one wraps 0 to 255
    points = [np.flatnonzero((code - np.uint8(1)).ravel() < 254) for code in codes]
    areas = [area_of_code[code.ravel()[at]] for code, at in zip(codes, points, strict=True)]
    near_x, near_y = (np.empty(codes[0].shape, np.int16) for _ in range(2))
    distances = [distances_at(codes[1 - i], points[i], spacing, near_x, near_y) for i in range(2)]
    return SurfaceDistances(
        reference_to_prediction=distances[0],
        prediction_to_reference=distances[1],
        areas_reference=areas[0],
        areas_prediction=areas[1],
    )


@lru_cache(maxsize=64)
def _areas(spacing_zyx_mm: tuple[float, ...]) -> np.ndarray:
    """Area (mm^2) of each of the 256 neighbor codes; cached, because the table takes longer than a small class."""
    return create_table_neighbour_code_to_surface_area(spacing_zyx_mm)
