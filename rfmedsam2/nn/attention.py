"""Sine position encodings, and a transformer block for feature maps that starts as the identity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 32
"""Channels per attention head, if they divide evenly."""


class TransformerBlock(nn.Module):
    """Self-attention among all positions of feature maps, then an MLP, each with a skip connection.

    The position encoding is added to queries and keys only. The last layers of both branches start at zero, so the
    block starts as the identity and can be inserted into a trained network.

    Shapes:
        (B, features, ...spatial) -> the same, for any number of spatial axes.
    """

    def __init__(self, features: int, *, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.attention = nn.MultiheadAttention(features, heads_of(features), batch_first=True)
        self.norm2 = nn.LayerNorm(features)
        self.widen = nn.Linear(features, mlp_ratio * features)
        self.narrow = nn.Linear(mlp_ratio * features, features)
        for last in (self.attention.out_proj, self.narrow):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps of the same shape."""
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.norm1(tokens)
        placed = normed + sine_positions(x.shape[2:], x.shape[1], device=x.device).to(normed.dtype)
        tokens = tokens + self.attention(placed, placed, normed, need_weights=False)[0]
        tokens = tokens + self.narrow(F.gelu(self.widen(self.norm2(tokens))))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def heads_of(features: int) -> int:
    """Number of attention heads: the most that divide the features, each of at least `HEAD_WIDTH` channels."""
    return max((n for n in range(1, features // HEAD_WIDTH + 1) if features % n == 0), default=1)


def sine_positions(
    size: Sequence[int], channels: int, *, device: torch.device | str | None = None, temperature: float = 10000.0
) -> Tensor:
    """Encode the positions of a grid by sines and cosines of their indices; without parameters.

    Args:
        size: positions along each axis.
        channels: channels of the encoding, divided evenly among the axes; remaining channels are zero.
        device: device of the result.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        (product of `size`, channels) float32, the last axis running fastest.
    """
    half = channels // (2 * len(size))
    rates = temperature ** (-torch.arange(half, dtype=torch.float32, device=device) / max(half, 1))
    parts = []
    for axis, count in enumerate(size):
        angles = torch.arange(count, dtype=torch.float32, device=device)[:, None] * rates
        encoded = torch.cat([angles.sin(), angles.cos()], 1)
        others = [1] * len(size)
        others[axis] = count
        parts.append(encoded.view(*others, 2 * half).expand(*size, 2 * half))
    rest = channels - 2 * half * len(size)
    parts.append(torch.zeros(*size, rest, device=device))
    return torch.cat(parts, -1).flatten(0, -2)
