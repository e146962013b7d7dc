"""Large-scale jitter and flips of images with the mask of an object, as HQ-SAM and SAM2Refiner are trained with.

The image is scaled to 0.1 to 2 times the frame; a larger one is cropped at random, a smaller one is padded with gray.
All random numbers come from the generator passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rfmedsam2.errors import ImageError, UsageError

GRAY = 128
"""Padding value of the frame, as in HQ-SAM's training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """Parameters of the jitter.

    Attributes:
        scale_range: smallest and largest length of the image's longer side, as a multiple of the frame's side.
        flip: probability of a left-right flip.
        flip_vertically: probability of a top-bottom flip; 0 in the published training.
        gray: padding value of the frame.
        min_visible_pixels: object pixels a crop must keep, or all of them if the object has fewer.
        attempts: crops tried before the whole image is used at the frame's size.
    """

    scale_range: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    flip_vertically: float = 0.0
    gray: int = GRAY
    min_visible_pixels: int = 16
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
    """Where an image lies on a frame.

    Attributes:
        height: height of the scaled image, pixels.
        width: width of the scaled image, pixels.
        top: first visible row of the scaled image.
        left: first visible column of the scaled image.
        flips: negative axes of the image that are flipped before scaling.
    """

    height: int
    width: int
    top: int
    left: int
    flips: tuple[int, ...]


def jitter_image(image: Tensor, mask: Tensor, *, size: int, jitter: Jitter, rng: Generator) -> tuple[Tensor, Tensor]:
    """Draw one jittered frame from an image.

    Args:
        image: (3, H, W) uint8.
        mask: (H, W) bool, the object, not empty.
        size: side length S of the frame, pixels.
        jitter: parameters of the jitter.
        rng: generator on the CPU.

    Returns:
        The frame (3, S, S) uint8, and the object on it (S, S) bool, not empty.

    Raises:
        ImageError: the mask is empty or has another size than the image.
    """
    _check(image, mask)
    placement = draw_visible_placement(mask, size=size, jitter=jitter, rng=rng)
    return place_image(image, placement, size=size, gray=jitter.gray), place_object(mask, placement, size)


def draw_visible_placement(mask: Tensor, *, size: int, jitter: Jitter, rng: Generator) -> Placement:
    """Draw placements until one shows enough of the object (H, W); the whole image after `attempts` failures."""
    for _ in range(jitter.attempts):
        placement = draw_placement((mask.shape[0], mask.shape[1]), size, jitter=jitter, rng=rng)
        if int(place_mask(mask, placement, size).sum()) >= min(jitter.min_visible_pixels, int(mask.sum())):
            return placement
    return full_placement((mask.shape[0], mask.shape[1]), size)


def fit_image(image: Tensor, mask: Tensor, *, size: int, gray: int = GRAY) -> tuple[Tensor, Tensor]:
    """Scale an image (3, H, W) and its mask (H, W) to fit the frame, top left, without jitter.

    Raises:
        ImageError: the mask is empty or has another size than the image.
    """
    _check(image, mask)
    placement = full_placement((mask.shape[0], mask.shape[1]), size)
    return place_image(image, placement, size=size, gray=gray), place_object(mask, placement, size)


def full_placement(image_size: tuple[int, int], size: int) -> Placement:
    """The placement that fits an image of this (H, W) into the frame, top left."""
    return _scaled(image_size, size, 1.0)


def place_object(mask: Tensor, placement: Placement, size: int) -> Tensor:
    """Place a mask like `place_mask`, but never lose the object.

    An object too small to fill half a pixel anywhere keeps every pixel that it touches.
    """
    seen = place_mask(mask, placement, size)
    if seen.any():
        return seen
    flipped = mask.flip(placement.flips)[None].float()
    touched = F.adaptive_max_pool2d(flipped, (placement.height, placement.width))
    return _cut(touched, placement, size=size, fill=0)[0] > 0


def draw_placement(image_size: tuple[int, int], size: int, *, jitter: Jitter, rng: Generator) -> Placement:
    """A random placement of an image of this (H, W) on a frame with sides of `size` pixels."""
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


def place_image(image: Tensor, placement: Placement, *, size: int, gray: int) -> Tensor:
    """Scale, flip and crop an image (3, H, W) uint8 to a frame (3, S, S) uint8, padded with `gray`."""
    scaled = _resized(image.flip(placement.flips), placement)
    return _cut(scaled, placement, size=size, fill=gray)


def place_mask(mask: Tensor, placement: Placement, size: int) -> Tensor:
    """The same for a mask (H, W) bool: a frame pixel is set where the object covers at least half of it."""
    scaled = _resized(mask.flip(placement.flips)[None].to(torch.uint8) * 255, placement)
    return _cut(scaled, placement, size=size, fill=0)[0] >= 128


def _scaled(image_size: tuple[int, int], size: int, scale: float) -> Placement:
    """The image top left, its longer side `scale` times the frame's."""
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
        raise ImageError("Expected an RGB image", expected="uint8 of shape (3, H, W)", found=found)
    if image.shape[1:] != mask.shape:
        raise ImageError(
            "The mask has another size than its image", expected=tuple(image.shape[1:]), found=tuple(mask.shape)
        )
    if not mask.any():
        raise ImageError("The mask is empty, so there is nothing to train on", remedy="Leave this image out")
