"""Mean of class probabilities of several models on one image grid, and its labels, block by block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rfmedsam2.errors import PlanError
from rfmedsam2.inference.export import label_table
from rfmedsam2.records.dataset import LabelSet

BLOCK_PLANES = 8
BLOCK_EDGE = 256
"""Largest block of an array without chunks of its own."""


def mean_labels(maps: Sequence[Any], labels: LabelSet, *, mean: Any = None) -> np.ndarray:
    """Labels of the mean of probabilities; ties go to the first class, as in nnU-Net.

    Args:
        maps: arrays (K, Z, Y, X), in memory or chunked files of blosc2: softmax, or sigmoid with regions.
        labels: classes or regions of all of them.
        mean: array of the same shape that gets the mean; None: it is not kept.

    Returns:
        (Z, Y, X) uint8, or uint16 if a value exceeds 255. Memory beyond it is that of a few blocks of one class.

    Raises:
        PlanError: the arrays have different shapes, or another number of outputs than the labels.
    """
    shapes = {tuple(one.shape) for one in maps}
    if len(shapes) != 1 or (shape := shapes.pop())[0] != labels.num_outputs:
        raise PlanError(
            "Probabilities do not match",
            expected=f"{labels.num_outputs} classes or regions on one grid",
            found="; ".join(" x ".join(map(str, one.shape)) for one in maps),
        )
    table = label_table(labels)
    result = np.zeros(shape[1:], table.dtype)
    for block in _blocks(maps, shape[1:]):
        winner = np.zeros(result[block].shape, np.int16)
        # of the sum: a region is painted where the mean exceeds 0.5, a class where it is largest
        best = np.full(winner.shape, len(maps) / 2 if labels.has_regions else -1, np.float32)
        for output in range(shape[0]):
            total = np.asarray(maps[0][(output, *block)]).astype(np.float32)
            for other in maps[1:]:
                total += np.asarray(other[(output, *block)])
            if mean is not None:
                mean[(output, *block)] = (total / len(maps)).astype(np.float16)
            larger = total > best
            winner[larger] = output + 1 if labels.has_regions else output
            if not labels.has_regions:
                np.maximum(best, total, out=best)
        result[block] = table[winner]
    return result


def _blocks(maps: Sequence[Any], shape: Sequence[int]) -> Iterator[tuple[slice, slice, slice]]:
    """Blocks that hold whole chunks of every array, so that each chunk is unpacked once."""
    chunks = [one.chunks[1:] for one in maps if hasattr(one, "chunks")] or [(BLOCK_PLANES, BLOCK_EDGE, BLOCK_EDGE)]
    sizes = [max(axis) for axis in zip(*chunks, strict=True)]
    starts = (range(0, length, max(1, size)) for length, size in zip(shape, sizes, strict=True))
    for corner in itertools.product(*starts):
        z, y, x = (slice(start, start + size) for start, size in zip(corner, sizes, strict=True))
        yield z, y, x
