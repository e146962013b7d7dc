"""Published weights of MobileSAM and LiteMedSAM into a base of `build_base`."""

from __future__ import annotations

from collections.abc import Mapping

from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from rfmedsam2.errors import CheckpointError
from rfmedsam2.nn.sam2.frozen import NEW_ON_LIGHT
from rfmedsam2.nn.sam2.weights import LoadReport

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
    _require_kind(wanted, weights, where=where)
    lacking = [name for name in wanted if name not in named and not name.startswith(NEW_ON_LIGHT)]
    wrong = [name for name in wanted if name in named and wanted[name].shape != named[name].shape]
    if lacking or wrong:
        raise CheckpointError(
            f"These weights do not fit {_kind(wanted)}",
            where=where,
            expected="the names and shapes of the published file",
            found=f"{len(lacking)} missing, {len(wrong)} of another shape ({', '.join([*lacking, *wrong][:5])} ...)",
            remedy="Take the published file, mobile_sam.pt or lite_medsam.pth",
        )
    base.load_state_dict({name: tensor for name, tensor in named.items() if name in wanted}, strict=False)
    return LoadReport(
        loaded=tuple(name for name in wanted if name in named),
        missing=tuple(name for name in wanted if name not in named),
        unexpected=tuple(name for name in weights if sam2_name(name) not in wanted),
    )


def sam2_name(name: str) -> str:
    """What SAM2Base calls a tensor of SAM."""
    if name.startswith("image_encoder."):
        return name
    for old, new in RENAMED:
        name = new + name[len(old) :] if name.startswith(old) else name.replace(old, new) if old[0] == "." else name
    return name


def _require_kind(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, where: object) -> None:
    planned, found = _kind(wanted), _kind(weights)
    if found != planned:
        raise CheckpointError(
            "These weights are of another model than the plan's backbone",
            where=where,
            expected=f"weights of {planned}",
            found=f"weights of {found}",
            remedy=f"Take {planned}'s file, or plan the backbone that these weights are for",
        )


def _kind(weights: Mapping[str, Tensor]) -> str:
    """Name the model by the kernel of its stem."""
    if STEM not in weights:
        return f"no SAM with TinyViT ({STEM} is not among the {len(weights)} tensors)"
    kernel = weights[STEM].shape[-1]
    return KINDS.get(kernel, f"an unknown kind (kernel {kernel} in {STEM})")
