"""Averaging of overlapping predictions as they come: a ring of planes as deep as one tile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

EMPTY_LOGIT = 10.0
"""Logit given to background (and its negative to everything else) where `skip_empty` left out every tile."""


class SlabAccumulator:
    """Weighted sums of the planes that a later tile may still touch; plane p lies at p modulo the depth.

    Args:
        outputs: K, channels that are averaged.
        depth: planes that can be held.
        plane: rows and columns.
        device: where the sums are.
        background: the first channel is the background's, which voxels that no tile touched belong to.
    """

    def __init__(
        self, outputs: int, depth: int, plane: tuple[int, int], device: torch.device, *, background: bool
    ) -> None:
        self.depth = depth
        self.background = background
        self.sums = torch.zeros((outputs, depth, *plane), device=device)
        self.weights = torch.zeros((depth, *plane), device=device)
        self._recycled = self.sums.new_empty(0)

    def _pieces(self, start: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Where planes [start, start + count) lie: ring slices with the matching slices of the planes."""
        done = 0
        while done < count:
            place = (start + done) % self.depth
            length = min(count - done, self.depth - place)
            yield slice(place, place + length), slice(done, done + length)
            done += length

    def add(self, prediction: Tensor, weights: Tensor, at: tuple[int, int, int]) -> None:
        """Add a tile's prediction (K, d, b, c), weighted by (d, b, c) or (b, c), with its first voxel `at`."""
        z, y, x = at
        rows, columns = slice(y, y + prediction.shape[2]), slice(x, x + prediction.shape[3])
        for here, there in self._pieces(z, prediction.shape[1]):
            weight = weights[there] if weights.ndim == 3 else weights
            self.sums[:, here, rows, columns].addcmul_(prediction[:, there], weight)
            self.weights[here, rows, columns] += weight

    def finish(self, start: int, stop: int, *, recycle: bool = False) -> Tensor:
        """Average planes [start, stop): float32 (K, stop - start, b, c); their places are emptied.

        Args:
            start: first plane.
            stop: plane after the last.
            recycle: the result lies where the last one lay. Large new memory has to be cleared by the
                system first, which takes five times as long as the averaging.
        """
        shape = (self.sums.shape[0], stop - start, *self.sums.shape[2:])
        size = math.prod(shape)
        memory = self._recycled if recycle and len(self._recycled) >= size else self.sums.new_empty(size)
        if recycle:
            self._recycled = memory
        logits = memory[:size].view(shape)
        for here, there in self._pieces(start, stop - start):
            weights = self.weights[here]
            untouched = weights == 0
            if untouched.any():
                self.sums[:, here].masked_fill_(untouched, -EMPTY_LOGIT)
                if self.background:
                    self.sums[0, here].masked_fill_(untouched, EMPTY_LOGIT)
                weights.masked_fill_(untouched, 1)
            torch.div(self.sums[:, here], weights, out=logits[:, there])
            self.sums[:, here].zero_()
            weights.zero_()
        return logits
