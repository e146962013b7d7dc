"""Data types of SAM 2: features of frames, object prompts, decoded masks, memories and their selection.

An object is one class on one frame. Everything is batched over frames or objects; s is the side length of the image
embedding (frame_size / 16), C its channels (256; nano fewer), M the channels of a memory (64; nano fewer).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFeatures:
    """Features of frames from the image encoder.

    Attributes:
        embedding: (N, C, s, s), stride 16, without the no-memory embedding.
        middle: (N, C/4, 2s, 2s), stride 8, after the decoder's conv_s1.
        fine: (N, C/8, 4s, 4s), stride 4, after the decoder's conv_s0.
        rows: (F,) long, row of each of F frames of which N are encoded (-1: it is not); None: all are, in order.
    """

    embedding: Tensor
    middle: Tensor
    fine: Tensor
    rows: Tensor | None = None

    def at(self, frames: Tensor) -> FrameFeatures:
        """Select encoded frames by index (n,), with repetition."""
        rows = self.rows_of(frames)
        return FrameFeatures(embedding=self.embedding[rows], middle=self.middle[rows], fine=self.fine[rows])

    def rows_of(self, frames: Tensor) -> Tensor:
        """Rows of frames in these maps, (n,)."""
        return frames if self.rows is None else self.rows[frames]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectPrompts:
    """Prompts of n objects; None: no prompts of this kind.

    Attributes:
        boxes: (n, 4) xyxy, pixels of the frame.
        padded: (n,) bool, objects without a box among these, whose corners get the label -1.
        masks: (n, 4s, 4s) mask logits.
        tokens: (n, P, C) sparse embeddings, used instead of boxes.
    """

    boxes: Tensor | None = None
    padded: Tensor | None = None
    masks: Tensor | None = None
    tokens: Tensor | None = None

    def at(self, objects: Tensor | slice) -> ObjectPrompts:
        """Select objects by index."""
        given = (self.boxes, self.padded, self.masks, self.tokens)
        boxes, padded, masks, tokens = (None if t is None else t[objects] for t in given)
        return ObjectPrompts(boxes=boxes, padded=padded, masks=masks, tokens=tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedMasks:
    """Outputs of the mask decoder for n objects.

    Attributes:
        masks: (n, 4s, 4s) logits of the single-mask output.
        pointers: (n, C) object pointers.
        scores: (n,) object score logits; above 0: the object is present.
        quality: (n,) predicted IoU.
    """

    masks: Tensor
    pointers: Tensor
    scores: Tensor
    quality: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBank:
    """Memories of m objects: maps (m, M, s, s) and object pointers (m, C)."""

    maps: Tensor
    pointers: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Rows of a memory bank that n objects attend to; the same number for every object, without padding.

    Attributes:
        maps: (n, a) long, rows of `MemoryBank.maps`.
        positions: (n, a) long, entry of SAM 2's temporal encoding `maskmem_tpos_enc`: 6 for the current (or a
            conditioning) frame, d - 1 for a frame d away.
        pointers: (n, p) long, rows of `MemoryBank.pointers`.
        distances: (n, p) float, distance in frames to the pointer, relative to the largest one; negative: ahead.
    """

    maps: Tensor
    positions: Tensor
    pointers: Tensor
    distances: Tensor

    def at(self, objects: Tensor | slice) -> Slots:
        """Select objects by index."""
        return Slots(
            maps=self.maps[objects],
            positions=self.positions[objects],
            pointers=self.pointers[objects],
            distances=self.distances[objects],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Objects that attend to the same number of memories: `objects` (n,) long are their indices."""

    objects: Tensor
    slots: Slots
