"""Mask Refinement: from the mask decoder's features to a mask of the frame's size, coarse to fine.

SAM2Refiner paper (section "Mask Refinement"): a multi-scale cascade fuses mask features with hierarchical features of
the encoder. Here the encoder has seen the image twice, whole and in quarters (`localization_augment`), so that its
features reach down to stride 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn

from segment_anything_hq.nn.localization_augment import zeroed

Levels = tuple[Tensor, Tensor, Tensor, Tensor]
"""Features of strides 16, 8, 4 and 2: (B, C/2, s, s), (B, C/4, 2s, 2s), (B, C/8, 4s, 4s), (B, C/16, 8s, 8s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """What the frozen encoder makes of B frames and of their quarters; of a frame it is always the same.

    Attributes:
        frames: (B, 3, S, S).
        embedding: (B, C, s, s) of the whole frames, stride 16.
        middle: (B, C/4, 2s, 2s), stride 8.
        fine: (B, C/8, 4s, 4s), stride 4.
        local_embedding: (B, C, 2s, 2s) of the quarters, stitched: stride 8 of the frame.
        local_middle: (B, C/4, 4s, 4s), stride 4.
        local_fine: (B, C/8, 8s, 8s), stride 2.
    """

    frames: Tensor
    embedding: Tensor
    middle: Tensor
    fine: Tensor
    local_embedding: Tensor
    local_middle: Tensor
    local_fine: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFeatures:
    """What the mask decoder makes of p prompts.

    Attributes:
        image: (p, C, s, s) the image after it looked at the prompts.
        upscaled: (p, C/8, 4s, 4s) what masks are read from.
        logits: (p, 4s, 4s) of the mask.
    """

    image: Tensor
    upscaled: Tensor
    logits: Tensor


class MaskRefinement(nn.Module):
    """Adds detail to the mask decoder's logits at the frame's own size.

    What depends on the image alone is made once an image (`hierarchy`); a prompt costs the thin cascade only. The last
    convolution starts at zero: untrained, the mask is the decoder's, interpolated.

    Args:
        channels: C of the embedding, a multiple of 16.
        depth: residual blocks that the embedding goes through first.
    """

    def __init__(self, channels: int, *, depth: int) -> None:
        super().__init__()
        widths = [channels // factor for factor in (2, 4, 8, 16)]
        self.deep = nn.Sequential(*(ResidualBlock(channels) for _ in range(depth)))
        pixels = 3 * 4
        given = [channels, channels // 4 + channels, channels // 8 + channels // 4, channels // 8 + pixels]
        self.laterals = nn.ModuleList(
            nn.Conv2d(before, width, kernel_size=3, padding=1) for before, width in zip(given, widths, strict=True)
        )
        self.from_image = nn.Conv2d(channels, widths[0], kernel_size=1)
        self.from_mask = nn.Conv2d(channels // 8 + 1, widths[2], kernel_size=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for width in widths)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(before, after, kernel_size=2, stride=2) for before, after in pairwise(widths)
        )
        self.head = zeroed(nn.Conv2d(widths[-1], 4, kernel_size=3, padding=1))

    def hierarchy(self, views: Views, embedding: Tensor) -> Levels:
        """Features of the encoder for the cascade, once an image.

        Args:
            views: of the images.
            embedding: (B, C, s, s) as Localization Augment renewed it.
        """
        given = (
            self.deep(embedding),
            torch.cat([views.middle, views.local_embedding], 1),
            torch.cat([views.fine, views.local_middle], 1),
            torch.cat([views.local_fine, F.pixel_unshuffle(views.frames, 2)], 1),
        )
        one, two, four, eight = (lateral(level) for lateral, level in zip(self.laterals, given, strict=True))
        return one, two, four, eight

    def forward(self, mask: MaskFeatures, levels: Levels) -> Tensor:
        """Logits (p, S, S) of p prompts; `levels` have one row a prompt."""
        logits = mask.logits[:, None]
        x = self.blocks[0](levels[0] + self.from_image(mask.image))
        x = self.blocks[1](levels[1] + self.ups[0](x))
        # logits of 20 are as sure as those of 30
        read = torch.cat([mask.upscaled, torch.tanh(logits / 10).to(mask.upscaled.dtype)], 1)
        x = self.blocks[2](levels[2] + self.ups[1](x) + self.from_mask(read))
        x = self.blocks[3](levels[3] + self.ups[2](x))
        detail = F.pixel_shuffle(self.head(x), 2)
        return _enlarged(logits.float(), detail.shape[-1])[:, 0] + detail[:, 0].float()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a skip, each after a norm over channels and GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(channels), LayerNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same."""
        inner = self.conv1(F.gelu(self.norm1(x)))
        return x + self.conv2(F.gelu(self.norm2(inner)))


def _enlarged(logits: Tensor, side: int) -> Tensor:
    return F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
