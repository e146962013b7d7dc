"""What each method's answer is compared by: its paper's losses, on the frame's own pixels."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_never

from rfmedsam2.nn.segmenter import Segmented
from segment_anything_hq.nn.patch_diff import cropped
from segment_anything_hq.prompts.clicks import IGNORE
from segment_anything_hq.records import Method
from segment_anything_hq.tasks.click_simulation import on_frames
from segment_anything_hq.tasks.losses import RefinementMasks, mask_losses, normalized_focal_loss, sam_ref_losses


def losses_of(method: Method, answer: Segmented, ground_truths: Tensor) -> dict[str, Tensor]:
    """The named terms whose sum a method is trained by.

    HQ-SAM and HQ-SAM 2: cross-entropy and Dice of the HQ token's mask alone (HQ-SAM paper, section 3.4). SAM2Refiner
    and SAM 2's decoder: the same of the final mask. SAM's decoder, SAM-REF's first stage: normalized focal loss.
    SAM-REF and SAM2-REF: seven terms (SAM-REF paper, eq. 3).

    Args:
        method: which.
        answer: of its network, to B objects.
        ground_truths: (B, S, S) int8: 1 object, 0 background, -1 ignored.
    """
    size, masks = ground_truths.shape[-1], ground_truths == 1
    valid = None if not (ground_truths == IGNORE).any() else ground_truths != IGNORE
    match method:
        case "hq_sam" | "hq_sam2":
            return mask_losses(on_frames(answer.extra["hq"], size), masks, valid=valid)
        case "sam2_refiner" | "sam2_decoder":
            return mask_losses(on_frames(answer.final, size), masks, valid=valid)
        case "sam_decoder":
            return {"nfl": normalized_focal_loss(on_frames(answer.final, size), masks, valid=valid)}
        case "sam_ref" | "sam2_ref":
            return _sam_ref(answer, masks, valid)
        case _:
            assert_never(method)


def _sam_ref(answer: Segmented, masks: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
    extra, size = answer.extra, masks.shape[-1]
    coarse, error, refined = (on_frames(extra[name], size) for name in ("coarse", "global_error", "global_mask"))
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
    """What of masks (p, S, S) lies within windows (p, 4) on maps of `side`: (p, side, side) bool."""
    return cropped(masks[:, None].float(), windows, side=side)[:, 0] > 0.5
