"""Layers shared by SAM's parts, re-exported unchanged from `segment_anything`."""

from __future__ import annotations

from segment_anything.modeling.common import LayerNorm2d, MLPBlock

__all__ = ["LayerNorm2d", "MLPBlock"]
