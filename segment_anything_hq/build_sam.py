"""Models by name, as the published package builds them: HQ-SAM on SAM's ViT-B, L, H and on TinyViT.

All take a checkpoint's path or none. What is not HQ-SAM's own has no gradient.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar, cast

from segment_anything.modeling import PromptEncoder, TwoWayTransformer
from torch import nn

from rfmedsam2.store.published_weights import read_published
from segment_anything_hq.modeling import ImageEncoderViT, MaskDecoderHQ, Sam, TinyViT
from segment_anything_hq.nn.hq_sam import HqSam, freeze_sam, load_sam

logger = logging.getLogger(__name__)
CHANNELS = 256
FRAME_SIZE = 1024
PATCH = 16
Checkpoint = str | os.PathLike[str] | None
SamT = TypeVar("SamT", bound=Sam)


def build_sam_vit_h(checkpoint: Checkpoint = None) -> HqSam:
    """HQ-SAM on ViT-H."""
    return loaded(assemble(*vit(1280, 32, 16, (7, 15, 23, 31))), checkpoint)


def build_sam_vit_l(checkpoint: Checkpoint = None) -> HqSam:
    """HQ-SAM on ViT-L."""
    return loaded(assemble(*vit(1024, 24, 16, (5, 11, 17, 23))), checkpoint)


def build_sam_vit_b(checkpoint: Checkpoint = None) -> HqSam:
    """HQ-SAM on ViT-B."""
    return loaded(assemble(*vit(768, 12, 12, (2, 5, 8, 11))), checkpoint)


def build_sam_vit_t(checkpoint: Checkpoint = None) -> HqSam:
    """HQ-SAM on TinyViT (Light HQ-SAM)."""
    return loaded(assemble(*tiny_vit()), checkpoint)


build_sam = build_sam_vit_h

sam_model_registry: dict[str, Callable[..., HqSam]] = {
    "default": build_sam_vit_h,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "vit_tiny": build_sam_vit_t,
}


def vit(
    channels: int, depth: int, heads: int, global_blocks: tuple[int, ...], frame_size: int = FRAME_SIZE
) -> tuple[ImageEncoderViT, int]:
    """A ViT of SAM's, and the channels of its early features."""
    encoder = ImageEncoderViT(
        depth=depth,
        embed_dim=channels,
        img_size=frame_size,
        mlp_ratio=4,
        norm_layer=cast(type[nn.Module], partial(nn.LayerNorm, eps=1e-6)),
        num_heads=heads,
        patch_size=PATCH,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=global_blocks,
        window_size=14,
        out_chans=CHANNELS,
    )
    return encoder, channels


def tiny_vit(frame_size: int = FRAME_SIZE) -> tuple[TinyViT, int]:
    """MobileSAM's TinyViT-5M, and the channels of its early features."""
    widths = [64, 128, 160, 320]
    encoder = TinyViT(frame_size, embed_dims=widths, num_heads=[2, 4, 5, 10], drop_path_rate=0.0, layer_lr_decay=0.8)
    return encoder, widths[2]


def assemble(encoder: ImageEncoderViT | TinyViT, early: int) -> HqSam:
    """HQ-SAM around an image encoder whose early features have `early` channels, new, in evaluation mode."""
    decoder = MaskDecoderHQ(transformer_dim=CHANNELS, transformer=transformer(), vit_dim=early)
    sam = HqSam(encoder, prompt_encoder(encoder.img_size), decoder)
    freeze_sam(sam)
    sam.eval()
    return sam


def prompt_encoder(frame_size: int) -> PromptEncoder:
    """SAM's, for frames of `frame_size`."""
    side = frame_size // PATCH
    return PromptEncoder(
        embed_dim=CHANNELS,
        image_embedding_size=(side, side),
        input_image_size=(frame_size, frame_size),
        mask_in_chans=16,
    )


def transformer() -> TwoWayTransformer:
    """SAM's, of its mask decoder."""
    return TwoWayTransformer(depth=2, embedding_dim=CHANNELS, mlp_dim=2048, num_heads=8)


def loaded(sam: SamT, checkpoint: Checkpoint) -> SamT:
    """Load a checkpoint into a model, if there is one."""
    if checkpoint is not None:
        new = load_sam(sam, read_published(Path(checkpoint)), where=checkpoint).missing
        if new:
            logger.warning("%s has no weights of what HQ-SAM adds to SAM: %d tensors are new", checkpoint, len(new))
    return sam


class _Builder(ModuleType):
    """The type of this module: as the published package has a function of its name, it can be called."""

    def __call__(self, checkpoint: Checkpoint = None) -> HqSam:
        return build_sam_vit_h(checkpoint)


sys.modules[__name__].__class__ = _Builder
