"""Layers that SAM's parts share: `segment_anything`'s, unchanged."""

from __future__ import annotations

from segment_anything.modeling.common import LayerNorm2d, MLPBlock

__all__ = ["LayerNorm2d", "MLPBlock"]
