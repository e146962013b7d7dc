"""How a picture lies in the frame that a segmenter sees, and how prompts and masks get from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, at_image_size, fitted_size
from segment_anything_hq.prompts.prompt import Prompt

Fit = Literal["pad", "stretch"]
"""pad: the longer side is resized to the frame's, as SAM does; stretch: both are, as SAM 2 and SAM-REF do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTransform:
    """A picture's place in its frame.

    Attributes:
        size: (H, W) of the picture.
        resized: (h, w) that it has in the frame, at the top left.
        frame_size: S.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    frame_size: int

    def pixels(self, image: np.ndarray) -> Tensor:
        """The picture (H, W, 3) uint8, resized: (1, 3, h, w) uint8."""
        resized = Image.fromarray(image).resize((self.resized[1], self.resized[0]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]

    def apply_coords(self, xy: np.ndarray) -> np.ndarray:
        """Places (..., 2) XY of the picture as places of the frame."""
        return np.asarray(xy) * np.divide(self.resized[::-1], self.size[::-1])

    def prompts(self, prompts: Sequence[Prompt], device: torch.device, *, masks: Tensor | None = None) -> PromptBatch:
        """Prompts of objects of the picture in its frame, rows padded to the most clicks.

        Args:
            prompts: all with a box or all without.
            device: where they go.
            masks: (P, 4s, 4s) logits of earlier masks, in the frame already.

        Raises:
            UsageError: some have a box and others none.
        """
        boxes = [prompt.box for prompt in prompts if prompt.box is not None]
        if len(boxes) not in (0, len(prompts)):
            raise UsageError(
                "A batch is of objects with a box or of such without", found=f"{len(boxes)} of {len(prompts)}"
            )
        most = max(len(prompt.clicks) for prompt in prompts)
        points, labels = np.zeros((len(prompts), most, 2)), np.full((len(prompts), most), -1)
        for row, prompt in enumerate(prompts):
            points[row, : len(prompt.clicks)] = prompt.points
            labels[row, : len(prompt.clicks)] = prompt.labels
        corners = self.apply_coords(np.array(boxes, float).reshape(-1, 2, 2)).reshape(-1, 4)
        placed = torch.as_tensor(self.apply_coords(points), dtype=torch.float32, device=device)
        return PromptBatch(
            images=torch.zeros(len(prompts), dtype=torch.long, device=device),
            points=placed if most else None,
            point_labels=torch.as_tensor(labels, device=device) if most else None,
            boxes=torch.as_tensor(corners, dtype=torch.float32, device=device) if boxes else None,
            masks=masks,
        )

    def logits(self, masks: Tensor) -> Tensor:
        """Mask logits (P, h, w) of the whole frame, at any resolution, as those of the picture's pixels (P, H, W)."""
        return at_image_size(masks, frame_size=self.frame_size, resized=self.resized, size=self.size)


def make_transform(size: tuple[int, int], frame_size: int, fit: Fit) -> ImageTransform:
    """Where a picture of (H, W) pixels lies in a frame of S a side."""
    resized = (frame_size, frame_size) if fit == "stretch" else fitted_size(size, frame_size)
    return ImageTransform(size=size, resized=resized, frame_size=frame_size)


def embed(segmenter: Any, image: np.ndarray, framing: ImageTransform) -> Embedded:
    """Embed one picture (H, W, 3) uint8, with what a method prepares of it for many prompts.

    Args:
        segmenter: a `Segmenter` and `nn.Module`, in evaluation mode, on its device.
        image: of the framing's size.
        framing: its place in the segmenter's frame.
    """
    embedded = segmenter.encode(segmenter.normalize(framing.pixels(image).to(device_of(segmenter))))
    prepare = getattr(segmenter, "prepare", None)
    return embedded if prepare is None else prepare(embedded)


def device_of(network: nn.Module) -> torch.device:
    """Where a network is."""
    return next(network.parameters()).device
