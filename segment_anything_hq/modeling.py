"""The published package's names of network parts."""

from __future__ import annotations

from segment_anything.modeling import PromptEncoder, TwoWayTransformer

from segment_anything_hq.nn.hq_decoder import MaskDecoder, MaskDecoderHQ
from segment_anything_hq.nn.hq_sam import Sam
from segment_anything_hq.nn.vit import ImageEncoderViT, TinyViT

__all__ = ["ImageEncoderViT", "MaskDecoder", "MaskDecoderHQ", "PromptEncoder", "Sam", "TinyViT", "TwoWayTransformer"]
