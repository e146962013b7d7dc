"""Mask Refinement: a coarse-to-fine cascade from the mask decoder's features to a mask at frame resolution.

SAM2Refiner paper (section "Mask Refinement"): a multi-scale cascade fuses mask features with hierarchical features of
the encoder. Here the encoder runs on the whole image and on its quarters (`localization_augment`), so that features
down to stride 2 are available.
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
    """Features of the frozen encoder for B frames and their quarters; they can be cached.

    Attributes:
        frames: (B, 3, S, S).
        embedding: (B, C, s, s) of the whole frames, stride 16.
        middle: (B, C/4, 2s, 2s), stride 8.
        fine: (B, C/8, 4s, 4s), stride 4.
        local_embedding: (B, C, 2s, 2s) of the quarters, stitched: stride 8 in the frame.
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
    """The mask decoder's features for p prompts.

    Attributes:
        image: (p, C, s, s) image embedding after attention to the prompts.
        upscaled: (p, C/8, 4s, 4s) upscaled embedding from which masks are computed.
        logits: (p, 4s, 4s) logits of the mask.
    """

    image: Tensor
    upscaled: Tensor
    logits: Tensor


class MaskRefinement(nn.Module):
    """Add detail to the mask decoder's logits at frame resolution.

    What depends on the image alone is computed once per image (`hierarchy`); each prompt runs only the narrow cascade.
    The last convolution is zero-initialized: untrained, the result is the decoder's mask, interpolated.

    Args:
        channels: C, channels of the embedding, a multiple of 16.
        depth: number of residual blocks applied to the embedding.
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
        """Features of the encoder for the cascade, computed once per image.

        Args:
            views: encoder features of the images.
            embedding: (B, C, s, s) as updated by Localization Augment.
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
        """Logits (p, S, S) of p prompts; `levels` have one row per prompt."""
        logits = mask.logits[:, None]
        x = self.blocks[0](levels[0] + self.from_image(mask.image))
        x = self.blocks[1](levels[1] + self.ups[0](x))
        # saturates: logits of 20 and of 30 both mean certainty
        read = torch.cat([mask.upscaled, torch.tanh(logits / 10).to(mask.upscaled.dtype)], 1)
        x = self.blocks[2](levels[2] + self.ups[1](x) + self.from_mask(read))
        x = self.blocks[3](levels[3] + self.ups[2](x))
        detail = F.pixel_shuffle(self.head(x), 2)
        return _enlarged(logits.float(), detail.shape[-1])[:, 0] + detail[:, 0].float()


class ResidualBlock(nn.Module):
    """Residual block of two 3x3 convolutions, each preceded by LayerNorm over channels and GELU."""

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
