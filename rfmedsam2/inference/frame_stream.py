"""Steps 1 and 2 of RFMedSAM 2 as a stream over the frames of a tile, with the memories that Step 2 attends to.

A stream gets the frames of one tile in order, any number at a time, and returns their class maps in the same order.
Results do not depend on how many frames come at once, and stored frames do not grow with the length of the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rfmedsam2.nn.refinement_state import ABSENT, Memory, RefinementInput, Size, Step1Output, size_of
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.sam2.types import FrameFeatures, MemoryBank
from rfmedsam2.prompts import Prompts

StartOf = Callable[[FrameFeatures], RefinementInput]
"""Makes the refinement input of frames from their features (for prompt generators on features)."""


class FrameStream:
    """One network on the frames of one tile.

    Args:
        network: network in eval mode.
        step: step whose class maps to return: 0 (generators that predict masks from features), 1 or 2.

    Attributes:
        encoded: number of frames encoded so far.
    """

    def __init__(self, network: RFMedSam2, *, step: int) -> None:
        config = network.config
        self.network, self.step = network, step
        self.encoded = 0
        self._back = config.memory_frames if config.strategy in ("preceding", "both") else 0
        self._ahead = config.memory_frames if config.strategy in ("following", "both") else 0
        self._memory: Memory | None = None
        self._waiting: _Part | None = None

    @property
    def held(self) -> int:
        """Number of frames whose memories, features or class maps are stored for later frames."""
        return 0 if self._memory is None else len(self._memory.rows)

    @torch.inference_mode()
    def add(
        self, frames: Tensor, start: RefinementInput | StartOf, *, seen: Tensor | None = None, last: bool = False
    ) -> Tensor:
        """Process the next n frames; returns the class maps of all frames that later frames cannot change.

        Frames without a prompt are not encoded if the prompts are known beforehand.

        Args:
            frames: (n, M, H, W) on the network's device.
            start: refinement input of these frames, or a function that makes it from their features.
            seen: (m,) indices of the frames to generate prompts on, if made from features; None: all.
            last: whether these are the last frames.

        Returns:
            (m, K, H, W): starts with frames held back before, without those now held back for later frames.
        """
        if not isinstance(start, RefinementInput):
            seen = torch.arange(len(frames), device=frames.device) if seen is None else seen
            features = self._encoded(_rows(frames, seen))
            start = start(features)
            active = _prompted(start)
            features = features if len(active) == len(seen) else features.at(active)
            start, active = spread(start, seen, len(frames)), seen[active]
        else:
            active = _prompted(start)
            features = self._encoded(_rows(frames, active)) if len(active) else None
        if self.step == 0:
            return start.base_logits
        part = _Part(features=features, logits=start.base_logits, evidence=start.evidence, active=active)
        return self._refined(part, start, last=last)

    def _encoded(self, frames: Tensor) -> FrameFeatures:
        self.encoded += len(frames)
        return self.network.encode(frames)

    def _refined(self, part: _Part, start: RefinementInput, *, last: bool) -> Tensor:
        first = None
        if part.features is not None and len(part.active):
            first = self.network.refiner.first(part.features, chosen(start, part.active))
            part = replace(part, logits=_with_rows(part.logits, part.active, first.logits))
        if self.step == 1:
            return part.logits
        memory = self._remembered(part, first)
        part = part if self._waiting is None else self._waiting.followed_by(part)
        ready = len(part.logits) if last else max(0, len(part.logits) - self._ahead)
        now, later = part.split(ready)
        self._memory = _latest(memory, self._back + len(later.logits))
        self._waiting = later if len(later.logits) else None
        if now.features is None or not len(now.active):
            return now.logits
        at = now.active + (len(memory.rows) - len(part.logits))
        evidence = None if now.evidence is None else _rows(now.evidence, now.active)
        logits = _rows(now.logits, now.active)
        final = self.network.refiner.second(now.features, logits, memory, evidence=evidence, at=at).logits
        return _with_rows(now.logits, now.active, final)

    def _remembered(self, part: _Part, first: Step1Output | None) -> Memory:
        """The stored memories, followed by those of a part."""
        rows = torch.full((len(part.logits), 1, part.logits.shape[1]), -1, device=part.logits.device)
        held = self._memory
        bank = self._nothing(part.logits) if held is None else held.bank
        if first is not None:
            assert part.features is not None
            new = self.network.refiner.encode_memory(part.features, first, 1)
            rows[part.active] = torch.where(new.rows >= 0, new.rows + len(bank.maps), -1)
            bank = _joined(bank, new.bank)
        return Memory(bank=bank, rows=rows if held is None else torch.cat([held.rows, rows]))

    def _nothing(self, like: Tensor) -> MemoryBank:
        sam = self.network.sam
        maps = like.new_empty(0, sam.memory_channels, sam.side, sam.side)
        return MemoryBank(maps=maps, pointers=like.new_empty(0, sam.channels))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Frames after Step 1: class maps (n, K, H, W), evidence, and features of the `active` ones (with prompts)."""

    features: FrameFeatures | None
    logits: Tensor
    evidence: Tensor | None
    active: Tensor

    def followed_by(self, other: _Part) -> _Part:
        if self.features is None or other.features is None:
            features = self.features or other.features
        else:
            features = FrameFeatures(
                embedding=torch.cat([self.features.embedding, other.features.embedding]),
                middle=torch.cat([self.features.middle, other.features.middle]),
                fine=torch.cat([self.features.fine, other.features.fine]),
            )
        active = torch.cat([self.active, other.active + len(self.logits)])
        evidence = None
        if self.evidence is not None and other.evidence is not None:
            evidence = torch.cat([self.evidence, other.evidence])
        logits = torch.cat([self.logits, other.logits])
        return _Part(features=features, logits=logits, evidence=evidence, active=active)

    def split(self, frames: int) -> tuple[_Part, _Part]:
        """The first frames, and the rest."""
        count = len(self.logits)
        if frames == count:
            nothing = None if self.evidence is None else self.evidence[:0]
            return self, _Part(features=None, logits=self.logits[:0], evidence=nothing, active=self.active[:0])
        here = self.active < frames
        parts = []
        for chosen_, place in ((here, slice(0, frames)), (~here, slice(frames, count))):
            own = chosen_.nonzero()[:, 0]
            features = None if self.features is None or not len(own) else self.features.at(own)
            # a copy, so that waiting frames do not keep finished ones alive
            logits = self.logits[place].clone()
            evidence = None if self.evidence is None else self.evidence[place].clone()
            active = self.active[own] - place.start
            parts.append(_Part(features=features, logits=logits, evidence=evidence, active=active))
        return parts[0], parts[1]


def chosen(start: RefinementInput, frames: Tensor) -> RefinementInput:
    """Select the refinement input of frames (n,); the same object if all are selected."""
    if len(frames) == len(start.base_logits):
        return start
    masks, tokens = (None if t is None else t[frames] for t in (start.masks, start.tokens))
    prompts = Prompts(boxes=start.prompts.boxes[frames], present=start.prompts.present[frames])
    base_logits = start.base_logits[frames]
    return RefinementInput(prompts=prompts, base_logits=base_logits, given=start.given, masks=masks, tokens=tokens)


def spread(start: RefinementInput, frames: Tensor, count: int) -> RefinementInput:
    """Expand the refinement input of frames (n,) to `count` frames; the others get empty prompts."""
    if len(frames) == count:
        return start

    def among(values: Tensor, nothing: float) -> Tensor:
        return values.new_full((count, *values.shape[1:]), nothing).index_copy_(0, frames, values)

    given = start.prompts
    return RefinementInput(
        prompts=Prompts(boxes=among(given.boxes, 0), present=among(given.present, 0)),
        base_logits=among(start.base_logits, ABSENT),
        given=start.given,
        masks=None if start.masks is None else among(start.masks, ABSENT),
        tokens=None if start.tokens is None else among(start.tokens, 0),
    )


def flipped(start: RefinementInput, dims: tuple[int, ...]) -> RefinementInput:
    """Flip the refinement input of frames along dims -2 (rows) and -1 (columns)."""
    if not dims:
        return start
    masks = None if start.masks is None else start.masks.flip(dims)
    prompts = flipped_boxes(start.prompts, dims, size_of(start.base_logits))
    base_logits = start.base_logits.flip(dims)
    return RefinementInput(
        prompts=prompts, base_logits=base_logits, given=start.given, masks=masks, tokens=start.tokens
    )


def flipped_boxes(prompts: Prompts, dims: tuple[int, ...], size: Size) -> Prompts:
    """Flip boxes on frames of `size` along dims -2 (rows) and -1 (columns)."""
    x0, y0, x1, y1 = prompts.boxes.unbind(-1)
    height, width = size
    if -1 in dims:
        x0, x1 = width - 1 - x1, width - 1 - x0
    if -2 in dims:
        y0, y1 = height - 1 - y1, height - 1 - y0
    boxes = torch.stack([x0, y0, x1, y1], -1)
    return Prompts(boxes=torch.where(prompts.present[..., None], boxes, 0), present=prompts.present)


def clipped_boxes(prompts: Prompts, corner: tuple[int, int], size: Size) -> Prompts:
    """Clip boxes to a tile of `size` with its first pixel at `corner` (row, column); absent if outside the tile."""
    top, left = corner
    x0, y0, x1, y1 = prompts.boxes.unbind(-1)
    x0, x1 = (x0 - left).clamp_min(0), (x1 - left).clamp_max(size[1] - 1)
    y0, y1 = (y0 - top).clamp_min(0), (y1 - top).clamp_max(size[0] - 1)
    present = prompts.present & (x1 >= x0) & (y1 >= y0)
    boxes = torch.stack([x0, y0, x1, y1], -1)
    return Prompts(boxes=torch.where(present[..., None], boxes, 0), present=present)


def _prompted(start: RefinementInput) -> Tensor:
    """(n,) indices of the frames with a prompt."""
    return start.prompts.present.any(1).nonzero()[:, 0]


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    return values if len(rows) == len(values) else values[rows]


def _with_rows(values: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return new if len(rows) == len(values) else values.index_copy(0, rows, new.to(values.dtype))


def _joined(bank: MemoryBank, other: MemoryBank) -> MemoryBank:
    if not len(bank.maps):
        return other
    maps, pointers = torch.cat([bank.maps, other.maps]), torch.cat([bank.pointers, other.pointers])
    return MemoryBank(maps=maps, pointers=pointers)


def _latest(memory: Memory, frames: int) -> Memory:
    """The memories of the last frames; rows of a memory bank are in the order of frames."""
    rows = memory.rows[max(0, len(memory.rows) - frames) :]
    known = rows[rows >= 0]
    gone = int(known.min()) if len(known) else len(memory.bank.maps)
    # copies, so that dropped memories do not stay alive
    maps, pointers = memory.bank.maps[gone:].clone(), memory.bank.pointers[gone:].clone()
    return Memory(bank=MemoryBank(maps=maps, pointers=pointers), rows=torch.where(rows >= 0, rows - gone, -1))
