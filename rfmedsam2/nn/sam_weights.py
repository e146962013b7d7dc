"""Published weights of SAM, MobileSAM, LiteMedSAM and HQ-SAM: whose they are, and into a network of that backbone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfmedsam2.arguments import option
from rfmedsam2.errors import CheckpointError
from rfmedsam2.nn.loading import LoadReport, described, load_weights, require_backbone
from rfmedsam2.nn.sam import NAMES, VITS, SamBackbone, SamSegmenter, Trained

TINY_STEM = "image_encoder.patch_embed.seq.0.c.weight"
VIT_STEM = "image_encoder.patch_embed.proj.weight"


def sam_backbone(weights: Mapping[str, Tensor]) -> SamBackbone | None:
    """Whose weights these are, by the image encoder's stem; None: no SAM's of a known size."""
    if TINY_STEM in weights:
        return "vit_tiny" if weights[TINY_STEM].shape[-1] == 3 else "lite_medsam"
    channels = len(weights[VIT_STEM]) if VIT_STEM in weights else None
    return next((backbone for backbone, sizes in VITS.items() if sizes.channels == channels), None)


def build_sam(
    weights: Mapping[str, Tensor],
    *,
    where: object,
    frame_size: int | None = None,
    best_of_three: bool = False,
    trained: Trained = "none",
) -> SamSegmenter:
    """The SAM that these weights are of, loaded, in evaluation mode.

    Args:
        weights: by the published names (`store.published_weights.read_published`).
        where: what error messages name.
        frame_size: S; None: as published. Tables of positions are interpolated for others.
        best_of_three: see `SamSegmenter`.
        trained: see `SamSegmenter`.

    Raises:
        CheckpointError: weights of no SAM that is known, or that lack something.
    """
    backbone = sam_backbone(weights)
    if backbone is None:
        raise CheckpointError(
            "These are weights of no SAM that is known",
            where=where,
            expected="mobile_sam.pt, lite_medsam.pth, sam_vit_b, sam_vit_l or sam_vit_h",
            found=described(weights),
            remedy=f"Give files of SAM 2 with {option('sam2')}" if any("trunk" in key for key in weights) else None,
        )
    sam = SamSegmenter(backbone, frame_size=frame_size, best_of_three=best_of_three, trained=trained)
    load_sam(sam, weights, where=where)
    return sam.eval()


def load_sam(
    sam: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    where: object,
    model: str | None = None,
    added: Collection[str] = (),
) -> LoadReport:
    """Copy published weights into a SAM of the same backbone.

    For frames of another size than the weights' a ViT's tables of positions are interpolated.

    Args:
        sam: with the published names: `SamSegmenter`, or a network around SAM's three parts.
        weights: by the published names (`store.published_weights.read_published`).
        where: what error messages name.
        model: what error messages call the network; None: its backbone.
        added: names of what the network adds to SAM; weights hold all of it or, of SAM itself, nothing.

    Returns:
        what was loaded; `missing` names what is new.

    Raises:
        CheckpointError: weights of another backbone, or that lack something.
    """
    wanted = sam.state_dict()
    expected = _kind(wanted)
    require_backbone(expected, _kind(weights), where=where)
    fitted = {n: fitted_positions(n, t, wanted[n].shape) if n in wanted else t for n, t in weights.items()}
    optional = () if any(name in weights for name in added) else added
    return load_weights(sam, fitted, model=model or expected, where=where, optional=optional)


def fitted_positions(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """A ViT's table of positions, or of relative positions, for maps of another side."""
    if tensor.shape == shape or not name.startswith("image_encoder."):
        return tensor
    if name.endswith("pos_embed") and tensor.shape[-1] == shape[-1]:
        size = (shape[1], shape[2])
        x = F.interpolate(tensor.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
        return x.permute(0, 2, 3, 1).to(tensor.dtype)
    if name.endswith(("rel_pos_h", "rel_pos_w")) and tensor.shape[-1] == shape[-1]:
        return F.interpolate(tensor.T[None].float(), shape[0], mode="linear")[0].T.to(tensor.dtype)
    return tensor


def _kind(weights: Mapping[str, Tensor]) -> str:
    """What error messages call the backbone of weights."""
    backbone = sam_backbone(weights)
    if backbone is not None:
        return f"{backbone} ({NAMES[backbone]})"
    if VIT_STEM in weights:
        return f"a ViT of {len(weights[VIT_STEM])} channels"
    return f"no SAM ({described(weights)})"
