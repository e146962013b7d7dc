"""Localization Augment: the embedding of an image looks at those of its four quarters, seen at twice the size.

SAM2Refiner paper (section "Localization Augment"; supplement, section 2.2): four non-overlapping sub-images are
up-sampled to the input's size and go through the frozen encoder in one batch with the image; cross-attention from the
whole image to the parts, among features of few channels, renews the embedding.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 32
"""Channels an attention head."""
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def sub_images(frames: Tensor) -> Tensor:
    """The four quarters of frames (B, 3, S, S), each up-sampled to S x S: (4B, 3, S, S), row by row of each frame."""
    side = frames.shape[-1]
    quarters = frames.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return F.interpolate(quarters, (side, side), mode="bilinear", align_corners=False)


def stitched(maps: Tensor) -> Tensor:
    """Maps (4B, C, h, w) of sub-images, put together where they were in their frames: (B, C, 2h, 2w)."""
    parts = maps.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    return parts.flatten(4, 5).flatten(2, 3)


class LocalizationAugment(nn.Module):
    """Renews an embedding by cross-attention to the stitched embedding of its sub-images.

    All its branches end in zeros: untrained, it gives back the embedding as it is.

    Args:
        channels: C of the embedding.
        layers: how often the embedding looks.
        reduction: C over the channels that are attended with.
        widening: hidden features of the MLPs over C.
    """

    def __init__(self, channels: int, *, layers: int, reduction: int, widening: int) -> None:
        super().__init__()
        self.norm_local = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(
            LocalAttention(channels, channels // reduction, widening * channels) for _ in range(layers)
        )

    def forward(self, embedding: Tensor, local: Tensor, *, places: Tensor, local_places: Tensor) -> Tensor:
        """Renewed embedding.

        Args:
            embedding: (B, C, s, s).
            local: (B, C, t, t), over the same frame.
            places: (s * s, C) encoded positions of the embedding, row by row.
            local_places: (t * t, C) the same of `local`.
        """
        x = embedding.flatten(2).transpose(1, 2)
        looked_at = self.norm_local(local.flatten(2).transpose(1, 2))
        for layer in self.layers:
            x = layer(x, looked_at, places=places, other_places=local_places)
        return x.transpose(1, 2).unflatten(2, embedding.shape[2:])


class LocalAttention(nn.Module):
    """Cross-attention at a reduced width, then an MLP, each beside a skip and each ending in zeros.

    Args:
        channels: C of what goes in and out.
        width: channels that are attended with.
        hidden: features of the MLP.
    """

    def __init__(self, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        self.norm_query = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, width)
        self.key = nn.Linear(channels, width)
        self.value = nn.Linear(channels, width)
        self.out = zeroed(nn.Linear(width, channels))
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, hidden)
        self.narrow = zeroed(nn.Linear(hidden, channels))

    def forward(self, x: Tensor, looked_at: Tensor, *, places: Tensor, other_places: Tensor) -> Tensor:
        """(B, n, C), looking at (B, m, C) that are normed already; places (n, C) and (m, C)."""
        query, key = self.query(self.norm_query(x) + places), self.key(looked_at + other_places)
        x = x + self.out(attend(query, key, self.value(looked_at)))
        return x + self.narrow(F.gelu(self.widen(self.norm(x))))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by heads of `HEAD_WIDTH` channels: (B, n, d) to (B, m, d) gives (B, n, d)."""
    heads = max(1, query.shape[-1] // HEAD_WIDTH)
    query, key, value = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def zeroed(layer: Layer) -> Layer:
    """The layer, giving zeros until it is trained."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def grid_positions(side: int, frame_size: int, device: torch.device) -> Tensor:
    """Centers (side * side, 2) XY in pixels of a frame of the positions of a map over it, row by row."""
    line = (torch.arange(side, device=device) + 0.5) * (frame_size / side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)
