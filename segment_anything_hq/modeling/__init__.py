"""Network parts of SAM and HQ-SAM, under the published package's names."""

from __future__ import annotations

from segment_anything_hq.modeling.image_encoder import ImageEncoderViT
from segment_anything_hq.modeling.mask_decoder import MaskDecoder
from segment_anything_hq.modeling.mask_decoder_hq import MaskDecoderHQ
from segment_anything_hq.modeling.prompt_encoder import PromptEncoder
from segment_anything_hq.modeling.sam import Sam
from segment_anything_hq.modeling.tiny_vit_sam import TinyViT
from segment_anything_hq.modeling.transformer import TwoWayTransformer

__all__ = ["ImageEncoderViT", "MaskDecoder", "MaskDecoderHQ", "PromptEncoder", "Sam", "TinyViT", "TwoWayTransformer"]
