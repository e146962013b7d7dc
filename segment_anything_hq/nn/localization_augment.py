"""Localization Augment: cross-attention from an image's embedding to those of its four quarters, enlarged two times.

SAM2Refiner paper (section "Localization Augment"; supplement, section 2.2): four non-overlapping sub-images are
up-sampled to the input's size and go through the frozen encoder in one batch with the image; cross-attention from the
whole image to the parts, at a reduced number of channels, updates the embedding.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 32
"""Channels per attention head."""
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def sub_images(frames: Tensor) -> Tensor:
    """Cut frames (B, 3, S, S) into quarters up-sampled to S x S: (4B, 3, S, S), in row-major order per frame."""
    side = frames.shape[-1]
    quarters = frames.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return F.interpolate(quarters, (side, side), mode="bilinear", align_corners=False)


def stitched(maps: Tensor) -> Tensor:
    """Join maps (4B, C, h, w) of sub-images at their places in the frames: (B, C, 2h, 2w)."""
    parts = maps.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    return parts.flatten(4, 5).flatten(2, 3)


class LocalizationAugment(nn.Module):
    """Update an embedding by cross-attention to the stitched embedding of its sub-images.

    All branches end in zero-initialized layers: untrained, it returns the embedding unchanged.

    Args:
        channels: C, channels of the embedding.
        layers: number of cross-attention layers.
        reduction: C divided by the channels of the attention.
        widening: hidden features of the MLPs divided by C.
    """

    def __init__(self, channels: int, *, layers: int, reduction: int, widening: int) -> None:
        super().__init__()
        self.norm_local = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(
            LocalAttention(channels, channels // reduction, widening * channels) for _ in range(layers)
        )

    def forward(self, embedding: Tensor, local: Tensor, *, places: Tensor, local_places: Tensor) -> Tensor:
        """Return the updated embedding (B, C, s, s).

        Args:
            embedding: (B, C, s, s).
            local: (B, C, t, t), stitched embedding over the same frame.
            places: (s * s, C) encoded positions of `embedding` in row-major order.
            local_places: (t * t, C) encoded positions of `local`.
        """
        x = embedding.flatten(2).transpose(1, 2)
        looked_at = self.norm_local(local.flatten(2).transpose(1, 2))
        for layer in self.layers:
            x = layer(x, looked_at, places=places, other_places=local_places)
        return x.transpose(1, 2).unflatten(2, embedding.shape[2:])


class LocalAttention(nn.Module):
    """Cross-attention at a reduced width, then an MLP, both residual and zero-initialized at their end.

    Args:
        channels: C, channels of input and output.
        width: channels of the attention.
        hidden: hidden features of the MLP.
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
        """Attend from x (B, n, C) to normalized features (B, m, C); encoded positions are (n, C) and (m, C)."""
        query, key = self.query(self.norm_query(x) + places), self.key(looked_at + other_places)
        x = x + self.out(attend(query, key, self.value(looked_at)))
        return x + self.narrow(F.gelu(self.widen(self.norm(x))))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head attention with `HEAD_WIDTH` channels per head, from (B, n, d) to (B, m, d), giving (B, n, d)."""
    heads = max(1, query.shape[-1] // HEAD_WIDTH)
    query, key, value = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def zeroed(layer: Layer) -> Layer:
    """Set the layer's weights and bias to zero; return it."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def grid_positions(side: int, frame_size: int, device: torch.device) -> Tensor:
    """Centers (side * side, 2), XY in frame pixels, of the positions of a map over the frame, in row-major order."""
    line = (torch.arange(side, device=device) + 0.5) * (frame_size / side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)
