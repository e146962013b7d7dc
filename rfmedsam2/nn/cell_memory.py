"""How many cells, or frames, fit into a memory budget: estimates of working memory from the sizes of SAM 2's parts.

In bytes a cell or frame at float32; while training, what one checkpointed chunk keeps for its backward pass counts.
The factors count the tensors of each part's forward pass; `tests/unit/test_cell_memory.py` holds them against measured
ones.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4
DECODE_FACTOR = 27
"""Tensors of (C, s, s) that decoding keeps a cell: two-way transformer, upscaling, gathered fine features."""
REMEMBER_FACTOR = 16
"""The same for the memory encoder, beside `MASK_FACTOR` full-size maps."""
MASK_FACTOR = 8
ENCODER_MB = {
    "sam2_tiny": 152,
    "sam2_small": 191,
    "sam2_base_plus": 328,
    "sam2_large": 572,
    "nano": 20,
    "mobile_sam": 120,
    "lite_medsam": 120,
}
"""Activations a frame of 256 x 256 keeps in the encoder, MiB (measured: autograd's saved tensors)."""
FORWARD_SHARE = 0.15
"""Share of those that is alive at once when nothing is kept for a backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSizes:
    """Sizes that working memory depends on: s, C, M of `nn.sam2.parts`, layers and width of memory attention."""

    side: int
    channels: int
    memory_channels: int
    memory_layers: int
    memory_width: int

    def decode(self) -> int:
        """Bytes a cell of Step 1's decoding."""
        return FLOAT * DECODE_FACTOR * self.channels * self.side**2

    def remember(self) -> int:
        """Bytes a cell of memory encoding."""
        return FLOAT * (REMEMBER_FACTOR * self.channels * self.side**2 + MASK_FACTOR * (16 * self.side) ** 2)

    def recall(self, memories: int, *, training: bool) -> int:
        """Bytes a cell of Step 2: memory attention over so many maps, and decoding."""
        tokens = self.side**2
        attention = 2 * tokens * tokens * memories  # scores and their softmax
        keys = 2 * tokens * memories * self.channels
        rest = tokens * (10 * self.channels + 2 * self.memory_width)
        layers = self.memory_layers if training else 1
        return FLOAT * layers * (attention + keys + rest) + self.decode()


def frame_bytes(backbone: str, frame_size: int, *, training: bool) -> int:
    """Bytes a frame of image encoding."""
    kept = ENCODER_MB[backbone] * 2**20 * (frame_size / 256) ** 2
    return int(kept if training else kept * FORWARD_SHARE)


def at_once(budget_mb: int, bytes_each: int) -> int:
    """How many fit; at least one."""
    return max(1, int(budget_mb * 1e6) // max(1, bytes_each))
