"""What is said of one object in an image: clicks and a box, by files, users and evaluations alike.

Coordinates are those of SAM: floating-point pixel indices of the image, x of columns and y of rows; x = 0 is the middle
of the first column, W - 1 that of the last. A point lies in the image where 0 <= x < W and 0 <= y < H. A box names its
first and its last column and row, both inside it: of a mask those of its outermost pixels, so that one pixel's box has
x0 = x1. 0 <= x0 <= x1 <= W, and y likewise: a far corner at W or H, as boxes have that count to the edge behind their
last pixel (COCO's), is taken as it is. `ImageTransform.prompts` takes them to a network's frame (`PromptBatch`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1; see the module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Click:
    """A point of an image.

    Attributes:
        x: column, 0 <= x < W.
        y: row, 0 <= y < H.
        positive: on the object (True), or on what is none.
    """

    x: float
    y: float
    positive: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """All that is said of one object.

    Attributes:
        clicks: in their order.
        box: around the object; None: there is none.
    """

    clicks: tuple[Click, ...] = ()
    box: Box | None = None

    @property
    def points(self) -> np.ndarray:
        """(k, 2) XY of the clicks."""
        return np.array([(click.x, click.y) for click in self.clicks], float).reshape(-1, 2)

    @property
    def labels(self) -> tuple[int, ...]:
        """Of the points: 1 on the object, 0 off it."""
        return tuple(int(click.positive) for click in self.clicks)

    def faults(self, size: tuple[int, int]) -> list[str]:
        """What is wrong with it in an image of (H, W) pixels, in words."""
        height, width = size
        extent = f"the image is {width} wide and {height} high"
        outside = [click for click in self.clicks if not (0 <= click.x < width and 0 <= click.y < height)]
        found = [f"a point lies outside: {click.x:g}, {click.y:g}, {extent}" for click in outside]
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            corners = ", ".join(f"{corner:g}" for corner in self.box)
            if x1 < x0 or y1 < y0:
                found.append(f"the box ends before it begins: {corners}")
            elif not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
                found.append(f"the box lies outside: {corners}, {extent}")
        return found
