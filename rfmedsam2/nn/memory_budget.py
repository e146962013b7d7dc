"""How many cells, or frames, fit into a memory budget: estimates of working memory from the sizes of SAM 2's parts.

In bytes a cell or frame at float32. While training, what autograd keeps of a chunk for its backward pass counts; else
what is alive at once. The factors count tensors of each part's forward pass, with adapters (without them it is up to a
third less); `tests/unit/nn/test_memory_budget.py` holds them against counted bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rfmedsam2.nn.sam2.sizes import seen_side

FLOAT = 4
PROMPT_TOKENS = 9
"""Of a cell in the mask decoder: score, quality, four masks, two corners of a box, padding."""


class Counts(NamedTuple):
    """Numbers of tensors, while training and else."""

    kept: float
    alive: float

    def when(self, training: bool) -> float:
        """The one or the other."""
        return self.kept if training else self.alive


DECODE = Counts(34, 16)
"""Tensors of (C, s, s): two-way transformer, upscaling, gathered fine features."""
DECODE_TOKENS = Counts(50, 25)
"""Vectors of C for each token."""
ENCODE_MEMORY = Counts(34, 11)
"""Tensors of (C, s, s) of the memory encoder,"""
ENCODE_MEMORY_MASKS = Counts(22, 4)
"""and maps of the frame's size, before the mask is reduced to s x s."""
CONDITION_ON_MEMORY = 13
"""Tensors of (s*s, C) that a layer of memory attention keeps, beside its MLP's hidden one and what memories add."""


class Encoder(NamedTuple):
    """Working memory of an image encoder, MiB a frame of 256 x 256, in proportion to the frame's area.

    `least_side`: frames smaller than so many pixels take as much as these, because windows are padded.
    """

    kept: float
    alive: float
    least_side: int


ENCODERS = {
    "nano": Encoder(28, 5.3, 32),
    "sam2_tiny": Encoder(175, 19, 80),
    "sam2_small": Encoder(219, 19, 85),
    "sam2_base_plus": Encoder(375, 22, 86),
    "sam2_large": Encoder(675, 28, 114),
    "mobile_sam": Encoder(183, 15, 90),
    "lite_medsam": Encoder(2280, 226, 64),
}
"""Counted with adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectSizes:
    """Sizes that working memory depends on: s, C, M of `nn.sam2.parts`, layers and width of memory attention."""

    side: int
    channels: int
    memory_channels: int
    memory_layers: int
    memory_width: int

    def decode(self, *, training: bool = True) -> int:
        """Bytes a cell of Step 1's decoding."""
        positions = DECODE.when(training) * self.side**2
        return int(FLOAT * self.channels * (positions + DECODE_TOKENS.when(training) * PROMPT_TOKENS))

    def encode_memory(self, *, training: bool = True) -> int:
        """Bytes a cell of memory encoding."""
        maps = ENCODE_MEMORY.when(training) * self.channels * self.side**2
        return int(FLOAT * (maps + ENCODE_MEMORY_MASKS.when(training) * (16 * self.side) ** 2))

    def recall(self, memories: int, *, training: bool = True) -> int:
        """Bytes a cell of Step 2: memory attention over so many maps, and decoding."""
        tokens = self.side**2
        keys = memories * (tokens + self.channels // self.memory_channels)  # a pointer is several tokens
        if training:
            layer = keys * (tokens + self.channels) + tokens * (
                CONDITION_ON_MEMORY * self.channels + self.memory_width + tokens
            )
            return FLOAT * self.memory_layers * layer + self.decode()
        attention = keys * (2 * tokens + 3 * self.channels) + 2 * tokens * self.channels
        mlp = tokens * (2 * self.memory_width + 5 * self.channels)
        return max(FLOAT * max(attention, mlp), self.decode(training=False))


def frame_bytes(backbone: str, frame_size: int, *, side: int, training: bool) -> int:
    """Bytes a frame of image encoding; `side`: pixels a side of the frames before they are made `frame_size`."""
    encoder = ENCODERS[backbone]
    seen = seen_side(side, frame_size) if backbone == "lite_medsam" else frame_size
    seen = max(seen, encoder.least_side)
    kept = encoder.kept if training else encoder.alive
    return int(kept * 2**20 * (seen / 256) ** 2)


def chunk_size(budget_mb: int, bytes_each: int) -> int:
    """How many fit; at least one."""
    return max(1, int(budget_mb * 1e6) // max(1, bytes_each))
