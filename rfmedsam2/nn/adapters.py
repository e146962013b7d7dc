"""Adapters: small trainable parts beside frozen ones (RFMedSAM 2 paper, section 3.3.3, Fig. 4(3), appendix C).

An adapter's output is added at its site. Its last projection starts at zero, so an adapted model equals the original
one bit for bit until it is trained.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """The original adapter, for tokens (Fig. 4(3a)): linear down, GELU, linear up.

    Shapes:
        (..., features) -> (..., features).
    """

    def __init__(self, features: int, *, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = hidden_width(features, ratio)
        self.down = nn.Linear(features, hidden)
        self.up = _zero(nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> Tensor:
        """The term to add to x."""
        return self.up(F.gelu(self.down(x)))


class DWConvAdapter(nn.Module):
    """Adapter for attention blocks over image positions (Fig. 4(3b)).

    Linear down; depth-wise 3x3 convolution, layer norm and GELU with a parallel skip; linear up.

    Shapes:
        (n, h, w, features) -> (n, h, w, features).
    """

    def __init__(self, features: int, *, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = hidden_width(features, ratio)
        self.down = nn.Linear(features, hidden)
        self.spatial = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.norm = nn.LayerNorm(hidden)
        self.up = _zero(nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> Tensor:
        """The term to add to x."""
        x = self.down(x)
        # a view: the convolution runs in channels-last layout without a copy
        spatial = self.spatial(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.up(x + F.gelu(self.norm(spatial)))


class CNNAdapter(nn.Module):
    """Adapter for convolutions: point-wise down, depth-wise 3x3 convolution, layer norm, GELU, point-wise up (app. C).

    The parallel skip is the sum at its site.

    Shapes:
        (n, features, h, w) -> (n, features, h, w).
    """

    def __init__(self, features: int, *, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = hidden_width(features, ratio)
        self.down = nn.Conv2d(features, hidden, kernel_size=1)
        self.spatial = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.norm = nn.LayerNorm(hidden)
        self.up = _zero(nn.Conv2d(hidden, features, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """The term to add to x."""
        x = self.spatial(self.down(x)).permute(0, 2, 3, 1)
        return self.up(F.gelu(self.norm(x)).permute(0, 3, 1, 2))


class ChannelAdapter(nn.Module):
    """Modalities of a medical image -> the three channels that SAM 2 expects (appendix D.1).

    Two convolutions with `hidden` channels in between (an inverted bottleneck), added to a fixed mapping: three
    channels unchanged, one channel repeated, otherwise the mean repeated. The second convolution starts at zero, so
    that the output initially equals the fixed mapping.

    Shapes:
        (n, channels, h, w) -> (n, 3, h, w).
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.channels = channels
        self.widen = nn.Conv2d(channels, hidden, kernel_size=3, padding=1)
        self.narrow = _zero(nn.Conv2d(hidden, 3, kernel_size=3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w)."""
        start = x if self.channels == 3 else x.mean(1, keepdim=True)
        return start + self.narrow(F.gelu(self.widen(x)))


class WithAdapter(nn.Module):
    """A module followed by an adapter: its output x becomes x + adapter(x)."""

    def __init__(self, original: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output of the module."""
        return adapted(self.original(x), self.adapter)


def hidden_width(features: int, ratio: float) -> int:
    """Width of a bottleneck, at least 1."""
    return max(1, int(features * ratio))


def adapted(x: Tensor, adapter: nn.Module | None) -> Tensor:
    """Return x + adapter(x), or x itself if there is no adapter."""
    return x if adapter is None else x + adapter(x)


def on_positions(adapter: nn.Module, tokens: Tensor) -> Tensor:
    """Run an adapter for positions on tokens (n, h*w, features) of square maps; the term to add, as tokens."""
    side = math.isqrt(tokens.shape[1])
    return adapter(tokens.unflatten(1, (side, side))).flatten(1, 2)


def adapted_positions(tokens: Tensor, adapter: nn.Module | None) -> Tensor:
    """`adapted` for tokens (n, h*w, features) of square maps and an adapter for positions (n, h, w, features)."""
    return tokens if adapter is None else tokens + on_positions(adapter, tokens)


def _zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Set weights and bias to zero, so that nothing is added until they are trained."""
    with torch.no_grad():
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    return layer
