"""SAM itself by name, as the published package builds it: on SAM's ViT-B, L, H and on TinyViT (MobileSAM).

All take a checkpoint's path or none.
"""

from __future__ import annotations

from collections.abc import Callable

from segment_anything_hq.build_sam import CHANNELS, Checkpoint, loaded, prompt_encoder, tiny_vit, transformer, vit
from segment_anything_hq.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TinyViT, TwoWayTransformer

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
    return _plain(vit(1280, 32, 16, (7, 15, 23, 31))[0], checkpoint)


def build_sam_vit_l(checkpoint: Checkpoint = None) -> Sam:
    """SAM on ViT-L."""
    return _plain(vit(1024, 24, 16, (5, 11, 17, 23))[0], checkpoint)


def build_sam_vit_b(checkpoint: Checkpoint = None) -> Sam:
    """SAM on ViT-B."""
    return _plain(vit(768, 12, 12, (2, 5, 8, 11))[0], checkpoint)


def build_sam_vit_t(checkpoint: Checkpoint = None) -> Sam:
    """SAM on TinyViT (MobileSAM)."""
    return _plain(tiny_vit()[0], checkpoint)


build_sam = build_sam_vit_h

sam_model_registry_baseline: dict[str, Callable[..., Sam]] = {
    "default": build_sam_vit_h,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "vit_tiny": build_sam_vit_t,
}


def _plain(encoder: ImageEncoderViT | TinyViT, checkpoint: Checkpoint) -> Sam:
    decoder = MaskDecoder(transformer_dim=CHANNELS, transformer=transformer())
    return loaded(Sam(encoder, prompt_encoder(encoder.img_size), decoder).eval(), checkpoint)
