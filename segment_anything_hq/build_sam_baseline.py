"""Builders with the published package's names: plain SAM on ViT-B, ViT-L and ViT-H, and on TinyViT (MobileSAM).

Each takes an optional checkpoint path.
"""

from __future__ import annotations

from collections.abc import Callable

from segment_anything_hq.build_sam import Checkpoint, loaded
from segment_anything_hq.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TinyViT, TwoWayTransformer
from segment_anything_hq.nn.hq_sam import build_plain_sam

__all__ = [
    "ImageEncoderViT",
    "MaskDecoder",
    "PromptEncoder",
    "Sam",
    "TinyViT",
    "TwoWayTransformer",
    "build_sam",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "build_sam_vit_t",
    "sam_model_registry_baseline",
]


def build_sam_vit_h(checkpoint: Checkpoint = None) -> Sam:
    """SAM on ViT-H."""
    return loaded(build_plain_sam("vit_h"), checkpoint)


def build_sam_vit_l(checkpoint: Checkpoint = None) -> Sam:
    """SAM on ViT-L."""
    return loaded(build_plain_sam("vit_l"), checkpoint)


def build_sam_vit_b(checkpoint: Checkpoint = None) -> Sam:
    """SAM on ViT-B."""
    return loaded(build_plain_sam("vit_b"), checkpoint)


def build_sam_vit_t(checkpoint: Checkpoint = None) -> Sam:
    """SAM on TinyViT (MobileSAM)."""
    return loaded(build_plain_sam("vit_tiny"), checkpoint)


build_sam = build_sam_vit_h

sam_model_registry_baseline: dict[str, Callable[..., Sam]] = {
    "default": build_sam_vit_h,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "vit_tiny": build_sam_vit_t,
}
