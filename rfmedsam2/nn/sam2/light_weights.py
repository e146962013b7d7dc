"""Loading published weights of MobileSAM and LiteMedSAM into a model of `build_base`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from rfmedsam2.nn.loading import LoadReport, load_weights, require_backbone
from rfmedsam2.nn.sam2.weights import NEW_ON_LIGHT

STEM = "image_encoder.patch_embed.seq.0.c.weight"
RENAMED = (
    ("prompt_encoder.", "sam_prompt_encoder."),
    ("mask_decoder.", "sam_mask_decoder."),
    (".mlp.lin1.", ".mlp.layers.0."),
    (".mlp.lin2.", ".mlp.layers.1."),
)
"""SAM's parameter names -> SAM 2's; the image encoder has the published names, which do not contain `lin1`."""
HEADS = ("image_encoder.head.", "image_encoder.norm_head.")
"""TinyViT's image classifier, unused in MobileSAM's file."""
KINDS = {3: "MobileSAM", 1: "LiteMedSAM"}
"""Kernel size of the stem -> model."""


def load_light(base: SAM2Base, weights: Mapping[str, Tensor], *, where: object) -> LoadReport:
    """Copy MobileSAM's or LiteMedSAM's weights into a model that was built for them.

    Parts that SAM does not have (memory, object scores, finer levels) keep their initialization.

    Args:
        base: model with the weights' backbone, without adapters.
        weights: tensors by their published names (`store.published_weights.read_published`).
        where: the place that error messages name.

    Returns:
        Parameter names of the model; `unexpected` has names of the file: tensors that were not used, such as
        MobileSAM's image classifier.

    Raises:
        CheckpointError: the weights are of another model, or incomplete.
    """
    wanted = base.state_dict()
    named = {sam2_name(name): tensor for name, tensor in weights.items()}
    require_backbone(_kind(wanted), _kind(weights), where=where)
    new = [name for name in wanted if name.startswith(NEW_ON_LIGHT)]
    report = load_weights(base, named, model=_kind(wanted), where=where, optional=new)
    unexpected = tuple(name for name in weights if sam2_name(name) not in wanted)
    return replace(report, unexpected=unexpected)


def sam2_name(name: str) -> str:
    """SAM2Base's name of a tensor of SAM."""
    if name.startswith("image_encoder."):
        return name
    for old, new in RENAMED:
        name = new + name[len(old) :] if name.startswith(old) else name.replace(old, new) if old[0] == "." else name
    return name


def _kind(weights: Mapping[str, Tensor]) -> str:
    """Identify the model by the kernel of its stem."""
    if STEM not in weights:
        return f"a model without TinyViT ({STEM} is not among the {len(weights)} tensors)"
    kernel = weights[STEM].shape[-1]
    return KINDS.get(kernel, f"an unknown kind (kernel {kernel} in {STEM})")
