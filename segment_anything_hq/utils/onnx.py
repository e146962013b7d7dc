"""HQ-SAM's prompt encoder and mask decoder as one module for ONNX export: image features and prompts to masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.utils.onnx import SamOnnxModel as PlainOnnxModel
from torch import Tensor

from rfmedsam2.errors import UsageError
from segment_anything_hq.modeling import Sam
from segment_anything_hq.modeling.mask_decoder_hq import MaskDecoderHQ
from segment_anything_hq.utils.amg import calculate_stability_score

__all__ = ["INPUTS", "OUTPUTS", "Sam", "SamOnnxModel", "calculate_stability_score"]

INPUTS = (
    "image_embeddings",
    "interm_embeddings",
    "point_coords",
    "point_labels",
    "mask_input",
    "has_mask_input",
    "orig_im_size",
)
"""Names of the inputs, in the order of `SamOnnxModel.forward`."""
OUTPUTS = ("masks", "iou_predictions", "low_res_masks")


class SamOnnxModel(PlainOnnxModel):
    """The module to export; boxes are passed as points (their corners have the labels 2 and 3).

    Args:
        model: HQ-SAM.
        hq_token_only: return the HQ token's mask alone, not its sum with SAM's mask.
        multimask_output: use the best by predicted IoU of the masks for ambiguous prompts.
        use_stability_score: return the masks' stability instead of their predicted IoU.
        return_extra_metrics: also return stability and area.

    Raises:
        UsageError: the model is a plain SAM.
    """

    def __init__(
        self,
        model: Sam,
        hq_token_only: bool = False,
        multimask_output: bool = False,
        use_stability_score: bool = False,
        return_extra_metrics: bool = False,
    ) -> None:
        if not isinstance(model.mask_decoder, MaskDecoderHQ):
            raise UsageError("SamOnnxModel exports HQ-SAM", remedy="Export a plain SAM with segment_anything")
        super().__init__(model, not multimask_output, use_stability_score, return_extra_metrics)
        self.decoder = model.mask_decoder
        self.hq_token_only = hq_token_only
        self.multimask_output = multimask_output

    @torch.no_grad()
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_embeddings: Tensor,
        interm_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, ...]:
        """Predict masks for the prompts of one image.

        Args:
            image_embeddings: (1, 256, s, s).
            interm_embeddings: (1, 1, s, s, C) the early features.
            point_coords: (P, k, 2) XY in pixels of the frame.
            point_labels: (P, k) 1 positive, 0 negative, 2 and 3 box corners, -1 padding.
            mask_input: (1, 1, 4s, 4s) logits.
            has_mask_input: (1,) 1 if `mask_input` is used, else 0.
            orig_im_size: (2,) the image's height and width.

        Returns:
            logits (P, 1, H, W), scores (P, 1), with `return_extra_metrics` stability and area (P, 1) each, and
            low-resolution logits (P, 1, 4s, 4s).
        """
        masks, scores = self.decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self._embed_points(point_coords, point_labels),
            dense_prompt_embeddings=self._embed_masks(mask_input, has_mask_input),
            hq_features=self.decoder.hq_features(image_embeddings, [interm_embeddings[0]]),
        )
        sam, hq = masks[:, :-1], masks[:, -1:]
        if self.use_stability_score:
            scores = self._stability(sam)
        if self.multimask_output:
            best = scores[:, 1:].argmax(dim=1, keepdim=True) + 1
            scores = scores.gather(1, best)
            sam = sam.gather(1, best[..., None, None].expand(-1, -1, *sam.shape[2:]))
        else:
            scores, sam = scores[:, :1], sam[:, :1]
        logits = hq if self.hq_token_only else sam + hq
        upscaled = self.mask_postprocessing(logits, orig_im_size)
        if not self.return_extra_metrics:
            return upscaled, scores, logits
        areas = (upscaled > self.model.mask_threshold).sum(-1).sum(-1)
        return upscaled, scores, self._stability(upscaled), areas, logits

    def mask_postprocessing(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        """Resize logits (P, 1, 4s, 4s) to the image's size, which remains an input of the exported graph."""
        masks = F.interpolate(masks, (self.img_size, self.img_size), mode="bilinear", align_corners=False)
        inside = self.resize_longest_image_size(orig_im_size, self.img_size)
        masks = masks[..., : inside[0], : inside[1]]
        size = orig_im_size.to(torch.int64)
        return F.interpolate(masks, (size[0], size[1]), mode="bilinear", align_corners=False)  # pyright: ignore[reportArgumentType]

    def _stability(self, masks: Tensor) -> Tensor:
        return calculate_stability_score(masks, self.model.mask_threshold, self.stability_score_offset)
