"""Latency of the Segment Anything Task: one image, a grid of points, one at a time (SegNext's SAT latency)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from rfmedsam2.errors import UsageError
from segment_anything_hq.evaluation.interactive import Interactive
from segment_anything_hq.prompts.prompt import Click

SIZE = 1024
GRID = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SatLatency:
    """Seconds for one image and all points of the grid.

    Attributes:
        total_s: encoding the image and decoding all points; this is the published number.
        encode_s: encoding the image.
        points_s: decoding each point, in order.
    """

    total_s: float
    encode_s: float
    points_s: tuple[float, ...]

    @property
    def point_median_s(self) -> float:
        """Median over the points."""
        return float(np.median(self.points_s))

    @property
    def point_95_s(self) -> float:
        """95th percentile over the points."""
        return float(np.percentile(self.points_s, 95))


def sat_latency(
    model: Interactive, image: np.ndarray | None = None, *, grid: int = GRID, size: int = SIZE, warm_up: int = 2
) -> SatLatency:
    """Measure the latency of the Segment Anything Task.

    Every point is one positive click, given together with the probabilities of the point before. The model returns
    arrays on the CPU, so the time includes the device's work.

    Args:
        model: the model to measure.
        image: (H, W, 3) uint8; None: random noise.
        grid: points per side, each in the center of its cell.
        size: side of the noise image, pixels.
        warm_up: points decoded beforehand, after a first encoding, that are not measured; 0: measure a cold start.

    Raises:
        UsageError: the grid has no points or more points per side than the image has pixels.
    """
    if image is None:
        image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    clicks = grid_clicks(image.shape[0], image.shape[1], grid)
    previous: np.ndarray | None = None
    if warm_up:
        model.set_image(255 - image)  # another one: a model may keep the encoding of an image that it is given again
        for click in clicks[:warm_up]:
            previous = model.predict((click,), previous)
    started = time.perf_counter()
    model.set_image(image)
    moments = [time.perf_counter()]
    previous = None
    for click in clicks:
        previous = model.predict((click,), previous)
        moments.append(time.perf_counter())
    return SatLatency(
        total_s=moments[-1] - started,
        encode_s=moments[0] - started,
        points_s=tuple(np.diff(moments).tolist()),
    )


def grid_clicks(height: int, width: int, grid: int = GRID) -> tuple[Click, ...]:
    """Positive clicks in the centers of grid x grid cells, row by row.

    Raises:
        UsageError: the grid has no points or more points per side than the image has pixels.
    """
    if not 1 <= grid <= min(height, width):
        raise UsageError(
            "The grid does not fit the image", expected=f"1 to {min(height, width)} points per side", found=grid
        )
    rows, columns = ([int((i + 0.5) * n / grid) for i in range(grid)] for n in (height, width))
    return tuple(Click(x=x, y=y, positive=True) for y in rows for x in columns)
