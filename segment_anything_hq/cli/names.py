"""Names that the commands accept, copied from `records` and `data.image_io`, whose imports would slow down --help."""

from __future__ import annotations

from typing import Literal

Trainable = Literal["hq_sam", "hq_sam2", "sam_ref", "sam2_ref", "sam2_refiner", "sam_decoder", "sam2_decoder"]
AnyMethod = Literal[Trainable, "sam", "sam2"]
AnyBackbone = Literal[
    "vit_b", "vit_l", "vit_h", "vit_tiny", "vit_nano", "hiera_t", "hiera_s", "hiera_b+", "hiera_l", "hiera_nano"
]
MaskRule = Literal["above_128", "ignore_128", "any"]
