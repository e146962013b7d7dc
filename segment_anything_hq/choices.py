"""Names shared by plans and commands. Standard library only, as `--help` lists them before heavy imports."""

from __future__ import annotations

from typing import Literal

Method = Literal["hq_sam", "hq_sam2", "sam_ref", "sam2_ref", "sam2_refiner", "sam_decoder", "sam2_decoder"]
"""Trainable methods: refiners, and the mask decoder of SAM or SAM 2 (SAM-REF's first stage, and the baseline)."""
ZeroShot = Literal["sam", "sam2"]
"""Methods without training: the published base models."""
AnyMethod = Literal[Method, ZeroShot]
"""Both, in this order (a union of both would be listed in any)."""
Backbone = Literal[
    "vit_b", "vit_l", "vit_h", "vit_tiny", "vit_nano", "hiera_t", "hiera_s", "hiera_b+", "hiera_l", "hiera_nano"
]
"""Image encoders of SAM and SAM 2; the two nano ones are small encoders for tests, without published weights."""
MaskRule = Literal["above_128", "ignore_128", "any"]
"""What a mask's values mean.

above_128: object if the first channel is above 128 (sam-hq). ignore_128: likewise, and 128 itself is ignored (RITM's
GrabCut and Berkeley). any: object if any color channel is above 0 (RITM's DAVIS).
"""
