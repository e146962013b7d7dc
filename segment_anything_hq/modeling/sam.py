"""SAM and HQ-SAM with the published package's interface: batches of images and prompts to masks."""

from __future__ import annotations

from typing import Any

import torch
from segment_anything.modeling import Sam as SamBase
from torch import Tensor

from rfmedsam2.errors import ImageError
from rfmedsam2.nn.loading import LoadReport
from rfmedsam2.nn.segmenter import IMAGENET_MEAN, IMAGENET_STD
from segment_anything_hq.modeling.image_encoder import ImageEncoderViT
from segment_anything_hq.modeling.mask_decoder import MaskDecoder
from segment_anything_hq.modeling.mask_decoder_hq import MaskDecoderHQ
from segment_anything_hq.modeling.prompt_encoder import PromptEncoder
from segment_anything_hq.modeling.tiny_vit_sam import TinyViT

__all__ = ["ImageEncoderViT", "MaskDecoder", "PromptEncoder", "Sam"]

PIXEL_MEAN = [255 * value for value in IMAGENET_MEAN]
PIXEL_STD = [255 * value for value in IMAGENET_STD]


class Sam(SamBase):
    """SAM whose encoder also returns early features, and whose decoder may be HQ-SAM's.

    Args:
        image_encoder: `ImageEncoderViT` or `TinyViT`.
        prompt_encoder: the prompt encoder of `segment_anything`.
        mask_decoder: `MaskDecoderHQ`, or `MaskDecoder`, which is SAM's own.
        pixel_mean: mean per channel, for values 0 to 255.
        pixel_std: standard deviation per channel, for values 0 to 255.

    Attributes:
        load_report: which parameters the last checkpoint contained; None before one is loaded.
    """

    image_encoder: ImageEncoderViT | TinyViT
    mask_decoder: MaskDecoderHQ | MaskDecoder

    def __init__(
        self,
        image_encoder: ImageEncoderViT | TinyViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoderHQ | MaskDecoder,
        pixel_mean: list[float] = PIXEL_MEAN,
        pixel_std: list[float] = PIXEL_STD,
    ) -> None:
        # the base class is typed for its own encoder and decoder
        super().__init__(image_encoder, prompt_encoder, mask_decoder, pixel_mean, pixel_std)  # pyright: ignore[reportArgumentType]
        self.load_report: LoadReport | None = None

    def preprocess(self, x: Tensor) -> Tensor:
        """Normalize and pad an image (..., 3, h, w) of 0 to 255 to the encoder's size.

        Raises:
            ImageError: values are NaN or infinite.
        """
        if not x.isfinite().all():
            found = f"{int((~x.isfinite()).sum())} of {x.numel()} are not"
            raise ImageError("The image holds NaN or infinity", expected="finite numbers", found=found)
        return super().preprocess(x)

    @torch.no_grad()
    def forward(
        self, batched_input: list[dict[str, Any]], multimask_output: bool, hq_token_only: bool = False
    ) -> list[dict[str, Tensor]]:
        """Predict masks for the prompts of every image.

        Args:
            batched_input: one dict per image with "image" (3, h, w), values 0 to 255, longer side S; "original_size",
                its (H, W); and for its P prompts any of "point_coords" (P, k, 2) with "point_labels" (P, k), "boxes"
                (P, 4) XYXY, both in frame pixels, and "mask_inputs" (P, 1, 4s, 4s).
            multimask_output: use the best of the masks for ambiguous prompts.
            hq_token_only: use the HQ token's mask alone, not its sum with SAM's mask.

        Returns:
            one dict per image: "masks" (P, 1, H, W) bool, "iou_predictions" (P, 1), "low_res_logits" (P, 1, 4s, 4s).
        """
        frames = torch.stack([self.preprocess(record["image"]) for record in batched_input])
        embeddings, early = self.image_encoder(frames)
        outputs = []
        for index, record in enumerate(batched_input):
            points = (record["point_coords"], record["point_labels"]) if "point_coords" in record else None
            sparse, dense = self.prompt_encoder(
                points=points, boxes=record.get("boxes"), masks=record.get("mask_inputs")
            )
            logits, scores = self.mask_decoder(
                image_embeddings=embeddings[index, None],
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask_output,
                hq_token_only=hq_token_only,
                interm_embeddings=[early[0][index, None]],
            )
            masks = self.postprocess_masks(logits, record["image"].shape[-2:], record["original_size"])
            outputs.append({"masks": masks > self.mask_threshold, "iou_predictions": scores, "low_res_logits": logits})
        return outputs
