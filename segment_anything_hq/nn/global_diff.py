"""GlobalDiff: the whole image and the prompts, looked at again to mend SAM's mask (SAM-REF paper, section 3.3).

What depends on the image alone (its convolution, the upscaled embeddings) is computed once an image, not a prompt.
The paper gives no normalization, kernel or radius: those here are of the works that it cites (RITM's disks of radius 5
at the resolution of the map, the basic block of He et al. 2016).
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
"""Channels that the heads decode."""
RADIUS = 5.0
STRIDE = 4
"""Pixels of the frame that a pixel of the maps stands for."""
FIRST_ERROR_RATE = 0.1
"""Share of the detail map before training: a refiner that has not learned yet leaves the mask nearly alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMaps:
    """What GlobalDiff makes of B images, for all of their prompts.

    Attributes:
        image: (B, 64, 4s, 4s), the image's own part of the first fused features.
        semantics: N times (B, 64, 4s, 4s), SAM's embeddings, upscaled for each block.
    """

    image: Tensor
    semantics: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """What a refiner makes of P masks (h x w pixels).

    Attributes:
        error: (P, h, w) logits of "the coarse mask is wrong here".
        mask: (P, h, w) logits, mended.
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
    """SAM's embedding (B, C, s, s) at the resolution of the maps, (B, 64, 4s, 4s).

    Args:
        channels: C.
        finer: SAM 2 has maps of strides 8 and 4 besides; they are added on the way up, as in its own mask decoder.
            The paper does not say so of SAM2-REF, but its larger number of parameters asks for such a part.
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
    """Features to an error map and a detail map, which replaces the mask where the error map says so (eqs. 1 and 2)."""

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
        """Mend the coarse logits (P, h, w) by features (P, C, h, w)."""
        x = F.relu(self.norm(self.reduce(features)))
        error, detail = self.error(x)[:, 0].float(), self.detail(x)[:, 0].float()
        return Refined(error=error, mask=mended(coarse, error=error, detail=detail))


class GlobalDiff(nn.Module):
    """Fuse image and prompts, add SAM's embedding before each block, decode error and detail.

    Args:
        channels: C of SAM's embedding.
        finer: whether the embedding comes with SAM 2's finer levels.
        blocks: N.
    """

    def __init__(self, channels: int, *, finer: bool, blocks: int = 3) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, WIDTH, 7, stride=STRIDE, padding=3)
        self.prompts = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.upscalers = nn.ModuleList(Upscaler(channels, finer=finer) for _ in range(blocks))
        self.blocks = nn.ModuleList(ResBasicBlock(WIDTH) for _ in range(blocks))
        self.heads = ErrorDetailHeads(WIDTH)
        self.to(memory_format=torch.channels_last)  # a fifth less time on a CPU

    def images(self, embedded: Embedded) -> ImageMaps:
        """What does not depend on prompts; `embedded` has its frames."""
        assert embedded.frames is not None
        return ImageMaps(
            image=self.image(embedded.frames),
            semantics=tuple(upscaler(embedded) for upscaler in self.upscalers),
        )

    def forward(self, maps: ImageMaps, prompt_map: Tensor, images: Tensor) -> tuple[Refined, Tensor]:
        """Mend the masks of P prompts.

        Args:
            maps: of the images.
            prompt_map: (P, 3, 4s, 4s), see `dense_prompt_map`.
            images: (P,) which image each prompt is of.

        Returns:
            Error and mask (P, 4s, 4s); the fused features F_N (P, 64, 4s, 4s).
        """
        alone = len(maps.image) == 1
        features = self.prompts(prompt_map) + (maps.image if alone else maps.image[images])
        for block, semantics in zip(self.blocks, maps.semantics, strict=True):
            features = block(features + (semantics if alone else semantics[images]))
        return self.heads(features, prompt_map[:, 2]), features


def mended(coarse: Tensor, *, error: Tensor, detail: Tensor) -> Tensor:
    """Sigmoid(E) * D + (1 - Sigmoid(E)) * C, all of one shape (SAM-REF paper, eq. 1)."""
    share = torch.sigmoid(error)
    return share * detail + (1 - share) * coarse


def dense_prompt_map(prompted: PromptBatch, coarse: Tensor, *, radius: float = RADIUS) -> Tensor:
    """The prompts as an image (P, 3, 4s, 4s): disks of clicks on and off the object, coarse logits (P, 4s, 4s).

    A box, which the paper leaves to others, is drawn as a line in both of the first channels.
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
    """Positions in the frame as positions in the maps, both from center of pixel to center of pixel."""
    return (pixels + 0.5) / STRIDE - 0.5
