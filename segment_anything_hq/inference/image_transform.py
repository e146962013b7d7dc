"""Transform images, prompts and masks between an image and the square frame that the network sees."""

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
"""pad: the longer side is resized to the frame's side (SAM); stretch: both sides are (SAM 2, SAM-REF)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTransform:
    """The transform between one image and its frame.

    Attributes:
        size: (H, W) of the image, pixels.
        resized: (h, w) of the image in the frame, at the top left, pixels.
        frame_size: side length S of the frame, pixels.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    frame_size: int

    def pixels(self, image: np.ndarray) -> Tensor:
        """Resize an image (H, W, 3) uint8 to (1, 3, h, w) uint8, without padding."""
        resized = Image.fromarray(image).resize((self.resized[1], self.resized[0]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]

    def apply_coords(self, xy: np.ndarray) -> np.ndarray:
        """Scale coordinates (..., 2) XY from the image to the frame."""
        return np.asarray(xy) * np.divide(self.resized[::-1], self.size[::-1])

    def prompts(self, prompts: Sequence[Prompt], device: torch.device, *, masks: Tensor | None = None) -> PromptBatch:
        """Convert prompts for objects of the image to the frame, one row per object, padded to the most clicks.

        Args:
            prompts: prompts with a box, or prompts without one.
            device: device of the result.
            masks: (P, 4s, 4s) logits of previous masks, already in the frame.

        Raises:
            UsageError: some prompts have a box and others do not.
        """
        boxes = [prompt.box for prompt in prompts if prompt.box is not None]
        if len(boxes) not in (0, len(prompts)):
            raise UsageError(
                "All objects in a batch must either have a box or not have one",
                found=f"{len(boxes)} of {len(prompts)} with a box",
            )
        max_clicks = max(len(prompt.clicks) for prompt in prompts)
        points, labels = np.zeros((len(prompts), max_clicks, 2)), np.full((len(prompts), max_clicks), -1)
        for row, prompt in enumerate(prompts):
            points[row, : len(prompt.clicks)] = prompt.points
            labels[row, : len(prompt.clicks)] = prompt.labels
        corners = self.apply_coords(np.array(boxes, float).reshape(-1, 2, 2)).reshape(-1, 4)
        scaled = torch.as_tensor(self.apply_coords(points), dtype=torch.float32, device=device)
        return PromptBatch(
            images=torch.zeros(len(prompts), dtype=torch.long, device=device),
            points=scaled if max_clicks else None,
            point_labels=torch.as_tensor(labels, device=device) if max_clicks else None,
            boxes=torch.as_tensor(corners, dtype=torch.float32, device=device) if boxes else None,
            masks=masks,
        )

    def logits(self, masks: Tensor) -> Tensor:
        """Map mask logits (P, h, w) of the frame, at any resolution, to the image's pixels: (P, H, W)."""
        return at_image_size(masks, frame_size=self.frame_size, resized=self.resized, size=self.size)


def make_transform(size: tuple[int, int], frame_size: int, fit: Fit) -> ImageTransform:
    """The transform for an image of (H, W) pixels and a frame of side S."""
    resized = (frame_size, frame_size) if fit == "stretch" else fitted_size(size, frame_size)
    return ImageTransform(size=size, resized=resized, frame_size=frame_size)


def embed(segmenter: Any, image: np.ndarray, transform: ImageTransform) -> Embedded:
    """Encode one image, including what a method precomputes for many prompts.

    The device has computed it when this returns, so that its time is not counted with the first prompt.

    Args:
        segmenter: a `Segmenter` and `nn.Module`, in evaluation mode, on its device.
        image: (H, W, 3) uint8 RGB, of the transform's size.
        transform: the image's transform to the segmenter's frame.
    """
    device = device_of(segmenter)
    embedded = segmenter.encode(segmenter.normalize(transform.pixels(image).to(device)))
    prepare = getattr(segmenter, "prepare", None)
    embedded = embedded if prepare is None else prepare(embedded)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return embedded


def device_of(network: nn.Module) -> torch.device:
    """The device of a network's parameters."""
    return next(network.parameters()).device
