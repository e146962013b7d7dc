"""Sliding-window prediction: preprocessed image -> finished slabs of logits.

Tiles, Gaussian and averaging are nnU-Net's. Sums are kept in a ring buffer of planes as deep as one patch, and planes
leave it as soon as no later tile overlaps them, so the logits of a whole volume are never stored: memory is
O(outputs * patch_a * b * c), or that of a U-Net's features if these are fewer, independent of the length of the scan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.nn.functional import pad

from rfmedsam2.errors import PlanError, RfMedSamError
from rfmedsam2.inference.accumulator import SharedHead, SlabAccumulator
from rfmedsam2.records.plan import Inference
from rfmedsam2.system.memory import memory_ran_out
from rfmedsam2.system.progress import Track, silent

Network = Callable[[Tensor], Any]
"""A module in eval mode, or a method of one: (n, C, *patch) -> logits (n, K, *patch)."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]

EMPTY_RANGE = 1e-3
"""A tile is empty if no channel's normalized intensities vary by more than this."""
SLICES_AT_ONCE = 8
"""Minimum number of slices of a 2D network per forward pass."""
LEAST_STRIDE = 0.5
"""Voxels between tiles along the longest axis of the patch. Tiles that are closer begin at the same voxels again."""
PLANES_A_SLAB = 8
"""Maximum number of planes of a slab. A row of 3D tiles finishes more planes at once, which would double the memory of
the sums for 14 classes of 512 x 512."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """Finished planes along the first planned axis.

    Attributes:
        start: index of the first plane.
        logits: float32 (K, planes, b, c) on the networks' device; averaged over tiles, flips and networks.
    """

    start: int
    logits: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How tiles are computed; independent of the model.

    Attributes:
        precision: of the networks; auto: on CUDA bf16 if the GPU supports it, else fp16. On a CPU all but bf16 is fp32,
            which is auto, too. MPS uses fp32.
        skip_empty: skip tiles in which every channel is constant (range <= `EMPTY_RANGE` after normalization, such as
            air in a clipped CT). Voxels without any other tile become background: `EMPTY_LOGIT` for class 0 and
            -`EMPTY_LOGIT` for the others (for all, with regions). Other voxels are averaged over the remaining tiles.
        recycle: reuse the memory of the previous slab's logits; for callers that are finished with a slab before they
            request the next. Only for `predict_slabs`.
        track: progress display over tiles (2D networks: tiles of a group of slices; RFMedSAM 2: refined tiles).
    """

    precision: Precision = "auto"
    skip_empty: bool = False
    recycle: bool = False
    track: Track = silent


def tile_starts(image_size: Sequence[int], patch_size: Sequence[int], step_size: float) -> list[list[int]]:
    """First index of every tile along each axis: evenly spaced, at most `step_size` patches apart, ends included.

    Args:
        image_size: voxels per axis, each at least the patch's.
        patch_size: voxels per axis.
        step_size: fraction of the patch, at most 1, and at least `LEAST_STRIDE` voxels.

    Raises:
        PlanError: an image axis is shorter than the patch's, or the step size is out of range.
    """
    least = LEAST_STRIDE / max(patch_size)
    if not least <= step_size <= 1:  # also NaN
        raise PlanError(
            "A sliding-window step size is out of range",
            expected=f"{least:.2g} to 1 for a patch of {' x '.join(map(str, patch_size))}",
            found=step_size,
        )
    if len(image_size) != len(patch_size) or any(n < p for n, p in zip(image_size, patch_size, strict=True)):
        raise PlanError("An image is smaller than the patch", expected=tuple(patch_size), found=tuple(image_size))
    starts = []
    for size, patch in zip(image_size, patch_size, strict=True):
        count = math.ceil((size - patch) / (patch * step_size)) + 1
        spread = (size - patch) / (count - 1) if count > 1 else 0.0
        starts.append([round(spread * i) for i in range(count)])
    return starts


def gaussian_weights(patch_size: Sequence[int], *, sigma_scale: float = 1 / 8) -> Tensor:
    """Weights of a tile's voxels: a Gaussian around the center, sigma = patch * `sigma_scale`, maximum 1.

    Voxels where the truncated Gaussian is 0 get its smallest positive value, to avoid division by 0.

    Returns:
        float32 tensor of the patch's shape.
    """
    weights = np.ones((), dtype=np.float64)
    for size in patch_size:
        line = np.zeros(size)
        line[size // 2] = 1
        line = gaussian_filter1d(line, size * sigma_scale, mode="constant", cval=0)
        weights = np.multiply.outer(weights, line / line.max())
    tensor = torch.from_numpy(weights).to(torch.float32)
    positive = tensor > 0
    return torch.where(positive, tensor, tensor[positive].min())


def predict_slabs(
    networks: Sequence[Network],
    image: np.ndarray | Tensor,
    *,
    patch_size: Sequence[int],
    inference: Inference,
    mirror_axes: Sequence[int],
    device: torch.device | str,
    outputs: int,
    regions: bool = False,
    execution: Execution | None = None,
) -> Iterator[Slab]:
    """Predict a preprocessed image slab by slab, first planned axis ascending, without gaps or overlaps.

    Args:
        networks: models (folds) on `device`, in eval mode, each returning (n, K, *patch) logits; averaged.
        image: float32 (C, a, b, c), planned axes; padded symmetrically with 0 if smaller than the patch.
        patch_size: three entries, or two for a 2D network on slices along the first axis.
        inference: step size, mirroring, tiles per forward pass.
        mirror_axes: axes of the patch that are flipped if `inference.mirror`; all combinations are averaged.
        device: device of the networks and sums; the image is not moved as a whole.
        outputs: K, number of channels of the logits.
        regions: whether channels are regions, without background.
        execution: precision, skipping and progress.

    Raises:
        PlanError: patch, mirror axes or image do not match.
        RfMedSamError: logits are not finite, or the device has too little memory.
    """
    execution = execution or Execution()
    tensor = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
    _check(networks, tensor, patch_size, mirror_axes)
    place = torch.device(device)
    axes = tuple(mirror_axes) if inference.mirror else ()
    head = SharedHead.of(networks, outputs)
    summed = networks if head is None else [head.features]
    ensemble = _Ensemble(summed, flips=_flips(axes), device=place, precision=execution.precision)
    padded, lows = _padded(tensor, patch_size)
    rows = _rows(padded, patch_size, inference)
    plane = (padded.shape[2], padded.shape[3])
    ring = SlabAccumulator(outputs, rows[0].depth, plane, place, background=not regions, head=head)
    weights = gaussian_weights(patch_size).to(place)
    stops = [row.start for row in rows[1:]] + [padded.shape[1]]
    a, b, c = tensor.shape[1:]
    tiles = [(number, corner) for number, row in enumerate(rows) for corner in row.corners]
    tracked = itertools.groupby(execution.track(tiles, "tiles", len(tiles)), key=itemgetter(0))
    for (number, of_row), stop in zip(tracked, stops, strict=True):
        row = rows[number]
        for batch, corners in _batches(padded, row, map(itemgetter(1), of_row), skip_empty=execution.skip_empty):
            _accumulate(ring, ensemble(batch), weights, row, corners)
        yield from _finished(ring, range(row.start, stop), lows, (a, b, c), recycle=execution.recycle)


def _finished(
    ring: SlabAccumulator, planes: range, lows: Sequence[int], size: Sequence[int], *, recycle: bool
) -> Iterator[Slab]:
    """Averaged planes without padding; does not keep a slab while the next is made."""
    rows, columns = (slice(low, low + n) for low, n in zip(lows[1:], size[1:], strict=True))
    for low in planes[::PLANES_A_SLAB]:
        high = min(low + PLANES_A_SLAB, planes.stop)
        first, last = max(low, lows[0]), min(high, lows[0] + size[0])
        if last > first:
            inside = (slice(None), slice(first - low, last - low), rows, columns)
            yield Slab(start=first - lows[0], logits=finite(ring.finish(low, high, recycle=recycle)[inside]))
        else:
            ring.finish(low, high, recycle=recycle)


def predict_logits(
    networks: Sequence[Network],
    image: np.ndarray | Tensor,
    *,
    patch_size: Sequence[int],
    inference: Inference,
    mirror_axes: Sequence[int],
    device: torch.device | str,
    outputs: int,
    regions: bool = False,
    execution: Execution | None = None,
) -> Tensor:
    """All slabs of `predict_slabs` (same arguments and errors) concatenated: float32 (K, a, b, c)."""
    slabs = predict_slabs(
        networks,
        image,
        patch_size=patch_size,
        inference=inference,
        mirror_axes=mirror_axes,
        device=device,
        outputs=outputs,
        regions=regions,
        execution=replace(execution or Execution(), recycle=False),
    )
    return torch.cat([slab.logits for slab in slabs], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """Tiles with the same planes: one row of 3D tiles, or a batch of slices for a 2D network."""

    start: int
    depth: int
    corners: tuple[tuple[int, int], ...]
    patch: tuple[int, int]
    flat: bool
    batch: int


def _rows(image: Tensor, patch_size: Sequence[int], inference: Inference) -> list[_Row]:
    planes = image.shape[1]
    if len(patch_size) == 3:
        a, b, c = tile_starts(image.shape[1:], patch_size, inference.step_size)
        starts, depths, batch = a, [patch_size[0]] * len(a), inference.tile_batch
    else:
        b, c = tile_starts(image.shape[2:], patch_size, inference.step_size)
        pack = max(inference.tile_batch, SLICES_AT_ONCE)
        starts = list(range(0, planes, pack))
        depths, batch = [min(pack, planes - start) for start in starts], 1
    corners = tuple(itertools.product(b, c))
    patch = (patch_size[-2], patch_size[-1])
    return [
        _Row(start=start, depth=depth, corners=corners, patch=patch, flat=len(patch_size) == 2, batch=batch)
        for start, depth in zip(starts, depths, strict=True)
    ]


def _batches(
    image: Tensor, row: _Row, row_corners: Iterable[tuple[int, int]], *, skip_empty: bool
) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Batches of a row's tiles: (n, C, a, b, c) and their corners, or the slices (n, C, b, c) of one corner."""
    tiles: list[Tensor] = []
    corners: list[tuple[int, int]] = []
    for y, x in row_corners:
        tile = image[:, row.start : row.start + row.depth, y : y + row.patch[0], x : x + row.patch[1]]
        if not (skip_empty and _is_empty(tile)):
            tiles.append(tile)
            corners.append((y, x))
        if tiles and (len(tiles) == row.batch or (y, x) == row.corners[-1]):
            # contiguous copies, because a network may modify its input
            yield (tiles[0].transpose(0, 1).contiguous() if row.flat else torch.stack(tiles)), corners
            tiles, corners = [], []


def _is_empty(tile: Tensor) -> bool:
    low, high = torch.aminmax(tile.flatten(1), dim=1)
    return bool(((high - low) <= EMPTY_RANGE).all())


@torch.inference_mode()
def _accumulate(
    ring: SlabAccumulator, predictions: Tensor, weights: Tensor, row: _Row, corners: Sequence[tuple[int, int]]
) -> None:
    stacked = predictions.transpose(0, 1)[None] if row.flat else predictions
    for prediction, corner in zip(stacked, corners, strict=True):
        ring.add(prediction, weights, (row.start, *corner))


class _Ensemble:
    """Mean logits of several networks over all flips; halves the batch size when device memory runs out."""

    def __init__(
        self, networks: Sequence[Network], *, flips: list[tuple[int, ...]], device: torch.device, precision: Precision
    ) -> None:
        self.networks = networks
        self.flips = flips
        self.device = device
        self.precision: Precision = precision
        # on CPU and MPS a larger batch is not faster and needs more memory; on CUDA all flips run as one batch
        self.limit = 1 << 30 if device.type == "cuda" else 0

    @torch.inference_mode()
    def __call__(self, tiles: Tensor) -> Tensor:
        """(n, C, *patch) on any device -> float32 (n, K, *patch) on the ensemble's device."""
        tiles = tiles.to(self.device, dtype=torch.float32)
        if 0 < self.limit < len(tiles):
            half = len(tiles) // 2
            return torch.cat([self(tiles[:half]), self(tiles[half:])])
        result = self._mean(tiles)
        if result is not None:
            return result
        limit = min(self.limit or len(tiles), len(tiles) * len(self.flips)) // 2
        if limit < 1:
            remedy = "Free memory" if self.device.type == "cpu" else "Free the device, predict on the device cpu"
            raise RfMedSamError(
                "The device has too little memory for one tile",
                where=self.device,
                found=f"a tile of {tuple(tiles.shape[2:])} voxels",
                remedy=f"{remedy}, or use a plan with a smaller patch",
            )
        self.limit = limit
        torch.cuda.empty_cache()
        return self(tiles)

    def _mean(self, tiles: Tensor) -> Tensor | None:
        """Mean logits, or None if memory ran out."""
        at_once = max(1, self.limit // len(tiles))
        total: Tensor | None = None
        try:
            for network in self.networks:
                for i in range(0, len(self.flips), at_once):
                    part = self._sum(network, tiles, self.flips[i : i + at_once])
                    total = part if total is None else total.add_(part)
        except (MemoryError, RuntimeError) as error:
            if not memory_ran_out(error):
                raise
            return None
        assert total is not None
        count = len(self.networks) * len(self.flips)
        return total.div_(count) if count > 1 else total

    def _sum(self, network: Network, tiles: Tensor, flips: list[tuple[int, ...]]) -> Tensor:
        flipped = [tiles.flip(axes) if axes else tiles for axes in flips]
        inputs = torch.cat(flipped) if len(flips) > 1 else flipped[0]
        with autocast(self.device, self.precision):
            results = network(inputs)
        parts = results.split(len(tiles))
        total = (parts[0].flip(flips[0]) if flips[0] else parts[0]).float()
        for axes, part in zip(flips[1:], parts[1:], strict=True):
            total += part.flip(axes)
        return total


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Autocast for CUDA at this precision, and for a CPU in bf16 if this is asked for; else networks run in float32."""
    if device.type == "cpu" and precision == "bf16":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    if device.type != "cuda" or precision == "fp32":
        return nullcontext()
    half = precision == "fp16" or (precision == "auto" and not torch.cuda.is_bf16_supported())
    return torch.autocast("cuda", dtype=torch.float16 if half else torch.bfloat16)


def _flips(axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All combinations of axes of a (n, C, *patch) tensor, none first."""
    return [tuple(2 + a for a in chosen) for n in range(len(axes) + 1) for chosen in itertools.combinations(axes, n)]


def _padded(image: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, tuple[int, int, int]]:
    """Pad the image with 0 to at least the patch; also returns the padding before each axis."""
    wanted = (1,) * (3 - len(patch_size)) + tuple(patch_size)
    missing = [max(0, p - n) for n, p in zip(image.shape[1:], wanted, strict=True)]
    lows = [m // 2 for m in missing]
    if any(missing):
        pads = [x for low, m in zip(reversed(lows), reversed(missing), strict=True) for x in (low, m - low)]
        image = pad(image, pads)
    return image, (lows[0], lows[1], lows[2])


def _check(networks: Sequence[Network], image: Tensor, patch_size: Sequence[int], mirror_axes: Sequence[int]) -> None:
    if not networks:
        raise PlanError("There is no network to predict with")
    if image.ndim != 4:
        raise PlanError("An image has the wrong number of axes", expected="(C, a, b, c)", found=tuple(image.shape))
    if len(patch_size) not in (2, 3):
        raise PlanError("A patch has two or three axes", found=tuple(patch_size))
    if any(not 0 <= axis < len(patch_size) for axis in mirror_axes) or len(set(mirror_axes)) != len(mirror_axes):
        raise PlanError(
            "Mirror axes do not match the patch",
            expected=f"different numbers below {len(patch_size)}",
            found=tuple(mirror_axes),
        )


def finite(logits: Tensor) -> Tensor:
    """Return the logits; raises an RfMedSamError if they contain NaN or infinity."""
    # one sum is much cheaper than a mask, and NaN and infinity propagate to it
    if not torch.isfinite(logits.sum()):
        raise RfMedSamError(
            "The network gives values that are not finite",
            remedy="Predict with precision fp32; if that does not help, the weights or the image hold NaN",
        )
    return logits
