"""Large-scale jitter and flips of images with the mask of an object, as HQ-SAM and SAM2Refiner are trained with.

An image is made 0.1 to 2 times as large as the frame, a random part of it is cut out or the rest of the frame is gray.
Everything is drawn from a generator that is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rfmedsam2.errors import ImageError, UsageError

GRAY = 128
"""Of the frame where there is no image, as in HQ-SAM's training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """How images are changed.

    Attributes:
        scale_range: least and greatest length of an image's longer side, over the frame's.
        flip: how often left and right are swapped.
        flip_vertically: how often top and bottom are; the published training never does.
        gray: value of the frame where there is no image.
        least: pixels of the object that must be seen, or all that the image has where those are fewer.
        attempts: how often another part is drawn, until the image is taken whole at the frame's size.
    """

    scale_range: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    flip_vertically: float = 0.0
    gray: int = GRAY
    least: int = 16
    attempts: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise UsageError(
                "scale_range must be (smallest, largest)",
                expected="0 < smallest <= largest",
                found=str(self.scale_range),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where an image comes to lie on a frame.

    Attributes:
        height: of the scaled image, pixels.
        width: likewise.
        top: first row of it that is seen.
        left: first column.
        flips: axes of the image, from the last, that are swapped first.
    """

    height: int
    width: int
    top: int
    left: int
    flips: tuple[int, ...]


def jittered(image: Tensor, mask: Tensor, *, size: int, jitter: Jitter, rng: Generator) -> tuple[Tensor, Tensor]:
    """Draw one frame from an image.

    Args:
        image: (3, H, W) uint8.
        mask: (H, W) bool, the object, not empty.
        size: S of the frame.
        jitter: how.
        rng: on the CPU.

    Returns:
        The frame (3, S, S) uint8, and the object on it (S, S) bool, not empty.

    Raises:
        ImageError: a mask of another size than the image, or an empty one.
    """
    _check(image, mask)
    placement = chosen(mask, size=size, jitter=jitter, rng=rng)
    return placed_image(image, placement, size=size, gray=jitter.gray), placed_object(mask, placement, size)


def chosen(mask: Tensor, *, size: int, jitter: Jitter, rng: Generator) -> Placement:
    """Draw a placement that shows the object (H, W): the first such of some, else the whole image."""
    for _ in range(jitter.attempts):
        placement = drawn((mask.shape[0], mask.shape[1]), size, jitter=jitter, rng=rng)
        if int(placed_mask(mask, placement, size).sum()) >= min(jitter.least, int(mask.sum())):
            return placement
    return whole((mask.shape[0], mask.shape[1]), size)


def fitted(image: Tensor, mask: Tensor, *, size: int, gray: int = GRAY) -> tuple[Tensor, Tensor]:
    """The whole image (3, H, W) and mask (H, W), made as large as the frame, at its top left.

    Raises:
        ImageError: a mask of another size than the image, or an empty one.
    """
    _check(image, mask)
    placement = whole((mask.shape[0], mask.shape[1]), size)
    return placed_image(image, placement, size=size, gray=gray), placed_object(mask, placement, size)


def whole(image_size: tuple[int, int], size: int) -> Placement:
    """An image of this (H, W) as large as the frame, at its top left."""
    return _scaled(image_size, size, 1.0)


def placed_object(mask: Tensor, placement: Placement, size: int) -> Tensor:
    """`placed_mask` of an object that must not vanish.

    Of few pixels of a large image, it is where they fall, whatever their share of a pixel.
    """
    seen = placed_mask(mask, placement, size)
    if seen.any():
        return seen
    flipped = mask.flip(placement.flips)[None].float()
    touched = F.adaptive_max_pool2d(flipped, (placement.height, placement.width))
    return _cut(touched, placement, size=size, fill=0)[0] > 0


def drawn(image_size: tuple[int, int], size: int, *, jitter: Jitter, rng: Generator) -> Placement:
    """A random placement of an image of this (H, W) on a frame of `size` pixels a side."""
    draws = torch.rand(5, dtype=torch.float64, generator=rng).tolist()
    smallest, largest = jitter.scale_range
    scale = smallest + (largest - smallest) * draws[0]
    scaled = _scaled(image_size, size, scale)
    top, left = (
        int(draw * (max(0, extent - size) + 1))
        for draw, extent in zip(draws[1:3], (scaled.height, scaled.width), strict=True)
    )
    flips = [
        axis
        for axis, draw, share in ((-1, draws[3], jitter.flip), (-2, draws[4], jitter.flip_vertically))
        if draw < share
    ]
    return Placement(height=scaled.height, width=scaled.width, top=top, left=left, flips=tuple(flips))


def placed_image(image: Tensor, placement: Placement, *, size: int, gray: int) -> Tensor:
    """The part of an image (3, H, W) uint8 that a frame (3, S, S) uint8 shows."""
    scaled = _resized(image.flip(placement.flips), placement)
    return _cut(scaled, placement, size=size, fill=gray)


def placed_mask(mask: Tensor, placement: Placement, size: int) -> Tensor:
    """The same of a mask (H, W) of bool: pixels of which the object has half or more."""
    scaled = _resized(mask.flip(placement.flips)[None].to(torch.uint8) * 255, placement)
    return _cut(scaled, placement, size=size, fill=0)[0] >= 128


def _scaled(image_size: tuple[int, int], size: int, scale: float) -> Placement:
    """The image at its place, its longer side `scale` times the frame's."""
    factor = scale * size / max(image_size)
    rows, columns = (max(1, round(extent * factor)) for extent in image_size)
    return Placement(height=rows, width=columns, top=0, left=0, flips=())


def _resized(image: Tensor, placement: Placement) -> Tensor:
    size = (placement.height, placement.width)
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


def _cut(scaled: Tensor, placement: Placement, *, size: int, fill: int) -> Tensor:
    part = scaled[:, placement.top : placement.top + size, placement.left : placement.left + size]
    return F.pad(part, (0, size - part.shape[2], 0, size - part.shape[1]), value=fill)


def _check(image: Tensor, mask: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        found = f"{image.dtype} of shape {tuple(image.shape)}"
        raise ImageError("An image has red, green and blue", expected="uint8 of shape (3, H, W)", found=found)
    if image.shape[1:] != mask.shape:
        raise ImageError(
            "A mask is not as large as its image", expected=tuple(image.shape[1:]), found=tuple(mask.shape)
        )
    if not mask.any():
        raise ImageError("A mask without an object cannot be trained on", remedy="Leave its image out")
