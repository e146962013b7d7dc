"""Streaming average of overlapping predictions in a ring buffer of planes, as deep as one tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from rfmedsam2.nn.unet import UNet

EMPTY_LOGIT = 10.0
"""Logit of background (and its negative for the others) in voxels where `skip_empty` skipped every tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHead:
    """The last layers of networks as one linear map: mean features, averaged over tiles and flips -> mean logits.

    Attributes:
        features: a function of tiles like the networks: the features of all of them, one after the other.
        weight: float32 (K, F).
        bias: float32 (K, 1).
    """

    features: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, networks: Sequence[Any], outputs: int) -> Self | None:
        """The heads of U-Nets that have fewer features than outputs; None: it is the logits that are averaged.

        The mean of logits is a linear map of the mean of features, so both give the same. With 117 classes, sums of 32
        features need a quarter of the memory, and the head runs once for a voxel in place of once for every tile.
        """
        if not all(isinstance(network, UNet) for network in networks):
            return None
        heads = [network.head for network in networks]
        weight = torch.cat([head.weight.detach().float().flatten(1) for head in heads], 1) / len(heads)
        if weight.shape[1] >= outputs:
            return None
        bias = torch.stack([head.bias.detach().float() for head in heads]).mean(0)[:, None]

        def features(tiles: Tensor) -> Tensor:
            first, *others = (network.features(tiles) for network in networks)
            return torch.cat([first, *others], 1) if others else first

        return cls(features=features, weight=weight, bias=bias)


class SlabAccumulator:
    """Weighted sums of the planes that later tiles may still overlap; plane p is stored at index p modulo depth.

    Args:
        outputs: K, number of channels of the logits.
        depth: number of planes in the buffer.
        plane: rows and columns of a plane.
        device: device of the sums.
        background: whether the first channel is background, the class of voxels without a tile.
        head: what makes logits of the averages; None: they are logits.
    """

    def __init__(
        self,
        outputs: int,
        depth: int,
        plane: tuple[int, int],
        device: torch.device,
        *,
        background: bool,
        head: SharedHead | None = None,
    ) -> None:
        self.depth = depth
        self.background = background
        self.outputs = outputs
        self.head = head
        channels = outputs if head is None else head.weight.shape[1]
        self.sums = torch.zeros((channels, depth, *plane), device=device)
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
        """Average planes [start, stop): float32 logits (K, stop - start, b, c); their sums are cleared.

        Args:
            start: first plane.
            stop: one past the last plane.
            recycle: reuse the memory of the previous result. The system has to clear large new memory first, which
                takes five times as long as the averaging.
        """
        shape = (self.outputs, stop - start, *self.sums.shape[2:])
        size = math.prod(shape)
        memory = self._recycled if recycle and len(self._recycled) >= size else self.sums.new_empty(size)
        if recycle:
            self._recycled = memory
        logits = memory[:size].view(shape)
        means = logits if self.head is None else self.sums.new_empty((len(self.sums), *shape[1:]))
        empty = torch.empty(shape[1:], dtype=torch.bool, device=self.sums.device)
        for here, there in self._pieces(start, stop - start):
            weights = self.weights[here]
            empty[there] = weights == 0
            torch.div(self.sums[:, here], weights.masked_fill_(empty[there], 1), out=means[:, there])
            self.sums[:, here].zero_()
            weights.zero_()
        if self.head is not None:
            torch.addmm(self.head.bias, self.head.weight, means.flatten(1), out=logits.flatten(1))
        if empty.any():
            logits.masked_fill_(empty, -EMPTY_LOGIT)
            if self.background:
                logits[0].masked_fill_(empty, EMPTY_LOGIT)
        return logits
