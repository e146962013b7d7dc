"""The training loss of each method, from its paper, at the frame's resolution."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_never

from rfmedsam2.nn.segmenter import Segmented
from segment_anything_hq.choices import Method
from segment_anything_hq.nn.patch_diff import cropped
from segment_anything_hq.prompts.clicks import IGNORE
from segment_anything_hq.tasks.click_simulation import upsample_to_frame
from segment_anything_hq.tasks.losses import RefinementMasks, mask_losses, normalized_focal_loss, sam_ref_losses


def method_losses(method: Method, answer: Segmented, ground_truths: Tensor) -> dict[str, Tensor]:
    """The loss terms of a method, by name; training minimizes their sum.

    HQ-SAM and HQ-SAM 2: cross-entropy and Dice of the HQ token's mask alone (HQ-SAM paper, section 3.4). SAM2Refiner
    and SAM 2's decoder: the same of the final mask. SAM's decoder, SAM-REF's first stage: normalized focal loss.
    SAM-REF and SAM2-REF: seven terms (SAM-REF paper, eq. 3).

    Args:
        method: the method that is trained.
        answer: output of its network for B objects.
        ground_truths: (B, S, S) int8: 1 object, 0 background, -1 ignored.
    """
    size, masks = ground_truths.shape[-1], ground_truths == 1
    valid = None if not (ground_truths == IGNORE).any() else ground_truths != IGNORE
    match method:
        case "hq_sam" | "hq_sam2":
            return mask_losses(upsample_to_frame(answer.extra["hq"], size), masks, valid=valid)
        case "sam2_refiner" | "sam2_decoder":
            return mask_losses(upsample_to_frame(answer.final, size), masks, valid=valid)
        case "sam_decoder":
            return {"nfl": normalized_focal_loss(upsample_to_frame(answer.final, size), masks, valid=valid)}
        case "sam_ref" | "sam2_ref":
            return _sam_ref(answer, masks, valid)
        case _:
            assert_never(method)


def _sam_ref(answer: Segmented, masks: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
    extra, size = answer.extra, masks.shape[-1]
    coarse, error, refined = (
        upsample_to_frame(extra[name], size) for name in ("coarse", "global_error", "global_mask")
    )
    overall = RefinementMasks(coarse=coarse, error=error, refined=refined, masks=masks, valid=valid)
    patch = None
    if "rows" in extra:
        rows, windows = extra["rows"], extra["windows"]
        side = extra["patch_mask"].shape[-1]
        patch = RefinementMasks(
            coarse=extra["patch_coarse"],
            error=extra["patch_error"],
            refined=extra["patch_mask"],
            masks=_within(masks[rows], windows, side),
            valid=None if valid is None else _within(valid[rows], windows, side),
        )
    return sam_ref_losses(coarse, masks, overall=overall, patch=patch)


def _within(masks: Tensor, windows: Tensor, side: int) -> Tensor:
    """Crop masks (p, S, S) to windows (p, 4) and resize to (p, side, side) bool."""
    return cropped(masks[:, None].float(), windows, side=side)[:, 0] > 0.5
