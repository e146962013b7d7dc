"""Losses of refined masks: normalized focal loss with and without error regions, Dice and binary cross-entropy.

Logits and masks are (P, h, w), one row per object. Every loss is averaged over the pixels of each object, then over the
objects, so that all objects have equal weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2.errors import UsageError

ERROR_WEIGHT = 1.5
"""Weight of pixels in the error region, in the boundary-weighted normalized focal loss (SAM-REF paper, section 3.5)."""
TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementMasks:
    """Input, output and target of one of SAM-REF's refiners, for P objects.

    Attributes:
        coarse: (P, h, w) mask logits before refinement.
        error: (P, h, w) logits of the predicted error map.
        refined: (P, h, w) mask logits after refinement.
        masks: (P, h, w) 0 or 1, the ground truth; for PatchDiff, cropped like its maps.
        valid: (P, h, w) bool, pixels to evaluate; None: all.
    """

    coarse: Tensor
    error: Tensor
    refined: Tensor
    masks: Tensor
    valid: Tensor | None = None


def normalized_focal_loss(
    logits: Tensor,
    masks: Tensor,
    *,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    alpha: float = 0.5,
    gamma: float = 2.0,
) -> Tensor:
    """Focal loss whose focal weights are scaled to average 1 over each object (RITM, section 3.3).

    The scale is not differentiated, as in RITM. The logarithm is computed from the logits, so that confident wrong
    pixels keep a gradient, which RITM's clamped probabilities lose.

    Args:
        logits: (P, h, w).
        masks: (P, h, w) 0 or 1.
        weights: (P, h, w) weights of the pixels in the average; None: equal weights.
        valid: (P, h, w) bool, pixels to evaluate; None: all.
        alpha: weight of object pixels; background pixels have 1 - alpha.
        gamma: focusing exponent; larger values give easy pixels less weight.
    """
    logits, masks, counted = _checked(logits, masks, valid)
    signed = torch.where(masks > 0.5, logits, -logits)
    focal = torch.sigmoid(-signed) ** gamma * counted
    with torch.no_grad():
        scale = counted.sum((-2, -1), keepdim=True) / (focal.sum((-2, -1), keepdim=True) + TINY)
    shares = torch.where(masks > 0.5, alpha, 1 - alpha)
    losses = -shares * focal * scale * F.logsigmoid(signed)
    counted = counted if weights is None else counted * weights
    return _mean_of_objects(losses, counted)


def boundary_normalized_focal_loss(
    logits: Tensor,
    masks: Tensor,
    *,
    region: Tensor,
    valid: Tensor | None = None,
    weight: float = ERROR_WEIGHT,
) -> Tensor:
    """Normalized focal loss with a larger weight inside a region (FocalClick; SAM-REF, section 3.5).

    Args:
        logits: (P, h, w).
        masks: (P, h, w) 0 or 1.
        region: (P, h, w) bool, pixels with the larger weight: a boundary, or `error_region`.
        valid: (P, h, w) bool, pixels to evaluate; None: all.
        weight: weight of the region's pixels; 1 elsewhere.
    """
    weights = torch.where(region, weight, 1.0)
    return normalized_focal_loss(logits, masks, weights=weights, valid=valid)


def error_region(coarse: Tensor, masks: Tensor) -> Tensor:
    """(P, h, w) bool: where the thresholded mask differs from the ground truth (SAM-REF paper, section 3.3.3)."""
    return (coarse > 0) ^ (masks > 0.5)


def dice_loss(logits: Tensor, masks: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """1 - Dice of probabilities (P, h, w) and masks, with a smoothing term of 1 as in HQ-SAM's training."""
    logits, masks, counted = _checked(logits, masks, valid)
    probabilities, members = torch.sigmoid(logits) * counted, masks * counted
    overlap = (probabilities * members).sum((-2, -1))
    total = probabilities.sum((-2, -1)) + members.sum((-2, -1))
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def cross_entropy(logits: Tensor, masks: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of logits (P, h, w) with masks of 0 and 1."""
    logits, masks, counted = _checked(logits, masks, valid)
    return _mean_of_objects(F.binary_cross_entropy_with_logits(logits, masks, reduction="none"), counted)


def mask_losses(logits: Tensor, masks: Tensor, *, valid: Tensor | None = None) -> dict[str, Tensor]:
    """Losses `bce` and `dice`, equally weighted, on all pixels (HQ-SAM supplement, section 2)."""
    return {"bce": cross_entropy(logits, masks, valid=valid), "dice": dice_loss(logits, masks, valid=valid)}


def sam_ref_losses(
    decoded: Tensor, masks: Tensor, *, overall: RefinementMasks, patch: RefinementMasks | None
) -> dict[str, Tensor]:
    """The seven terms of SAM-REF's loss (SAM-REF paper, eq. 3).

    Args:
        decoded: (P, h, w) logits of SAM's mask decoder.
        masks: (P, h, w) 0 or 1, the ground truth.
        overall: output of the GlobalDiff refiner.
        patch: output of the PatchDiff refiner; None if there was nothing to refine, which drops its three terms.

    Returns:
        `nfl` of the decoder; `dice_global`, `bce_global` of the error map and `bnfl_global` of the refined mask; the
        same three with `_patch`.
    """
    losses = {"nfl": normalized_focal_loss(decoded, masks)}
    for name, refinement in (("global", overall), ("patch", patch)):
        if refinement is not None:
            losses |= {f"{term}_{name}": loss for term, loss in _refinement_losses(refinement).items()}
    return losses


def _refinement_losses(refinement: RefinementMasks) -> dict[str, Tensor]:
    wrong = error_region(refinement.coarse, refinement.masks)
    refined = boundary_normalized_focal_loss(refinement.refined, refinement.masks, region=wrong, valid=refinement.valid)
    return {
        "dice": dice_loss(refinement.error, wrong, valid=refinement.valid),
        "bce": cross_entropy(refinement.error, wrong, valid=refinement.valid),
        "bnfl": refined,
    }


def _checked(logits: Tensor, masks: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, masks and valid pixels, all float32 of the same shape."""
    if logits.shape != masks.shape or logits.ndim != 3 or (valid is not None and valid.shape != masks.shape):
        shapes = [tuple(t.shape) for t in (logits, masks, valid) if t is not None]
        raise UsageError("Logits and masks must have the same shape", expected="(P, h, w)", found=shapes)
    masks = masks.float()
    return logits.float(), masks, torch.ones_like(masks) if valid is None else valid.float()


def _mean_of_objects(losses: Tensor, counted: Tensor) -> Tensor:
    totals = counted.sum((-2, -1))
    return ((losses * counted).sum((-2, -1)) / totals.clamp_min(TINY)).mean()
