"""Postprocessing of label maps by a rule: components that are kept or dropped, and holes that are filled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import cc3d
import numpy as np

from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PostprocessingStep

CORNERS: Final = 26
FACES: Final = 6
"""Neighbors of a voxel: components as nnU-Net connects them, holes the other way round, so that surfaces are closed."""
ROUNDING_ML = 1e-9


def postprocess(
    label_map: np.ndarray, steps: Sequence[PostprocessingStep], labels: LabelSet, *, voxel_ml: float
) -> np.ndarray:
    """A label map after all steps.

    Args:
        label_map: (Z, Y, X), unsigned integers; not changed.
        steps: see `PostprocessingStep`.
        labels: what the values mean.
        voxel_ml: volume of a voxel in ml.

    Returns:
        (Z, Y, X) in the type of `label_map`, a new array.
    """
    result = label_map.copy()
    for step in steps:
        values = labels.values[1:] if step.of is None else labels.foreground[step.of]
        mask = _members(result, values)
        box = _box(mask)
        if box is None:
            continue
        view, inside = result[box], mask[box]
        if step.action == "fill_holes":
            flat = [axis for axis in range(3) if result.shape[axis] == 1]
            _fill_holes(view, inside, flat)
        else:
            components = _components(inside, CORNERS)
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            keep = sizes == sizes.max()
            if step.smallest_ml is not None:
                keep = sizes * voxel_ml >= step.smallest_ml - ROUNDING_ML
            view[inside & ~keep[components]] = 0
    return result


def _members(label_map: np.ndarray, values: Sequence[int]) -> np.ndarray:
    table = np.zeros(int(np.iinfo(label_map.dtype).max) + 1, bool)
    table[[value for value in values if value < len(table)]] = True
    return table[label_map]


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Bounding box of a mask; None if it is empty."""
    ranges = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(slice(r[0], r[-1] + 1) for r in ranges) if ranges[0].size else None


def _components(mask: np.ndarray, connectivity: Literal[6, 26]) -> np.ndarray:
    """Components numbered from 1, with 0 outside the mask."""
    return np.asarray(cc3d.connected_components(np.ascontiguousarray(mask), connectivity=connectivity))


def _fill_holes(view: np.ndarray, mask: np.ndarray, flat: Sequence[int]) -> None:
    """Fill holes of a mask in its bounding box of a label map, in place; `flat`: axes along which nothing encloses."""
    outside = _components(~mask, FACES)
    count = int(outside.max()) + 1
    hole = np.ones(count, bool)
    hole[0] = False
    for axis in (a for a in range(3) if a not in flat):
        for end in (0, -1):
            hole[np.unique(outside.take(end, axis=axis))] = False
    if not hole.any():
        return
    values, number = np.unique(view[mask], return_inverse=True)
    around = np.zeros(view.shape, np.int64)
    around[mask] = number
    votes = np.zeros(count * len(values), np.int64)
    for axis in range(3):
        low, high = ([slice(None)] * 3 for _ in range(2))
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        for here, there in ((tuple(low), tuple(high)), (tuple(high), tuple(low))):
            touching = hole[outside[here]] & mask[there]
            pairs = outside[here][touching].astype(np.int64) * len(values) + around[there][touching]
            votes += np.bincount(pairs, minlength=len(votes))
    winner = values[votes.reshape(count, len(values)).argmax(axis=1)]
    filled = hole[outside] & (view == 0)
    view[filled] = winner[outside[filled]]
