"""Upper bound of the memory of preprocessing, which is reported first and limits the number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import psutil

from rfmedsam2.pipeline.preprocessing.case_reader import CaseReader, Extent
from rfmedsam2.records.plan import Plan
from rfmedsam2.system.memory import free_bytes
from rfmedsam2.transforms.prepare import target_spacing
from rfmedsam2.transforms.resample import planned_shape, separate_axis

MEMORY_SHARE = 0.6
"""Fraction of the free memory that workers may use."""
BESIDE_BYTES = 128 << 20
"""Memory besides arrays: compiling loops in the first run (63 MB measured), buffers for reading and compression."""
LABEL = 2
"""Bytes per voxel of a label map in memory, as read (1 or 2) and as preprocessed (2)."""
FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Memory estimate of preprocessing.

    Attributes:
        workers: number of cases processed in parallel.
        peak_bytes: upper bound of the process's memory, including what it already uses.
        free_bytes: free memory at the time of the estimate.
    """

    workers: int
    peak_bytes: int
    free_bytes: int


def memory_need(source: CaseReader, plan: Plan, stages: Sequence[str], wanted: int) -> MemoryNeed:
    """Choose the number of workers by the free memory, and estimate their memory.

    The estimate is an upper bound: all workers process the largest cases, all at their peak, and nothing compresses.

    Args:
        source: reader of the training cases; unreadable ones count as zero (they are reported when they are read).
        plan: the plan.
        stages: stages of the plan to preprocess for.
        wanted: requested number of workers; reduced if memory does not suffice, but never below 1.
    """
    extents = sorted(source.extents(), key=lambda extent: case_bytes(extent, plan, stages), reverse=True)
    sums = list(accumulate(case_bytes(extent, plan, stages) for extent in extents))
    free = free_bytes()
    fitting = sum(total <= MEMORY_SHARE * free for total in sums)
    workers = max(1, wanted if fitting == len(sums) else min(wanted, fitting))
    at_once = min(workers, len(sums))
    held = psutil.Process().memory_info().rss + BESIDE_BYTES
    return MemoryNeed(workers=workers, peak_bytes=held + (sums[at_once - 1] if sums else 0), free_bytes=free)


def case_bytes(extent: Extent, plan: Plan, stages: Sequence[str]) -> int:
    """Peak memory of one case while it is read, preprocessed and stored for some stages of a plan.

    Args:
        extent: size of its image.
        plan: the plan.
        stages: stages of the plan.
    """
    read = _read_bytes(extent)
    reading = read + extent.reading * extent.voxels
    phases = [_phases(extent, plan, stage) for stage in stages]
    # the decoded case is released before the last stage is stored
    storing = max(storing for _, storing in phases) + (read if len(stages) > 1 else 0)
    return max(reading, storing, *(read + preparing for preparing, _ in phases))


def _read_bytes(extent: Extent) -> int:
    return (extent.channels * extent.itemsize + LABEL) * extent.voxels


def _phases(extent: Extent, plan: Plan, name: str) -> tuple[int, int]:
    """Bytes of preprocessing and of storing for one stage, besides the decoded case; assumes no cropping."""
    stage, order, channels = plan.stage(name), plan.transpose_forward, extent.channels
    a, b, c = (extent.shape_zyx[axis] for axis in order)
    before = (extent.spacing_zyx_mm[order[0]], extent.spacing_zyx_mm[order[1]], extent.spacing_zyx_mm[order[2]])
    target = target_spacing(stage, before)
    new = planned_shape((a, b, c), before, target)
    after = new[0] * new[1] * new[2]
    resampled = new != (a, b, c)
    # the label map and two masks of one byte per voxel; then one of them and the resampled label map
    label = LABEL * after if resampled else LABEL * extent.voxels
    marking = max((LABEL + 2) * extent.voxels, (LABEL + 1) * extent.voxels + label)
    # the label map is finished before the image is converted to float
    normalizing = (1 + FLOAT * channels) * extent.voxels + label
    resampling = 0
    if resampled:
        how = stage.resampling
        apart = separate_axis(before, target, how.anisotropy_threshold)
        axis = 0 if apart is None else apart
        # one channel, resampled along two of three axes, unless the third is unchanged or takes nearest planes
        between = (a, b, c)[axis] != new[axis] and (apart is None or how.order_z > 0)
        planes = FLOAT * (a, b, c)[axis] * after // new[axis] if between else 0
        resampling = FLOAT * channels * (extent.voxels + after) + planes + label
    # the image and twice its compressed size; the label map and its narrow copy
    storing = 3 * FLOAT * channels * after + (LABEL + 1) * after
    return max(marking, normalizing, resampling), storing
