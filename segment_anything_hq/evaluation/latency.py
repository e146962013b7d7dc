"""Latency of segmenting anything: one picture, a grid of points, one at a time (SegNext's SAT latency)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from rfmedsam2.errors import UsageError
from segment_anything_hq.evaluation.interactive import Interactive
from segment_anything_hq.prompts.clicks import Click

SIZE = 1024
GRID = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SatLatency:
    """Seconds of one picture and all points of its grid.

    Attributes:
        total_s: setting the picture and all points: the published figure.
        encode_s: setting the picture.
        points_s: each point, in the order they were given.
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
    model: Interactive, image: np.ndarray | None = None, *, grid: int = GRID, size: int = SIZE, warm_up: int = 1
) -> SatLatency:
    """Measure the latency of the Segment Anything Task.

    Every point is one positive click; with it goes what the model answered to the point before. The model's answers
    are arrays on the CPU, so that a device's work is waited for.

    Args:
        model: what is measured.
        image: (H, W, 3) uint8; a picture of noise where left out.
        grid: points a side, each in the middle of its cell.
        size: side of the picture of noise.
        warm_up: points given before, which are not counted (nor is the first setting of the picture); 0: a cold start.

    Raises:
        UsageError: a grid of no points, or of more than the picture has pixels.
    """
    if image is None:
        image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    clicks = grid_clicks(image.shape[0], image.shape[1], grid)
    if warm_up:
        model.set_image(image)
        for click in clicks[:warm_up]:
            model.predict((click,), None)
    started = time.perf_counter()
    model.set_image(image)
    moments = [time.perf_counter()]
    previous: np.ndarray | None = None
    for click in clicks:
        previous = model.predict((click,), previous)
        moments.append(time.perf_counter())
    return SatLatency(
        total_s=moments[-1] - started,
        encode_s=moments[0] - started,
        points_s=tuple(np.diff(moments).tolist()),
    )


def grid_clicks(height: int, width: int, grid: int = GRID) -> tuple[Click, ...]:
    """Positive clicks in the middle of each of grid x grid cells, row by row.

    Raises:
        UsageError: a grid of no points, or finer than the picture.
    """
    if not 1 <= grid <= min(height, width):
        raise UsageError("The grid does not fit", expected=f"1 to {min(height, width)} points a side", found=grid)
    rows, columns = ([int((i + 0.5) * n / grid) for i in range(grid)] for n in (height, width))
    return tuple(Click(x=x, y=y, positive=True) for y in rows for x in columns)
