"""The prompt for one object in an image: clicks and a box, from files, users and evaluations alike.

Coordinates are those of SAM: floating-point pixel indices, x for columns and y for rows; x = 0 is the center of the
first column, W - 1 that of the last. A point is inside the image if 0 <= x < W and 0 <= y < H. A box is given by its
first and last column and row, both included: for a mask those of its outermost pixels, so that the box of one pixel has
x0 = x1. It must satisfy 0 <= x0 <= x1 <= W, and the same for y and H: a far corner at W or H, as in boxes that end at
the edge behind their last pixel (COCO's), is accepted unchanged. `ImageTransform.prompts` converts prompts to a
network's frame (`PromptBatch`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1; see the module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Click:
    """A click at a point of an image.

    Attributes:
        x: column, 0 <= x < W.
        y: row, 0 <= y < H.
        positive: on the object (True) or off it (False).
    """

    x: float
    y: float
    positive: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The clicks and the box of one object.

    Attributes:
        clicks: in the order in which they were made.
        box: box around the object, or None.
    """

    clicks: tuple[Click, ...] = ()
    box: Box | None = None

    @property
    def points(self) -> np.ndarray:
        """Positions (k, 2) of the clicks, XY."""
        return np.array([(click.x, click.y) for click in self.clicks], float).reshape(-1, 2)

    @property
    def labels(self) -> tuple[int, ...]:
        """Labels of the points: 1 on the object, 0 off it."""
        return tuple(int(click.positive) for click in self.clicks)

    def faults(self, size: tuple[int, int]) -> list[str]:
        """Describe what is invalid for an image of (H, W) pixels, one text per fault."""
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
