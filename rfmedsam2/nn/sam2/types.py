"""What SAM 2's parts hand to one another: features of frames, decoded cells, memories and which of them are attended.

A cell is one class on one frame. Everything is batched over frames or over cells; s is the side of the image embedding
(frame_size / 16), C its channels (256; nano fewer), M the channels of a memory (64; nano fewer).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFeatures:
    """What the image encoder makes of frames.

    Attributes:
        embedding: (N, C, s, s), stride 16, without the no-memory embedding.
        middle: (N, C/4, 2s, 2s), stride 8, already through the decoder's conv_s1.
        fine: (N, C/8, 4s, 4s), stride 4, already through the decoder's conv_s0.
    """

    embedding: Tensor
    middle: Tensor
    fine: Tensor

    def at(self, frames: Tensor) -> FrameFeatures:
        """Rows of the frames (n,) named, repeated where a frame is named twice."""
        return FrameFeatures(embedding=self.embedding[frames], middle=self.middle[frames], fine=self.fine[frames])


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectPrompts:
    """Prompts of n cells; None leaves that kind out.

    Attributes:
        boxes: (n, 4) xyxy, pixels of the frame.
        masks: (n, 4s, 4s) mask logits.
        tokens: (n, P, C) sparse embeddings that take the place of the boxes'.
    """

    boxes: Tensor | None = None
    masks: Tensor | None = None
    tokens: Tensor | None = None

    def at(self, objects: Tensor | slice) -> ObjectPrompts:
        """The cells named."""
        boxes, masks, tokens = (None if t is None else t[objects] for t in (self.boxes, self.masks, self.tokens))
        return ObjectPrompts(boxes=boxes, masks=masks, tokens=tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedMasks:
    """What the mask decoder makes of n cells.

    Attributes:
        masks: (n, 4s, 4s) logits of the single-mask output.
        pointers: (n, C) object pointers.
        scores: (n,) object score logits; above 0: the object is there.
        quality: (n,) predicted IoU.
    """

    masks: Tensor
    pointers: Tensor
    scores: Tensor
    quality: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBank:
    """Memories of m cells: maps (m, M, s, s) and object pointers (m, C)."""

    maps: Tensor
    pointers: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Which rows of a bank n cells attend to; every cell has the same number, so nothing is padded.

    Attributes:
        maps: (n, a) long, rows of `MemoryBank.maps`.
        positions: (n, a) long, entry of SAM 2's temporal encoding `maskmem_tpos_enc`: 6 for the current (or a
            conditioning) frame, d - 1 for a frame d away.
        pointers: (n, p) long, rows of `MemoryBank.pointers`.
        distances: (n, p) float, frames between pointer and cell over the largest such distance; negative: ahead.
    """

    maps: Tensor
    positions: Tensor
    pointers: Tensor
    distances: Tensor

    def at(self, objects: Tensor | slice) -> Slots:
        """The cells named."""
        return Slots(
            maps=self.maps[objects],
            positions=self.positions[objects],
            pointers=self.pointers[objects],
            distances=self.distances[objects],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Cells that attend to equally many memories: `objects` (n,) long indexes the cells asked about."""

    objects: Tensor
    slots: Slots
