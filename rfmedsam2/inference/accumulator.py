"""Streaming average of overlapping predictions in a ring buffer of planes, as deep as one tile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

EMPTY_LOGIT = 10.0
"""Logit of background (and its negative for the others) in voxels where `skip_empty` skipped every tile."""


class SlabAccumulator:
    """Weighted sums of the planes that later tiles may still overlap; plane p is stored at index p modulo depth.

    Args:
        outputs: K, number of channels.
        depth: number of planes in the buffer.
        plane: rows and columns of a plane.
        device: device of the sums.
        background: whether the first channel is background, the class of voxels without a tile.
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
        """Storage of planes [start, start + count): slices of the ring with the matching slices of the planes."""
        done = 0
        while done < count:
            place = (start + done) % self.depth
            length = min(count - done, self.depth - place)
            yield slice(place, place + length), slice(done, done + length)
            done += length

    def add(self, prediction: Tensor, weights: Tensor, at: tuple[int, int, int]) -> None:
        """Add a tile's prediction (K, d, b, c), weighted by (d, b, c) or (b, c), with its first voxel at `at`."""
        z, y, x = at
        rows, columns = slice(y, y + prediction.shape[2]), slice(x, x + prediction.shape[3])
        for here, there in self._pieces(z, prediction.shape[1]):
            weight = weights[there] if weights.ndim == 3 else weights
            self.sums[:, here, rows, columns].addcmul_(prediction[:, there], weight)
            self.weights[here, rows, columns] += weight

    def finish(self, start: int, stop: int, *, recycle: bool = False) -> Tensor:
        """Average planes [start, stop): float32 (K, stop - start, b, c); their sums are cleared.

        Args:
            start: first plane.
            stop: one past the last plane.
            recycle: reuse the memory of the previous result. The system has to clear large new memory first, which
                takes five times as long as the averaging.
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
