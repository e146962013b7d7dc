"""Adapters in a TinyViT image encoder, at the sites that correspond to those in Hiera."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rfmedsam2.nn.adapters import WithAdapter, adapted
from rfmedsam2.nn.sam2.tiny_vit import NECK_CHANNELS, WIDTHS, TinyVitBlock, TinyVitEncoder

MakeAdapter = Callable[[int], nn.Module]
"""Number of features -> an adapter."""


class AdaptedTinyVitBlock(nn.Module):
    """A TinyViT block with an adapter after its attention, on the whole map, and one parallel to its MLP."""

    def __init__(self, original: TinyVitBlock, make: MakeAdapter) -> None:
        super().__init__()
        self.original = original
        self.after_attention = make(original.dim)
        self.beside_mlp = make(original.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, dim) -> the same, as the original block."""
        block = self.original
        x = block.convolve(x + adapted(block.attend(x), self.after_attention))
        normed = block.mlp.norm(x)
        return x + (block.mlp.fc2(F.gelu(block.mlp.fc1(normed))) + self.beside_mlp(normed))


def adapt_tiny_vit_blocks(encoder: TinyVitEncoder, make: MakeAdapter) -> None:
    """Wrap every attention block; `make` builds adapters for positions (n, h, w, features)."""
    for stage in list(encoder.layers)[1:]:
        blocks: Any = stage.blocks
        for i, block in enumerate(blocks):
            blocks[i] = AdaptedTinyVitBlock(block, make)


def adapt_tiny_vit_convolutions(encoder: TinyVitEncoder, make: MakeAdapter) -> None:
    """Insert adapters after the convolutional first stage and on each of the three output levels.

    `make` builds adapters for maps (n, features, h, w).
    """
    first: Any = encoder.layers[0]
    first.blocks = WithAdapter(first.blocks, make(WIDTHS[0]))
    for level, lateral in enumerate(encoder.laterals):
        encoder.laterals[level] = WithAdapter(lateral, make(NECK_CHANNELS))
    # after the neck's last layer and not around the neck, whose attributes SAM 2 reads
    last = len(encoder.neck) - 1
    encoder.neck[last] = WithAdapter(encoder.neck[last], make(NECK_CHANNELS))
