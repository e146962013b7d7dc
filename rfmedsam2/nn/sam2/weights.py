"""Loading SAM 2's published weights (sam2.1_hiera_*, sam2_hiera_*), and which parameters are pre-trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from rfmedsam2.nn.loading import LoadReport, load_weights, require_backbone
from rfmedsam2.nn.sam2.sizes import HIERA
from rfmedsam2.records.model import Backbone

NEW_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
"""Parameters that SAM 2.0 does not have; set to zero they have no effect."""
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
"""Name prefixes of parameters that a SAM with a TinyViT encoder does not have; they are always trained."""
MEMORY = ("memory_attention.", "memory_encoder.", "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_", "obj_ptr_")
"""Name prefixes of parameters that only Step 2 uses."""
STEM = "image_encoder.trunk.patch_embed.proj.weight"
BLOCKS = "image_encoder.trunk.blocks."


def load_sam2(base: SAM2Base, weights: Mapping[str, Tensor], *, where: object) -> LoadReport:
    """Copy published weights of SAM 2.1 or 2.0 into a model without adapters.

    SAM 2.0 lacks parameters that 2.1 introduced; they are set to zero, so that the model equals SAM 2.0.

    Args:
        base: model of the weights' size.
        weights: tensors by their official names (`store.published_weights.read_published`).
        where: the place that error messages name.

    Raises:
        CheckpointError: the weights are of another model or size, or incomplete.
    """
    require_backbone(_size(base.state_dict()), _size(weights), where=where)
    report = load_weights(base, weights, model="SAM 2", where=where, optional=NEW_IN_2_1)
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for name in report.missing:
            parameters[name].zero_()
    return report


def pretrained_parameters(base: SAM2Base, backbone: Backbone) -> dict[str, nn.Parameter]:
    """Parameters that are in the published weights of this backbone, by name; `base` has no adapters yet."""
    named = dict(base.named_parameters())
    match backbone:
        case "nano":
            return {}
        case "mobile_sam" | "lite_medsam":
            return {name: p for name, p in named.items() if not name.startswith(NEW_ON_LIGHT)}
        case _:
            return named


def memory_parameters(base: SAM2Base) -> list[nn.Parameter]:
    """Parameters without influence if nothing is decoded with memories; with those of adapters."""
    return [parameter for name, parameter in base.named_parameters() if name.startswith(MEMORY)]


def _size(weights: Mapping[str, Tensor]) -> str:
    """Identify the size of SAM 2 by the channels of its stem and its number of blocks."""
    if STEM not in weights:
        return f"a model other than SAM 2 ({STEM} is not among the {len(weights)} tensors)"
    channels = len(weights[STEM])
    count = len({name[len(BLOCKS) :].split(".")[0] for name in weights if name.startswith(BLOCKS)})
    sizes = {(hiera.channels, sum(hiera.stages)): name for name, hiera in HIERA.items()}
    return sizes.get((channels, count), f"an unknown size ({channels} channels, {count} blocks)")
