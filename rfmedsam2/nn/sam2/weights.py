"""SAM 2's published weights into a base of `build_base`: sam2.1_hiera_* and sam2_hiera_* of the four sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from rfmedsam2.errors import CheckpointError
from rfmedsam2.nn.sam2.sizes import HIERA

NEW_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
"""What SAM 2.0 does not have; zero, they leave it what it is."""
STEM = "image_encoder.trunk.patch_embed.proj.weight"
BLOCKS = "image_encoder.trunk.blocks."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Names of parameters, in the order of the model's (`unexpected`: of the file's).

    Attributes:
        loaded: had weights in the file.
        missing: had none, and stay or start as this package initializes them.
        unexpected: are in the file, but not in the model.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


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
    wanted = base.state_dict()
    missing = tuple(name for name in wanted if name not in weights)
    unexpected = tuple(name for name in weights if name not in wanted)
    planned, found = _size(wanted), _size(weights)
    if found != planned:
        raise CheckpointError(
            "These weights are of another size than the plan's backbone",
            where=where,
            expected=f"weights of {planned}",
            found=f"weights of {found}",
            remedy=f"Take the file of {planned}, or plan the backbone that these weights are for",
        )
    lacking = [name for name in missing if name not in NEW_IN_2_1]
    wrong = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    if lacking or wrong:
        raise CheckpointError(
            "These weights do not fit SAM 2",
            where=where,
            expected="the names and shapes of a published sam2.1_hiera or sam2_hiera file",
            found="; ".join(_faults(lacking, wrong, unexpected)),
            remedy="Take a published file of SAM 2.1, or the one that this model was fine-tuned from",
        )
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for name in missing:
            parameters[name].zero_()
    base.load_state_dict({name: tensor for name, tensor in weights.items() if name in wanted}, strict=False)
    return LoadReport(loaded=tuple(name for name in wanted if name in weights), missing=missing, unexpected=unexpected)


def _size(weights: Mapping[str, Tensor]) -> str:
    """Name the size of SAM 2 by the channels of its stem and its number of blocks."""
    if STEM not in weights:
        return f"no SAM 2 ({STEM} is not among the {len(weights)} tensors)"
    channels = len(weights[STEM])
    count = len({name[len(BLOCKS) :].split(".")[0] for name in weights if name.startswith(BLOCKS)})
    sizes = {(hiera.channels, sum(hiera.stages)): name for name, hiera in HIERA.items()}
    return sizes.get((channels, count), f"no published size ({channels} channels, {count} blocks)")


def _faults(lacking: list[str], wrong: list[str], unexpected: tuple[str, ...]) -> list[str]:
    """Name each fault with its number and the first few parameters that have it."""
    kinds = {"missing": lacking, "of another shape": wrong, "unknown": unexpected}
    return [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
