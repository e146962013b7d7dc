"""Estimates of SAM 2's working memory, from which the chunk sizes for a memory budget follow.

Bytes per object prompt (slice, class) or frame, in float32. In training, the estimate covers the tensors that autograd
stores for the backward pass of a chunk; otherwise the peak of live tensors. The factors count tensors of each part's
forward pass, with adapters (without them up to a third less); `tests/unit/nn/test_memory_budget.py` compares them with
measured bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rfmedsam2.nn.sam2.sizes import seen_side

FLOAT = 4
PROMPT_TOKENS = 9
"""Tokens per object in the mask decoder: score, quality, four masks, two corners of a box, padding."""


class Counts(NamedTuple):
    """Number of tensors in training and in inference."""

    kept: float
    alive: float

    def select(self, training: bool) -> float:
        """The number for the mode."""
        return self.kept if training else self.alive


DECODE = Counts(34, 16)
"""Tensors of (C, s, s): two-way transformer, upscaling, gathered fine features."""
DECODE_TOKENS = Counts(50, 25)
"""Vectors of C for each token."""
ENCODE_MEMORY = Counts(34, 11)
"""Tensors of (C, s, s) in the memory encoder."""
ENCODE_MEMORY_MASKS = Counts(22, 4)
"""Maps of the frame's size in the memory encoder, before the mask is downsampled to s x s."""
CONDITION_ON_MEMORY = 13
"""Tensors of (s*s, C) per layer of memory attention, besides its MLP's hidden tensor and the memories."""


class Encoder(NamedTuple):
    """Working memory of an image encoder, MiB per frame of 256 x 256, proportional to the frame's area.

    `least_side`: smaller frames need as much memory as frames of this side, because windows are padded.
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
"""Measured with adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectSizes:
    """Sizes that determine working memory: s, C, M of `nn.sam2.types`, layers and width of memory attention."""

    side: int
    channels: int
    memory_channels: int
    memory_layers: int
    memory_width: int

    def decode(self, *, training: bool = True) -> int:
        """Bytes per object of Step 1's decoding."""
        positions = DECODE.select(training) * self.side**2
        return int(FLOAT * self.channels * (positions + DECODE_TOKENS.select(training) * PROMPT_TOKENS))

    def encode_memory(self, *, training: bool = True) -> int:
        """Bytes per object of memory encoding."""
        maps = ENCODE_MEMORY.select(training) * self.channels * self.side**2
        return int(FLOAT * (maps + ENCODE_MEMORY_MASKS.select(training) * (16 * self.side) ** 2))

    def condition_on_memory(self, memories: int, *, training: bool = True) -> int:
        """Bytes per object of Step 2: memory attention over `memories` maps, and decoding."""
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


def frame_bytes(backbone: str, frame_size: int, *, side: int, training: bool, encoder_size: int | None = None) -> int:
    """Bytes per frame of image encoding.

    Args:
        backbone: the backbone.
        frame_size: of the decoder.
        side: side length of frames before they are resized.
        training: with gradients.
        encoder_size: see `RFMedSam2Config.encoder_size`.
    """
    encoder = ENCODERS[backbone]
    seen = encoder_size or (seen_side(side, frame_size) if backbone == "lite_medsam" else frame_size)
    seen = max(seen, encoder.least_side)
    kept = encoder.kept if training else encoder.alive
    return int(kept * 2**20 * (seen / 256) ** 2)


def chunk_size(budget_mb: int, bytes_each: int) -> int:
    """Number of items that fit into the budget; at least one."""
    return max(1, int(budget_mb * 1e6) // max(1, bytes_each))
