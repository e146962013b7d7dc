"""Published weights of MobileSAM and LiteMedSAM into a base of `build_base`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from rfmedsam2.nn.loading import LoadReport, load_weights, require_backbone
from rfmedsam2.nn.sam2.frozen import NEW_ON_LIGHT

STEM = "image_encoder.patch_embed.seq.0.c.weight"
RENAMED = (
    ("prompt_encoder.", "sam_prompt_encoder."),
    ("mask_decoder.", "sam_mask_decoder."),
    (".mlp.lin1.", ".mlp.layers.0."),
    (".mlp.lin2.", ".mlp.layers.1."),
)
"""SAM's words and SAM 2's; the image encoder has the published names, and no `lin1` in it."""
HEADS = ("image_encoder.head.", "image_encoder.norm_head.")
"""TinyViT's image classifier, which MobileSAM carries along unused."""
KINDS = {3: "MobileSAM", 1: "LiteMedSAM"}
"""Kernel of the stem -> whose it is."""


def load_light(base: SAM2Base, weights: Mapping[str, Tensor], *, where: object) -> LoadReport:
    """Copy MobileSAM's or LiteMedSAM's weights into a base that was built for them.

    What SAM does not have (memory, object scores, finer levels) stays as it was initialized.

    Args:
        base: of the weights' backbone, without adapters.
        weights: by the published names (`store.published_weights.read_published`).
        where: what error messages name.

    Returns:
        Names as the base has them; `unexpected` as the file has them: tensors without a place, of MobileSAM the
        unused image classifier.

    Raises:
        CheckpointError: weights of another model, of the other one of the two, or that lack something.
    """
    wanted = base.state_dict()
    named = {sam2_name(name): tensor for name, tensor in weights.items()}
    require_backbone(_kind(wanted), _kind(weights), where=where)
    new = [name for name in wanted if name.startswith(NEW_ON_LIGHT)]
    report = load_weights(base, named, model=_kind(wanted), where=where, optional=new)
    unexpected = tuple(name for name in weights if sam2_name(name) not in wanted)
    return replace(report, unexpected=unexpected)


def sam2_name(name: str) -> str:
    """What SAM2Base calls a tensor of SAM."""
    if name.startswith("image_encoder."):
        return name
    for old, new in RENAMED:
        name = new + name[len(old) :] if name.startswith(old) else name.replace(old, new) if old[0] == "." else name
    return name


def _kind(weights: Mapping[str, Tensor]) -> str:
    """Name the model by the kernel of its stem."""
    if STEM not in weights:
        return f"no SAM with TinyViT ({STEM} is not among the {len(weights)} tensors)"
    kernel = weights[STEM].shape[-1]
    return KINDS.get(kernel, f"an unknown kind (kernel {kernel} in {STEM})")
