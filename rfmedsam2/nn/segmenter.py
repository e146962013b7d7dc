"""Interface of promptable segmenters: image embeddings, prompts and masks of objects.

B images, P prompts; a prompt consists of everything given for one object (points, a box, a mask). Prompts of several
images form one batch. S is the side length of the image encoder's input frame, s = S / 16 that of its embedding;
low-resolution masks (input and output) are 4s x 4s. Coordinates are (x, y) in pixels of the frame.
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
    """Embeddings of B images, computed once for all their prompts.

    Attributes:
        embedding: (B, 256, s, s), stride 16, input of the mask decoder (for SAM 2 with the no-memory embedding).
        fine: (B, 32, 4s, 4s) stride 4, for SAM 2's mask decoder (after its conv_s0); None for SAM.
        middle: (B, 64, 2s, 2s) stride 8, for SAM 2's mask decoder (after its conv_s1); None for SAM.
        early: features of the encoder's first stage, for refiners: of a ViT (B, C, s, s), of TinyViT
            (B, C, 4s, 4s), of SAM 2 its FPN's (B, 256, 4s, 4s).
        frames: (B, 3, S, S), input of the encoder, for refiners that use the image again.
    """

    embedding: Tensor
    fine: Tensor | None = None
    middle: Tensor | None = None
    early: Tensor | None = None
    frames: Tensor | None = None

    def at(self, index: Tensor) -> Embedded:
        """Select images by index (P,), with repetition."""
        return Embedded(
            embedding=self.embedding[index],
            fine=_rows(self.fine, index),
            middle=_rows(self.middle, index),
            early=_rows(self.early, index),
            frames=_rows(self.frames, index),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts of P objects; None: no prompts of this kind for any of them.

    Attributes:
        images: (P,) long, index of each prompt's image.
        points: (P, k, 2) XY in pixels of the frame, in the order of the clicks.
        point_labels: (P, k) 1 on the object, 0 off it, -1 no point (rows of fewer points are padded with these).
        boxes: (P, 4) XYXY in pixels of the frame.
        masks: (P, 4s, 4s) logits of an earlier or a coarse mask.

    Raises:
        UsageError: points and labels differ in number, or one is missing.
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
        """Select prompts by index."""
        return PromptBatch(
            images=self.images[index],
            points=_rows(self.points, index),
            point_labels=_rows(self.point_labels, index),
            boxes=_rows(self.boxes, index),
            masks=_rows(self.masks, index),
        )

    def by_click_count(self) -> list[tuple[Tensor, PromptBatch]]:
        """Group prompts by their number of points, without padding: (rows (p,), their prompts).

        A decoder treats padding points as prompts, so results would depend on the longest prompt of the batch. Usually
        there is one group, because all prompts have the same number of points.
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
        logits: (P, 4s, 4s) low-resolution mask logits, used as mask prompts of the next interaction.
        scores: (P,) predicted IoU.
        refined: (P, h, w) final mask logits, if the method has others than `logits`.
        extra: other outputs that the method's losses need (error maps ...), by name.
    """

    logits: Tensor
    scores: Tensor
    refined: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def final(self) -> Tensor:
        """Final mask logits (P, h, w): `refined` if given, else `logits`."""
        return self.logits if self.refined is None else self.refined


@runtime_checkable
class Segmenter(Protocol):
    """A network that segments prompted objects; an `nn.Module` in which only trainable parameters get gradients.

    Attributes:
        frame_size: S, side length of the frames.
        channels: channels of the embedding; 256 except for the small sizes used in tests.
    """

    frame_size: int
    channels: int

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images (B, 3, h, w), 0 to 255, already resized to at most S x S, to frames (B, 3, S, S).

        Padded with zeros on the right and below after normalization, as in SAM.
        """
        ...

    def encode(self, frames: Tensor) -> Embedded:
        """Embed normalized frames (B, 3, S, S)."""
        ...

    def segment(self, embedded: Embedded, prompted: PromptBatch, *, previous: Segmented | None = None) -> Segmented:
        """Segment the prompted objects.

        Args:
            embedded: embeddings of the images.
            prompted: prompts of P objects of these images, in any order.
            previous: result of this method for the same P objects at the previous click.
        """
        ...

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters; all others have no gradient."""
        ...


def _rows(tensor: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if tensor is None else tensor[index]


def normalized(images: Tensor, frame_size: int) -> Tensor:
    """Normalize images (B, 3, h, w), 0 to 255, h and w at most S, to frames (B, 3, S, S), as SAM and SAM 2 do."""
    images = images.float()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return padded((images / 255 - mean) / std, frame_size)


def padded(images: Tensor, frame_size: int) -> Tensor:
    """Pad normalized images (B, 3, h, w) to frames (B, 3, S, S) with zeros on the right and below."""
    return F.pad(images, (0, frame_size - images.shape[-1], 0, frame_size - images.shape[-2]))


def fitted_size(size: tuple[int, int], frame_size: int) -> tuple[int, int]:
    """Size (h, w) of an image (H, W) resized into a frame of side S: the longer side becomes S."""
    scale = frame_size / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def at_image_size(masks: Tensor, *, frame_size: int, resized: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Mask logits at an image's size.

    Args:
        masks: (P, h, w) logits of the whole frame, at any resolution.
        frame_size: S.
        resized: (h, w) of the image in the frame, at the top left.
        size: (H, W) of the image.

    Returns:
        (P, H, W).
    """
    frame = F.interpolate(masks[:, None].float(), (frame_size, frame_size), mode="bilinear", align_corners=False)
    cut = frame[..., : resized[0], : resized[1]]
    return F.interpolate(cut, size, mode="bilinear", align_corners=False)[:, 0]
