"""What a segmenter of natural images takes and gives: embedded images, prompts of objects, masks of objects.

B images, P prompts; a prompt is all that is said of one object (points, a box, a mask). Prompts of several images are
one batch. S pixels a side of the frame that the image encoder sees, s = S / 16 positions a side of its embedding; the
low-resolution masks that go in and come out are 4s a side. Coordinates are XY in pixels of the frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfmedsam2.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of the three channels, of 0 to 1: what SAM and SAM 2 normalize images with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What an image encoder makes of B images, once for all of their prompts.

    Attributes:
        embedding: (B, 256, s, s), stride 16, as the mask decoder takes it (of SAM 2 marked as without memory).
        fine: (B, 32, 4s, 4s) stride 4, for SAM 2's mask decoder (through its conv_s0); None: SAM has none.
        middle: (B, 64, 2s, 2s) stride 8, likewise (through its conv_s1).
        early: features of the encoder's first stage, for refiners: of a ViT (B, C, s, s), of TinyViT
            (B, C, 4s, 4s), of SAM 2 its FPN's (B, 256, 4s, 4s).
        frames: (B, 3, S, S) as given to the encoder, for refiners that look at the picture again.
    """

    embedding: Tensor
    fine: Tensor | None = None
    middle: Tensor | None = None
    early: Tensor | None = None
    frames: Tensor | None = None

    def at(self, index: Tensor) -> Embedded:
        """Rows of the images (P,) named, repeated where an image is named twice."""
        return Embedded(
            embedding=self.embedding[index],
            fine=_rows(self.fine, index),
            middle=_rows(self.middle, index),
            early=_rows(self.early, index),
            frames=_rows(self.frames, index),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts of P objects; None leaves that kind out for all of them.

    Attributes:
        images: (P,) long, which image each prompt is of.
        points: (P, k, 2) XY in pixels of the frame, in the order of the clicks.
        point_labels: (P, k) 1 on the object, 0 off it, -1 no point (rows of fewer points are padded with these).
        boxes: (P, 4) XYXY in pixels of the frame.
        masks: (P, 4s, 4s) logits of an earlier or a coarse mask.

    Raises:
        UsageError: points without labels, labels without points, or not as many.
    """

    images: Tensor
    points: Tensor | None = None
    point_labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        points, labels = (None if t is None else tuple(t.shape) for t in (self.points, self.point_labels))
        if (None if points is None else points[:-1]) != labels:
            raise UsageError(
                "Every point needs a label", expected="1 on the object, 0 off it", found=f"{points} and {labels}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def at(self, index: Tensor | slice) -> PromptBatch:
        """The prompts named."""
        return PromptBatch(
            images=self.images[index],
            points=_rows(self.points, index),
            point_labels=_rows(self.point_labels, index),
            boxes=_rows(self.boxes, index),
            masks=_rows(self.masks, index),
        )

    def by_click_count(self) -> list[tuple[Tensor, PromptBatch]]:
        """The prompts in groups of equally many points, without padding: (rows (p,), their prompts).

        A decoder takes padding for a prompt of its own, so that rows of one tensor would depend on the longest of
        them. One group where all have as many, which is the rule.
        """
        if self.points is None or self.point_labels is None:
            return [(torch.arange(len(self), device=self.images.device), self)]
        given = self.point_labels >= 0
        order = torch.argsort((~given).long(), dim=1, stable=True)
        points = self.points.gather(1, order[..., None].expand(-1, -1, 2))
        labels = self.point_labels.gather(1, order)
        counts = given.sum(1)
        groups = []
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            chosen = PromptBatch(images=self.images[rows], boxes=_rows(self.boxes, rows), masks=_rows(self.masks, rows))
            if count:
                clicks = {"points": points[rows, :count], "point_labels": labels[rows, :count]}
                chosen = replace(chosen, **clicks)
            groups.append((rows, chosen))
        return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmented:
    """Masks of P prompts.

    Attributes:
        logits: (P, 4s, 4s) low-resolution mask logits: what the next interaction takes as its mask prompt.
        scores: (P,) predicted IoU.
        refined: (P, h, w) the method's final mask logits, where it has others than `logits`.
        extra: what the method's losses need besides (error maps ...), by name.
    """

    logits: Tensor
    scores: Tensor
    refined: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def final(self) -> Tensor:
        """Mask logits (P, h, w) to be judged and shown: those refined, where there are such."""
        return self.logits if self.refined is None else self.refined


@runtime_checkable
class Segmenter(Protocol):
    """A network that masks prompted objects; an `nn.Module`, of which only what is trained has gradients.

    Attributes:
        frame_size: S.
        channels: of the embedding; 256 but for the small sizes that tests use.
    """

    frame_size: int
    channels: int

    def normalize(self, images: Tensor) -> Tensor:
        """Frames (B, 3, S, S) of images (B, 3, h, w) of 0 to 255 that are already resized to at most S x S.

        What is missing is padded with zeros to the right and below, after normalizing, as SAM does.
        """
        ...

    def encode(self, frames: Tensor) -> Embedded:
        """Embed normalized frames (B, 3, S, S)."""
        ...

    def segment(self, embedded: Embedded, prompted: PromptBatch, *, previous: Segmented | None = None) -> Segmented:
        """Mask the prompted objects.

        Args:
            embedded: of the images.
            prompted: of P objects of these images, in any order.
            previous: what this method gave for the same P objects at the click before.
        """
        ...

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained; all else has no gradient."""
        ...


def _rows(tensor: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if tensor is None else tensor[index]


def normalized(images: Tensor, frame_size: int) -> Tensor:
    """Frames (B, 3, S, S) of images (B, 3, h, w) of 0 to 255, h and w at most S: SAM's and SAM 2's `normalize`."""
    images = images.float()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return padded((images / 255 - mean) / std, frame_size)


def padded(images: Tensor, frame_size: int) -> Tensor:
    """Frames (B, 3, S, S) of normalized images (B, 3, h, w), with zeros to the right and below."""
    return F.pad(images, (0, frame_size - images.shape[-1], 0, frame_size - images.shape[-2]))


def fitted_size(size: tuple[int, int], frame_size: int) -> tuple[int, int]:
    """(h, w) of an image of (H, W) in a frame of S a side: the longer side fills it, the rest is padded."""
    scale = frame_size / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def at_image_size(masks: Tensor, *, frame_size: int, resized: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Mask logits at an image's size.

    Args:
        masks: (P, h, w) of the whole frame, at any resolution.
        frame_size: S.
        resized: (h, w) that the image has in the frame, at the top left.
        size: (H, W) of the image.

    Returns:
        (P, H, W).
    """
    frame = F.interpolate(masks[:, None].float(), (frame_size, frame_size), mode="bilinear", align_corners=False)
    cut = frame[..., : resized[0], : resized[1]]
    return F.interpolate(cut, size, mode="bilinear", align_corners=False)[:, 0]
