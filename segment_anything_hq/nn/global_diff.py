"""GlobalDiff: refine SAM's mask with features of the whole image and the prompts (SAM-REF paper, section 3.3).

What depends on the image alone (its convolution, the upscaled embeddings) is computed once per image, not per prompt.
The paper does not specify normalization, kernel size or radius; they are taken from the works it cites (RITM's disks
of radius 5 at the resolution of the map, the basic block of He et al. 2016).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn

from rfmedsam2.nn.segmenter import Embedded, PromptBatch

WIDTH = 64
"""Channels of the fused features."""
REDUCED = 32
"""Channels of the features that the heads decode."""
RADIUS = 5.0
"""Radius of a click's disk, in pixels of the dense prompt map."""
STRIDE = 4
"""Frame pixels per pixel of the maps."""
FIRST_ERROR_RATE = 0.1
"""Initial weight of the detail map, small so that an untrained refiner hardly changes the mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMaps:
    """GlobalDiff's features of B images, shared by all of their prompts.

    Attributes:
        image: (B, 64, 4s, 4s), the image's contribution to the first fused features.
        semantics: N tensors (B, 64, 4s, 4s), SAM's embedding upscaled for each block.
    """

    image: Tensor
    semantics: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """A refiner's output for P masks (h x w pixels).

    Attributes:
        error: (P, h, w) logits of "the coarse mask is wrong here".
        mask: (P, h, w) logits of the refined mask.
    """

    error: Tensor
    mask: Tensor


class ResBasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut at one resolution, (P, width, h, w) -> the same (He et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Upscaler(nn.Module):
    """Upscale SAM's embedding (B, C, s, s) to the resolution of the maps, (B, 64, 4s, 4s).

    Args:
        channels: C.
        finer: also add SAM 2's feature maps of strides 8 and 4, as in its mask decoder. The paper does not describe
            this for SAM2-REF, but its larger parameter count suggests it.
    """

    def __init__(self, channels: int, *, finer: bool) -> None:
        super().__init__()
        half = 2 * WIDTH
        self.to_stride_8 = nn.ConvTranspose2d(channels, half, 2, stride=2)
        self.norm = LayerNorm2d(half)
        self.to_stride_4 = nn.ConvTranspose2d(half, WIDTH, 2, stride=2)
        self.middle = nn.Conv2d(channels // 4, half, 3, padding=1) if finer else None
        self.fine = nn.Conv2d(channels // 8, WIDTH, 3, padding=1) if finer else None

    def forward(self, embedded: Embedded) -> Tensor:
        """See the class."""
        x = self.to_stride_8(embedded.embedding)
        if self.middle is not None and embedded.middle is not None:
            x = x + self.middle(embedded.middle)
        x = self.to_stride_4(F.gelu(self.norm(x)))
        return x if self.fine is None or embedded.fine is None else x + self.fine(embedded.fine)


class ErrorDetailHeads(nn.Module):
    """Decode an error map and a detail map, which replaces the mask where the error map is high (eqs. 1 and 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, REDUCED, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(REDUCED)
        self.error = nn.Conv2d(REDUCED, 1, 1)
        self.detail = nn.Conv2d(REDUCED, 1, 1)
        assert self.error.bias is not None
        nn.init.zeros_(self.error.weight)
        nn.init.constant_(self.error.bias, log(FIRST_ERROR_RATE / (1 - FIRST_ERROR_RATE)))

    def forward(self, features: Tensor, coarse: Tensor) -> Refined:
        """Refine coarse logits (P, h, w) from features (P, C, h, w)."""
        x = F.relu(self.norm(self.reduce(features)))
        error, detail = self.error(x)[:, 0].float(), self.detail(x)[:, 0].float()
        return Refined(error=error, mask=blend_detail(coarse, error=error, detail=detail))


class GlobalDiff(nn.Module):
    """Fuse image and prompts, add SAM's embedding before each block, decode error and detail.

    Args:
        channels: C of SAM's embedding.
        finer: whether the embedding includes SAM 2's finer levels.
        blocks: N, the number of residual blocks.
    """

    def __init__(self, channels: int, *, finer: bool, blocks: int = 3) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, WIDTH, 7, stride=STRIDE, padding=3)
        self.prompts = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.upscalers = nn.ModuleList(Upscaler(channels, finer=finer) for _ in range(blocks))
        self.blocks = nn.ModuleList(ResBasicBlock(WIDTH) for _ in range(blocks))
        self.heads = ErrorDetailHeads(WIDTH)
        self.to(memory_format=torch.channels_last)  # 20 % faster on a CPU

    def images(self, embedded: Embedded) -> ImageMaps:
        """Compute the features that do not depend on prompts; `embedded.frames` must be set."""
        assert embedded.frames is not None
        return ImageMaps(
            image=self.image(embedded.frames),
            semantics=tuple(upscaler(embedded) for upscaler in self.upscalers),
        )

    def forward(self, maps: ImageMaps, prompt_map: Tensor, images: Tensor) -> tuple[Refined, Tensor]:
        """Refine the masks of P prompts.

        Args:
            maps: features of the images, from `images`.
            prompt_map: (P, 3, 4s, 4s), see `dense_prompt_map`.
            images: (P,) index of each prompt's image.

        Returns:
            Error and mask (P, 4s, 4s), and the fused features F_N (P, 64, 4s, 4s).
        """
        alone = len(maps.image) == 1
        features = self.prompts(prompt_map) + (maps.image if alone else maps.image[images])
        for block, semantics in zip(self.blocks, maps.semantics, strict=True):
            features = block(features + (semantics if alone else semantics[images]))
        return self.heads(features, prompt_map[:, 2]), features


def blend_detail(coarse: Tensor, *, error: Tensor, detail: Tensor) -> Tensor:
    """Sigmoid(E) * D + (1 - Sigmoid(E)) * C, all of one shape (SAM-REF paper, eq. 1)."""
    share = torch.sigmoid(error)
    return share * detail + (1 - share) * coarse


def dense_prompt_map(prompted: PromptBatch, coarse: Tensor, *, radius: float = RADIUS) -> Tensor:
    """Rasterize prompts to (P, 3, 4s, 4s): disks of positive and of negative clicks, and the coarse logits (P, 4s, 4s).

    A box, which the paper does not cover, is drawn as an outline in both of the first channels.
    """
    disks = coarse.new_zeros(len(coarse), 2, *coarse.shape[1:])
    across = torch.arange(coarse.shape[-1], device=coarse.device, dtype=torch.float32)
    down = torch.arange(coarse.shape[-2], device=coarse.device, dtype=torch.float32)
    if prompted.points is not None and prompted.point_labels is not None:
        x, y = in_map(prompted.points.float()).unbind(-1)
        near = (across - x[..., None]).square()[:, :, None] + (down - y[..., None]).square()[..., None] <= radius**2
        for channel, label in enumerate((1, 0)):
            disks[:, channel] = (near & (prompted.point_labels == label)[..., None, None]).any(1)
    if prompted.boxes is not None:
        x0, y0, x1, y1 = in_map(prompted.boxes.float())[..., None].unbind(1)
        columns, rows = (across >= x0 - 1) & (across <= x1 + 1), (down >= y0 - 1) & (down <= y1 + 1)
        inner_columns, inner_rows = (across > x0) & (across < x1), (down > y0) & (down < y1)
        line = (rows[..., None] & columns[:, None]) & ~(inner_rows[..., None] & inner_columns[:, None])
        disks = torch.maximum(disks, line[:, None].to(disks.dtype))
    return torch.cat([disks, coarse[:, None]], 1)


def in_map(pixels: Tensor) -> Tensor:
    """Convert positions in the frame to positions in the maps; integers are pixel centers in both."""
    return (pixels + 0.5) / STRIDE - 0.5
