"""Natural-image refiners on the trainer of `rfmedsam2`: HQ-SAM, SAM-REF, SAM2Refiner.

On top the names of the published package `segment_anything_hq`, so that programs written for it run unchanged. Beside
them, for all methods of this one: `load_model`, `InteractivePredictor`, `VideoPredictor` and `evaluate_noc`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "InteractivePredictor",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "VideoPredictor",
    "build_sam",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "build_sam_vit_t",
    "evaluate_noc",
    "load_model",
    "sam_model_registry",
    "sam_model_registry_baseline",
]

if TYPE_CHECKING:
    from segment_anything_hq.automatic_mask_generator import SamAutomaticMaskGenerator
    from segment_anything_hq.build_sam import (
        build_sam,
        build_sam_vit_b,
        build_sam_vit_h,
        build_sam_vit_l,
        build_sam_vit_t,
        sam_model_registry,
    )
    from segment_anything_hq.build_sam_baseline import sam_model_registry_baseline
    from segment_anything_hq.evaluation.noc import evaluate_noc
    from segment_anything_hq.inference.interactive import InteractivePredictor
    from segment_anything_hq.models import load_model
    from segment_anything_hq.predictor import SamPredictor
    from segment_anything_hq.video.predictor import VideoPredictor

_HOMES = {
    "InteractivePredictor": "inference.interactive",
    "VideoPredictor": "video.predictor",
    "evaluate_noc": "evaluation.noc",
    "load_model": "models",
    "SamAutomaticMaskGenerator": "automatic_mask_generator",
    "SamPredictor": "predictor",
    "sam_model_registry_baseline": "build_sam_baseline",
}
"""Modules of the public names; of all others `build_sam`."""


def __getattr__(name: str) -> Any:
    """Load public names when they are first used, so that importing the package does nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # importing a module puts it on the package by its own name, which "build_sam" shares with a function
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'build_sam')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
