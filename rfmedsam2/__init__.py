"""Volumetric medical image segmentation: nnU-Net's plan-driven pipeline and RFMedSAM 2. Research use only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Grid", "Plan", "Predictor", "RfMedSamError", "Volume", "__version__"]

if TYPE_CHECKING:
    from rfmedsam2.errors import RfMedSamError
    from rfmedsam2.geometry import Grid
    from rfmedsam2.pipeline.prediction.predictor import Predictor
    from rfmedsam2.records.plan import Plan
    from rfmedsam2.volume import Volume

_HOMES = {
    "RfMedSamError": "rfmedsam2.errors",
    "Grid": "rfmedsam2.geometry",
    "Volume": "rfmedsam2.volume",
    "Predictor": "rfmedsam2.pipeline.prediction.predict",
    "Plan": "rfmedsam2.records.plan",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that importing the package stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
