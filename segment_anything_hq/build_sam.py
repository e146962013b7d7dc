"""Builders with the published package's names: HQ-SAM on SAM's ViT-B, ViT-L and ViT-H, and on TinyViT.

Each takes an optional checkpoint path. Only HQ-SAM's own parameters require gradients.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from rfmedsam2.arguments import path_of
from rfmedsam2.store.published_weights import read_published
from segment_anything_hq.modeling import ImageEncoderViT, MaskDecoderHQ, PromptEncoder, Sam, TinyViT, TwoWayTransformer
from segment_anything_hq.nn.hq_sam import HqSam, build_hq_sam, load_hq_sam

__all__ = [
    "ImageEncoderViT",
    "MaskDecoderHQ",
    "PromptEncoder",
    "Sam",
    "TinyViT",
    "TwoWayTransformer",
    "build_sam",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "build_sam_vit_t",
    "loaded",
    "sam_model_registry",
]

logger = logging.getLogger(__name__)
Checkpoint = str | os.PathLike[str] | None
SamT = TypeVar("SamT", bound=Sam)


def build_sam_vit_h(checkpoint: Checkpoint = None) -> HqSam:
    """HQ-SAM on ViT-H."""
    return loaded(build_hq_sam("vit_h"), checkpoint)


def build_sam_vit_l(checkpoint: Checkpoint = None) -> HqSam:
    """HQ-SAM on ViT-L."""
    return loaded(build_hq_sam("vit_l"), checkpoint)


def build_sam_vit_b(checkpoint: Checkpoint = None) -> HqSam:
    """HQ-SAM on ViT-B."""
    return loaded(build_hq_sam("vit_b"), checkpoint)


def build_sam_vit_t(checkpoint: Checkpoint = None) -> HqSam:
    """HQ-SAM on TinyViT (Light HQ-SAM)."""
    return loaded(build_hq_sam("vit_tiny"), checkpoint)


build_sam = build_sam_vit_h

sam_model_registry: dict[str, Callable[..., HqSam]] = {
    "default": build_sam_vit_h,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "vit_tiny": build_sam_vit_t,
}


def loaded(sam: SamT, checkpoint: Checkpoint) -> SamT:
    """Load a checkpoint into a model, if one is given."""
    if checkpoint is not None:
        new = load_hq_sam(sam, read_published(path_of(checkpoint, "checkpoint")), where=checkpoint).missing
        if new:
            logger.warning("%s has no weights for what HQ-SAM adds to SAM: %d tensors are random", checkpoint, len(new))
    return sam


class _Builder(ModuleType):
    """A callable module type, because the published package exports a function of this module's name."""

    def __call__(self, checkpoint: Checkpoint = None) -> HqSam:
        return build_sam_vit_h(checkpoint)


sys.modules[__name__].__class__ = _Builder
