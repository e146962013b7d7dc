"""Sampling foreground locations once per case, from which training picks patch centers.

Numbers are nnU-Net's: all voxels of a class up to 10 000, else the larger of 10 000 and 1 %. With regions, each region
is sampled (any of its values); with an ignore label, all annotated voxels (with background) are sampled too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.system.numba_cache import compiled

ANNOTATED = -1
"""Key of the sampled voxels that carry any annotation (only with an ignore label)."""
LEAST = 10_000
LEAST_SHARE_PERCENT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreground:
    """Sampled voxels of one class or region.

    Attributes:
        key: label value; with regions 1, 2, ... in declared order; -1 for all annotated voxels.
        voxels: number of voxels of the class in the case.
        index: (n,) ascending flat indices into (a, b, c), int32 (int64 beyond 2**31 voxels).
    """

    key: int
    voxels: int
    index: np.ndarray


def foreground_keys(labels: LabelSet) -> dict[int, tuple[int, ...]]:
    """Key -> label values, for everything that locations are sampled of."""
    regions = labels.foreground.values()
    keys = dict(enumerate(regions, start=1)) if labels.has_regions else {values[0]: values for values in regions}
    if labels.ignore is not None:
        keys[ANNOTATED] = labels.values
    return keys


def sample_foreground(label: np.ndarray, labels: LabelSet, *, seed: int = 1234) -> tuple[Foreground, ...]:
    """Draw locations without replacement, every voxel of a class equally likely.

    Args:
        label: (a, b, c) integers; negative ones (outside) belong to no class.
        labels: names of the label values.
        seed: seed of the random draw.
    """
    keys = foreground_keys(labels)
    flat = np.ascontiguousarray(label).reshape(-1)
    counts = _count(flat)
    member = np.zeros((len(keys), counts.size), bool)
    for row, values in zip(member, keys.values(), strict=True):
        row[[v for v in values if v < counts.size]] = True
    totals = member.astype(np.int64) @ counts
    wanted = np.maximum(np.minimum(totals, LEAST), -(-totals * LEAST_SHARE_PERCENT // 100))
    kind = np.dtype(np.int32 if flat.size <= np.iinfo(np.int32).max else np.int64)
    places, offsets = _draw(flat, member, totals, wanted, np.empty(int(wanted.sum()), kind), seed)
    return tuple(
        Foreground(key=key, voxels=int(total), index=places[offsets[k] : offsets[k + 1]])
        for k, (key, total) in enumerate(zip(keys, totals, strict=True))
    )


@compiled()
def _count(flat):
    """Number of voxels of each value 0, 1, ..."""
    highest = 0
    for value in flat:
        highest = max(highest, np.int64(value))
    counts = np.zeros(highest + 1, np.int64)
    for value in flat:
        if value >= 0:
            counts[value] += 1
    return counts


@compiled()
def _draw(flat, member, totals, wanted, places, seed):
    """Sample by selection in one pass (Knuth, The Art of Computer Programming, vol. 2, 3.4.2, algorithm S)."""
    keys, values = member.shape
    offsets = np.zeros(keys + 1, np.int64)
    offsets[1:] = np.cumsum(wanted)
    left, missing, put = totals.copy(), wanted.copy(), offsets[:-1].copy()
    # keys that each value belongs to, so that background takes a single lookup
    listed = np.zeros((values, keys), np.int64)
    lengths = np.zeros(values, np.int64)
    for value in range(values):
        for key in range(keys):
            if member[key, value]:
                listed[value, lengths[value]] = key
                lengths[value] += 1
    np.random.seed(seed)  # noqa: NPY002 - numba's RNG, local to this thread
    for place in range(flat.size):
        value = flat[place]
        if value < 0:
            continue
        for k in range(lengths[value]):
            key = listed[value, k]
            if missing[key] > 0 and (missing[key] >= left[key] or np.random.random() * left[key] < missing[key]):  # noqa: NPY002
                places[put[key]] = place
                put[key] += 1
                missing[key] -= 1
            left[key] -= 1
    return places, offsets
