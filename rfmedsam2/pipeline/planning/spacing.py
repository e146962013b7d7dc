"""The target spacing: nnU-Net's rule, and the coarsening by which small budgets still see a whole case.

A network learns an abdomen within minutes if a patch shows all of it, and hardly at all if a patch shows a seventh.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from rfmedsam2.pipeline.planning.presets import CaseSizing
from rfmedsam2.records.fingerprint import Fingerprint

ANISOTROPY = 3.0
SPACING_STEP = 1.03


def target_spacing(fingerprint: Fingerprint) -> np.ndarray:
    """nnU-Net's target spacing in the axis order of the files, (3,) mm.

    The median; along a strongly anisotropic axis the 10th percentile, so that resolution along it is not lost.
    """
    spacings = np.array([case.spacing_zyx_mm for case in fingerprint.cases], dtype=float)
    shapes = np.array([case.shape_after_crop_zyx for case in fingerprint.cases], dtype=float)
    target, shape = np.percentile(spacings, 50, 0), np.percentile(shapes, 50, 0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarsest_other = max(target[others])
    is_coarse = target[worst] > ANISOTROPY * coarsest_other
    has_few_slices = shape[worst] * ANISOTROPY < min(shape[others])
    if is_coarse and has_few_slices:
        fine = float(np.percentile(spacings[:, worst], 10))
        target[worst] = fine if fine >= coarsest_other else coarsest_other + 1e-5
    return target


def median_shape(fingerprint: Fingerprint, spacing_zyx_mm: np.ndarray) -> np.ndarray:
    """Median over cases of the shape after crop and resampling, (3,), axis order of the files; may hold halves."""
    shapes = [
        [
            round(old / new * n)
            for old, new, n in zip(case.spacing_zyx_mm, spacing_zyx_mm, case.shape_after_crop_zyx, strict=True)
        ]
        for case in fingerprint.cases
    ]
    return np.median(shapes, 0)


def coarsened(
    spacing_mm: np.ndarray, shape: np.ndarray, max_voxels: int, *, max_voxel_mm3: float = math.inf
) -> np.ndarray:
    """Coarsen the spacing, finest axes first and then all together, until the shape has at most `max_voxels`.

    Stops before voxels become larger than `max_voxel_mm3`.
    """
    level, coarse = float(spacing_mm.min()), spacing_mm
    while np.prod(spacing_mm / coarse * shape) > max_voxels:
        level *= SPACING_STEP
        coarser = np.maximum(spacing_mm, level)
        if np.prod(coarser) > max_voxel_mm3:
            break
        coarse = coarser
    return coarse


def coarsened_by(
    sizing: CaseSizing, spacing_mm: np.ndarray, fingerprint: Fingerprint, values: Collection[int]
) -> np.ndarray:
    """Coarsen the target spacing, (3,) mm in axis order of the files, by a preset's rule; see `CaseSizing`."""
    shape = median_shape(fingerprint, spacing_mm)
    smallest = min(class_volumes_mm3(fingerprint, values).values(), default=math.inf)
    wanted = coarsened(spacing_mm, shape, sizing.whole_voxels, max_voxel_mm3=smallest / sizing.class_voxels)
    return coarsened(wanted, median_shape(fingerprint, wanted), sizing.max_voxels)


def class_volumes_mm3(fingerprint: Fingerprint, values: Collection[int]) -> dict[int, float]:
    """Median volume of each of these label values over the cases that have it."""
    volumes: dict[int, list[float]] = {}
    for case in fingerprint.cases:
        for value, voxels in case.voxels_by_label.items():
            if value in values:
                volumes.setdefault(value, []).append(voxels * math.prod(case.spacing_zyx_mm))
    return {value: float(np.median(found)) for value, found in volumes.items()}
