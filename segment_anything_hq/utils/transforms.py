"""Resizing of images, points and boxes to SAM's frame: the published package's `ResizeLongestSide`."""

from __future__ import annotations

import torch
from segment_anything.utils.transforms import ResizeLongestSide as PlainResize
from torch import Tensor


class ResizeLongestSide(PlainResize):
    """SAM's resizing; tensors are (B, C, H, W), as its documentation states."""

    def apply_image_torch(self, image: Tensor) -> Tensor:
        """Resize images (B, C, H, W) so that the longer side is `target_length`."""
        size = self.get_preprocess_shape(image.shape[2], image.shape[3], self.target_length)
        return torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
