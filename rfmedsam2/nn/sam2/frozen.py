"""Which of SAM 2's parameters come from published weights, and so may be frozen."""

from __future__ import annotations

from sam2.modeling.sam2_base import SAM2Base
from torch import nn

from rfmedsam2.records.model import Backbone

NEW_ON_LIGHT = (
    "image_encoder.laterals.",
    "memory_attention.",
    "memory_encoder.",
    "maskmem_tpos_enc",
    "no_mem_",
    "no_obj_",
    "obj_ptr_",
    "mask_downsample.",
    "sam_mask_decoder.conv_s",
    "sam_mask_decoder.obj_score_token",
    "sam_mask_decoder.pred_obj_score_head",
)
"""Beginnings of the names of what a SAM with a TinyViT encoder does not have: it is always trained."""


def pretrained_parameters(base: SAM2Base, backbone: Backbone) -> dict[str, nn.Parameter]:
    """Parameters that published weights of this backbone hold, by name; `base` carries no adapters yet."""
    named = dict(base.named_parameters())
    match backbone:
        case "nano":
            return {}
        case "mobile_sam" | "lite_medsam":
            return {name: p for name, p in named.items() if not name.startswith(NEW_ON_LIGHT)}
        case _:
            return named
