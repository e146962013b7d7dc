"""SAM's prompt encoder: `segment_anything`'s, unchanged."""

from __future__ import annotations

from segment_anything.modeling.prompt_encoder import LayerNorm2d, PositionEmbeddingRandom, PromptEncoder

__all__ = ["LayerNorm2d", "PositionEmbeddingRandom", "PromptEncoder"]
