"""Names that plans and commands share. Standard library only: `--help` lists them before anything heavy is loaded."""

from __future__ import annotations

from typing import Literal

Method = Literal["hq_sam", "hq_sam2", "sam_ref", "sam2_ref", "sam2_refiner", "sam_decoder", "sam2_decoder"]
"""What is trained: refiners, or the mask decoder of SAM or SAM 2, which is SAM-REF's first stage and the baseline."""
ZeroShot = Literal["sam", "sam2"]
"""What needs no training: the bases as they are published."""
Backbone = Literal[
    "vit_b", "vit_l", "vit_h", "vit_tiny", "vit_nano", "hiera_t", "hiera_s", "hiera_b+", "hiera_l", "hiera_nano"
]
"""SAM's image encoders and SAM 2's; the two nanos are new, small, and for tests."""
MaskRule = Literal["above_128", "ignore_128", "any"]
"""What a mask's values mean.

above_128: object where the first channel is above 128 (sam-hq). ignore_128: the same, and 128 itself is ignored (RITM's
GrabCut and Berkeley). any: object where any color channel is above 0 (RITM's DAVIS).
"""
