"""Images, points and boxes resized to SAM's frame: `ResizeLongestSide` as the published package has it."""

from __future__ import annotations

import torch
from segment_anything.utils.transforms import ResizeLongestSide as PlainResize
from torch import Tensor


class ResizeLongestSide(PlainResize):
    """SAM's resizing, whose tensors are (B, C, H, W) as its documentation says."""

    def apply_image_torch(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) with the longer side `target_length`."""
        size = self.get_preprocess_shape(image.shape[2], image.shape[3], self.target_length)
        return torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
