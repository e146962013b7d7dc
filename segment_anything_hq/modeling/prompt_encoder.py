"""SAM's prompt encoder, re-exported unchanged from `segment_anything`."""

from __future__ import annotations

from segment_anything.modeling.prompt_encoder import LayerNorm2d, PositionEmbeddingRandom, PromptEncoder

__all__ = ["LayerNorm2d", "PositionEmbeddingRandom", "PromptEncoder"]
