"""Refinement of a volume by RFMedSAM 2 in tiles, each processed as a stream of frames.

There is one stream per tile, flip and network; their class maps are averaged, tiles weighted by a Gaussian.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2.inference.accumulator import EMPTY_LOGIT, SlabAccumulator
from rfmedsam2.inference.frame_stream import FrameStream, StartOf, clipped_boxes, flipped, flipped_boxes
from rfmedsam2.inference.sliding_window import (
    EMPTY_RANGE,
    Execution,
    Slab,
    autocast,
    finite,
    gaussian_weights,
    tile_starts,
)
from rfmedsam2.nn.memory_budget import chunk_size
from rfmedsam2.nn.refinement_state import RefinementInput, Size, one_against_rest, relative_to_background
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.sam2.types import FrameFeatures
from rfmedsam2.prompts import Prompts, prompts_from_labels, prompts_from_members
from rfmedsam2.records.plan import Inference

MAX_FRAMES_CPU = 8
"""Frames per batch of a stream on a CPU, where larger batches are not faster."""
MAX_FRAMES = 32
"""Frames per batch of a stream on other devices."""
PLANE_BYTES = 6 * 4
"""Bytes per pixel and class: float32 of Step 0, base logits, mask prompts, sums, averages, exported logits."""

Corner = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How an image is covered by tiles.

    Attributes:
        patch_size: frames (of Step 0, and per window with strategy `sam2`), rows, columns of a tile.
        inference: step size, mirroring, tiles of Step 0 per forward pass.
        mirror_axes: axes of the patch that are flipped if `inference.mirror`; Steps 1 and 2 flip in plane only.
    """

    patch_size: Sequence[int]
    inference: Inference
    mirror_axes: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of a prediction.

    Attributes:
        step: step whose logits to return; None: the last step.
        boxes: boxes by (slice, class) in the image's planned grid, which replace the model's own prompts in Step 1.
            Objects without a box keep the result of Step 0.
        frames_at_once: frames per batch of a stream; None: chosen by the device. Results do not depend on it.
    """

    step: int | None = None
    boxes: Prompts | None = None
    frames_at_once: int | None = None


class Planes:
    """Buffer that turns slabs into ranges of frames, in order.

    Attributes:
        held: number of frames in the buffer.
    """

    def __init__(self, slabs: Iterable[Slab]) -> None:
        self._slabs = iter(slabs)
        self._parts: list[Slab] = []
        self._end = 0

    @property
    def held(self) -> int:
        """Number of frames in the buffer."""
        return sum(part.logits.shape[1] for part in self._parts)

    def take(self, start: int, stop: int) -> Tensor:
        """Frames [start, stop) as (K, stop - start, b, c); frames before `start` are dropped."""
        self._parts = [part for part in self._parts if part.start + part.logits.shape[1] > start]
        while self._end < stop:
            slab = next(self._slabs)
            self._parts.append(slab)
            self._end = slab.start + slab.logits.shape[1]
        pieces = [
            part.logits[:, max(0, start - part.start) : stop - part.start] for part in self._parts if part.start < stop
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """Frames [start, stop) of one batch; `end`: for separate windows, frames before it are finished with this one."""

    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plane:
    """Step 0 of n frames for all tiles: base logits and mask prompts (n, K, b, c), labels (n, b, c) or members."""

    base_logits: Tensor
    masks: Tensor | None
    classes: Tensor


class RefinedTiles:
    """Runs Steps 1 and 2 on a volume.

    Args:
        networks: folds of one model on `device`, in eval mode.
        image: (C, a, b, c), on any device.
        tiling: patch, overlap and flips.
        device: device of the computation.
        request: step and boxes.

    Attributes:
        encoded: number of tile frames encoded so far, over all networks and flips.
        held: largest number of frames that a stream has stored so far.
    """

    def __init__(
        self, networks: Sequence[RFMedSam2], image: Tensor, *, tiling: Tiling, device: torch.device, request: Request
    ) -> None:
        config = networks[0].config
        self._networks, self._image, self._device = networks, image, device
        self._step = config.refinements if request.step is None else request.step
        self._boxes = request.boxes
        height, width = tiling.patch_size[1:]
        rows, columns = image.shape[2:]
        self._size: Size = (height, width)
        self._padded: Size = (max(rows, height), max(columns, width))
        self._lows = ((self._padded[0] - rows) // 2, (self._padded[1] - columns) // 2)
        starts = tile_starts(self._padded, self._size, tiling.inference.step_size)
        self._corners: list[Corner] = [(y, x) for y in starts[0] for x in starts[1]]
        axes = [axis - 3 for axis in tiling.mirror_axes if axis > 0] if tiling.inference.mirror else []
        self._flips = [dims for n in range(len(axes) + 1) for dims in itertools.combinations(axes, n)]
        # windows of strategy `sam2` are independent; with the other strategies all frames form one stream
        self._apart = config.strategy == "sam2" and self._step == 2
        self._windows = self._windows_of(tiling, request.frames_at_once)
        self._streams: dict[Corner, list[FrameStream]] = {}
        self.encoded = self.held = 0

    def _windows_of(self, tiling: Tiling, frames: int | None) -> list[_Window]:
        planes = self._image.shape[1]
        if self._apart:
            depth = min(tiling.patch_size[0], planes)
            (starts,) = tile_starts([planes], [depth], tiling.inference.step_size)
            stops, ends = [start + depth for start in starts], [*starts[1:], planes]
        else:
            frames = frames or self._frames_at_once()
            starts = list(range(0, planes, frames))
            stops = ends = [*starts[1:], planes]
        return [_Window(start=a, stop=b, end=c) for a, b, c in zip(starts, stops, ends, strict=True)]

    def _frames_at_once(self) -> int:
        network = self._networks[0]
        pixels = self._padded[0] * self._padded[1]
        fitting = chunk_size(network.refiner.compute.memory_mb, PLANE_BYTES * network.outputs * pixels)
        return min(fitting, MAX_FRAMES_CPU if self._device.type == "cpu" else MAX_FRAMES)

    def slabs(self, given: Iterable[Slab] | None, execution: Execution) -> Iterator[Slab]:
        """Finished frames in order; `given` are the slabs of Step 0 if it is a U-Net."""
        planes = None if given is None else Planes(given)
        depth = self._windows[0].stop
        weights = gaussian_weights((depth, *self._size) if self._apart else self._size).to(self._device)
        network = self._networks[0]
        depth += network.config.memory_frames
        ring = SlabAccumulator(network.classes, depth, self._padded, self._device, background=False)
        done = 0
        tiles = [(number, corner) for number in range(len(self._windows)) for corner in self._corners]
        for number, corners in itertools.groupby(execution.track(tiles, "refined tiles", len(tiles)), itemgetter(0)):
            window = self._windows[number]
            if self._apart:
                self._streams = {}
            plane = None if planes is None else self._plane(planes.take(window.start, window.stop))
            first, frames = window.start if self._apart else done, 0
            for _, corner in corners:
                maps = self._refined(window, plane, corner, execution)
                frames = len(maps)
                if frames:
                    ring.add(maps.transpose(0, 1), weights, (first, *corner))
            stop = window.end if self._apart else done + frames
            if stop > done:
                yield Slab(start=done, logits=self._finished(ring.finish(done, stop)))
            done = stop

    @torch.inference_mode()
    def _plane(self, logits: Tensor) -> _Plane:
        """Compute from Step 0's logits (outputs, n, rows, columns) what all tiles share."""
        network = self._networks[0]
        around = self._around(logits)
        if any(around):
            sure = torch.full((len(logits), 1, 1, 1), -EMPTY_LOGIT, device=logits.device)
            if not network.regions:
                sure[0] = EMPTY_LOGIT
            # padding around a small image is background
            inside = F.pad(torch.ones_like(logits[:1]), around) > 0
            logits = torch.where(inside, F.pad(logits, around), sure)
        logits = logits.transpose(0, 1)
        base_logits = relative_to_background(logits, regions=network.regions)
        masks = one_against_rest(logits, regions=network.regions) if network.config.mask_prompt else None
        if network.regions:
            return _Plane(base_logits=base_logits, masks=masks, classes=base_logits > 0)
        best, index = base_logits.max(1)
        return _Plane(base_logits=base_logits, masks=masks, classes=torch.where(best > 0, index + 1, 0))

    def _around(self, maps: Tensor) -> tuple[int, int, int, int]:
        """Padding left, right, above and below of maps (..., rows, columns) if the plane is smaller than a tile."""
        (top, left), (height, width) = self._lows, self._padded
        return left, width - maps.shape[-1] - left, top, height - maps.shape[-2] - top

    @torch.inference_mode()
    def _refined(self, window: _Window, plane: _Plane | None, corner: Corner, execution: Execution) -> Tensor:
        """Class maps (m, K, H, W) of a tile, averaged over networks and flips."""
        frames = self._frames(window, corner)
        known, boxes = self._start(window, plane, corner)
        seen = None
        if known is None and boxes is None and execution.skip_empty:
            seen = _with_body(frames).to(self._device)
            known = None if len(seen) else self._nothing(len(frames))
        if known is None or known.prompts.present.any():
            frames = frames.to(self._device, torch.float32)
        if corner not in self._streams:
            self._streams[corner] = [FrameStream(n, step=self._step) for n in self._networks for _ in self._flips]
        streams, total = self._streams[corner], None
        last = self._apart or window.stop == self._image.shape[1]
        for stream, dims in zip(streams, self._flips * len(self._networks), strict=True):
            start: RefinementInput | StartOf
            if known is not None:
                start = flipped(known, dims)
            else:
                given = None if boxes is None else flipped_boxes(boxes, dims, self._size)
                start = partial(_from_features, network=stream.network, size=self._size, boxes=given)
            before = stream.encoded
            with autocast(self._device, execution.precision):
                maps = stream.add(frames.flip(dims) if dims else frames, start, seen=seen, last=last)
            self.encoded, self.held = self.encoded + stream.encoded - before, max(self.held, stream.held)
            maps = (maps.flip(dims) if dims else maps).float()
            total = maps if total is None else total + maps
        assert total is not None
        return total / len(streams) if len(streams) > 1 else total

    def _start(
        self, window: _Window, plane: _Plane | None, corner: Corner
    ) -> tuple[RefinementInput | None, Prompts | None]:
        """Refinement input of a tile's frames, None if it is made from features; and the given boxes, if any."""
        boxes = None
        if self._boxes is not None:
            part = slice(window.start, window.stop)
            own, present = self._boxes.boxes[part].to(self._device), self._boxes.present[part].to(self._device)
            top, left = corner[0] - self._lows[0], corner[1] - self._lows[1]
            boxes = clipped_boxes(Prompts(boxes=own, present=present), (top, left), self._size)
        network = self._networks[0]
        if plane is None:
            makes_masks = network.config.generator == "hierarchical_masks"
            known = None if boxes is None or makes_masks else network.start_from_boxes(boxes, self._size)
            return known, boxes
        inside = self._inside(corner)
        masks = None if plane.masks is None else plane.masks[inside]
        if boxes is None:
            classes = plane.classes[inside]
            found = prompts_from_members(classes) if network.regions else prompts_from_labels(classes, network.classes)
            return RefinementInput(prompts=found, base_logits=plane.base_logits[inside], masks=masks), None
        start = RefinementInput(prompts=boxes, base_logits=plane.base_logits[inside], masks=masks)
        return network.with_boxes(start, boxes), boxes

    def _nothing(self, frames: int) -> RefinementInput:
        network = self._networks[0]
        boxes = torch.zeros(frames, network.classes, 4, device=self._device)
        return network.start_from_boxes(Prompts(boxes=boxes, present=boxes[..., 0] > 0), self._size)

    def _frames(self, window: _Window, corner: Corner) -> Tensor:
        """(n, C, H, W) of the image, padded with 0 if it is smaller."""
        whole = self._image[:, window.start : window.stop]
        if any(around := self._around(whole)):
            whole = F.pad(whole, around)
        return whole[self._inside(corner)].transpose(0, 1)

    def _inside(self, corner: Corner) -> tuple[Any, ...]:
        """Index of a tile in maps of the padded plane."""
        return (..., slice(corner[0], corner[0] + self._size[0]), slice(corner[1], corner[1] + self._size[1]))

    def _finished(self, maps: Tensor) -> Tensor:
        """Class maps (K, n, rows, columns) of the padded plane -> logits of the image."""
        (top, left), (rows, columns) = self._lows, self._image.shape[2:]
        maps = finite(maps[..., top : top + rows, left : left + columns])
        return maps if self._networks[0].regions else F.pad(maps, (0, 0, 0, 0, 0, 0, 1, 0))


def _from_features(
    features: FrameFeatures, *, network: RFMedSam2, size: Size, boxes: Prompts | None
) -> RefinementInput:
    start = network.start(features, size, None)
    return start if boxes is None else network.with_boxes(start, boxes)


def _with_body(frames: Tensor) -> Tensor:
    """(m,) indices of the frames (n, C, H, W) in which some channel is not constant."""
    low, high = torch.aminmax(frames.flatten(2), dim=2)
    return ((high - low) > EMPTY_RANGE).any(1).nonzero()[:, 0]
