"""SAM 2's published weights into a base of `build_base`: sam2.1_hiera_* and sam2_hiera_* of the four sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from rfmedsam2.nn.loading import LoadReport, load_weights, require_backbone
from rfmedsam2.nn.sam2.sizes import HIERA

NEW_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
"""What SAM 2.0 does not have; zero, they leave it what it is."""
STEM = "image_encoder.trunk.patch_embed.proj.weight"
BLOCKS = "image_encoder.trunk.blocks."


def load_sam2(base: SAM2Base, weights: Mapping[str, Tensor], *, where: object) -> LoadReport:
    """Copy published weights of SAM 2.1 or 2.0 into a base without adapters.

    Of SAM 2.0 the parts that came with 2.1 are missing; they are set to zero, so that the model is SAM 2.0.

    Args:
        base: of the weights' size.
        weights: by the official names (`store.published_weights.read_published`).
        where: what error messages name.

    Raises:
        CheckpointError: weights of another model or size, or that lack something else.
    """
    require_backbone(_size(base.state_dict()), _size(weights), where=where)
    report = load_weights(base, weights, model="SAM 2", where=where, optional=NEW_IN_2_1)
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for name in report.missing:
            parameters[name].zero_()
    return report


def _size(weights: Mapping[str, Tensor]) -> str:
    """Name the size of SAM 2 by the channels of its stem and its number of blocks."""
    if STEM not in weights:
        return f"no SAM 2 ({STEM} is not among the {len(weights)} tensors)"
    channels = len(weights[STEM])
    count = len({name[len(BLOCKS) :].split(".")[0] for name in weights if name.startswith(BLOCKS)})
    sizes = {(hiera.channels, sum(hiera.stages)): name for name, hiera in HIERA.items()}
    return sizes.get((channels, count), f"no published size ({channels} channels, {count} blocks)")
