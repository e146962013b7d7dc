"""How much memory preprocessing takes at most: said before it begins, and what the number of workers follows from."""

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
"""Part of the free memory that the workers may fill."""
BESIDE_BYTES = 128 << 20
"""Beside arrays: compiling the loops at the first run (63 MB were measured), buffers of reading and packing."""
LABEL = 2
"""Bytes a voxel of a label map in memory, as read (1 or 2) and as prepared (2)."""
FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """What preprocessing takes.

    Attributes:
        workers: cases worked on at once.
        peak_bytes: what the process will hold at most, all that it holds already included.
        free_bytes: what could still be taken when it was asked.
    """

    workers: int
    peak_bytes: int
    free_bytes: int


def memory_need(source: CaseReader, plan: Plan, stages: Sequence[str], wanted: int) -> MemoryNeed:
    """Choose workers by the free memory, and say how much they will take.

    An upper bound: every worker has the largest cases in hand, all at their worst moment, and no array can be packed.

    Args:
        source: whose training cases; those that cannot be read count as nothing (they are reported in their turn).
        plan: how they are prepared.
        stages: of the plan, that they are prepared for.
        wanted: workers, if memory suffices; never fewer than 1 are taken.
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
    """Bytes that one case takes at the worst moment of being read, prepared and stored for some stages of a plan.

    Args:
        extent: of its image.
        plan: how it is prepared.
        stages: of the plan.
    """
    read = _read_bytes(extent)
    reading = read + extent.reading * extent.voxels
    phases = [_phases(extent, plan, stage) for stage in stages]
    # what was read is let go before the last stage is stored
    storing = max(storing for _, storing in phases) + (read if len(stages) > 1 else 0)
    return max(reading, storing, *(read + preparing for preparing, _ in phases))


def _read_bytes(extent: Extent) -> int:
    return (extent.channels * extent.itemsize + LABEL) * extent.voxels


def _phases(extent: Extent, plan: Plan, name: str) -> tuple[int, int]:
    """Of preparing and of storing for one stage, beside what was read; nothing is cropped in the worst case."""
    stage, order, channels = plan.stage(name), plan.transpose_forward, extent.channels
    a, b, c = (extent.shape_zyx[axis] for axis in order)
    before = (extent.spacing_zyx_mm[order[0]], extent.spacing_zyx_mm[order[1]], extent.spacing_zyx_mm[order[2]])
    target = target_spacing(stage, before)
    new = planned_shape((a, b, c), before, target)
    after = new[0] * new[1] * new[2]
    resampled = new != (a, b, c)
    # the label map beside two masks of a byte a voxel; then one of them, and the label map resampled
    label = LABEL * after if resampled else LABEL * extent.voxels
    marking = max((LABEL + 2) * extent.voxels, (LABEL + 1) * extent.voxels + label)
    # it is ready when the image becomes floats
    normalizing = (1 + FLOAT * channels) * extent.voxels + label
    resampling = 0
    if resampled:
        how = stage.resampling
        apart = separate_axis(before, target, how.anisotropy_threshold)
        axis = 0 if apart is None else apart
        # one channel, resampled along two axes of three, where the third one is not left alone or chosen from
        between = (a, b, c)[axis] != new[axis] and (apart is None or how.order_z > 0)
        planes = FLOAT * (a, b, c)[axis] * after // new[axis] if between else 0
        resampling = FLOAT * channels * (extent.voxels + after) + planes + label
    # the image, and twice what it is packed to; the label map, and its narrow copy
    storing = 3 * FLOAT * channels * after + (LABEL + 1) * after
    return max(marking, normalizing, resampling), storing
