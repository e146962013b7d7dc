"""Intensity normalization (nnU-Net's schemes), one channel at a time and in place.

Planes are processed one by one, so that temporaries are at most one slice; sums are in float64.
"""

from __future__ import annotations

import numpy as np
from typing_extensions import assert_never

from rfmedsam2.errors import ImageError
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.plan import Normalization

EPSILON = 1e-8
"""Smallest divisor (nnU-Net's)."""


def normalize(
    channel: np.ndarray,
    how: Normalization,
    statistics: IntensityStatistics,
    *,
    inside: np.ndarray | None = None,
) -> None:
    """Normalize one channel in place.

    ct: clip to the training set's 0.5 and 99.5 percentiles, then (x - mean) / std of the training set.
    zscore: (x - mean) / std of this volume; with `use_mask`, statistics over and changes to the inside only.
    rescale_0_1: minimum to 0, maximum to 1. rgb_0_1: x / 255. none: nothing.

    Args:
        channel: (a, b, c) float32, overwritten.
        how: the plan's normalization scheme for this channel.
        statistics: foreground intensity statistics of the training set (used by ct).
        inside: (a, b, c) bool, for zscore with `use_mask`; None: all voxels are inside.

    Raises:
        ImageError: values outside 0 to 255 for rgb_0_1.
    """
    match how.kind:
        case "ct":
            _ct(channel, statistics)
        case "zscore":
            _zscore(channel, inside if how.use_mask else None)
        case "rescale_0_1":
            channel -= channel.min()
            channel /= max(float(channel.max()), EPSILON)
        case "rgb_0_1":
            _rgb(channel)
        case "none":
            pass
        case _:
            assert_never(how.kind)


def _ct(channel: np.ndarray, statistics: IntensityStatistics) -> None:
    std = max(statistics.std, EPSILON)
    for plane in channel:
        np.clip(plane, statistics.percentile_00_5, statistics.percentile_99_5, out=plane)
        plane -= statistics.mean
        plane /= std


def _zscore(channel: np.ndarray, inside: np.ndarray | None) -> None:
    def planes() -> list[tuple[np.ndarray, np.ndarray | bool]]:
        return [(plane, True if inside is None else inside[z]) for z, plane in enumerate(channel)]

    count = channel.size if inside is None else int(np.count_nonzero(inside))
    if count == 0:
        return
    mean = sum(float(np.sum(plane, dtype=np.float64, where=here)) for plane, here in planes()) / count
    squares = sum(float(np.sum(np.square(plane - mean, dtype=np.float64), where=here)) for plane, here in planes())
    std = max(float(np.sqrt(squares / count)), EPSILON)
    for plane, here in planes():
        np.subtract(plane, mean, out=plane, where=here)
        np.divide(plane, std, out=plane, where=here)


def _rgb(channel: np.ndarray) -> None:
    low, high = float(channel.min()), float(channel.max())
    if low < 0 or high > 255:
        raise ImageError(
            "Color values lie outside 0 to 255",
            expected="0 to 255 (normalization rgb_0_1)",
            found=f"{low:g} to {high:g}",
            remedy="Plan this channel with another normalization, or correct the image",
        )
    channel /= 255.0
