"""How well a segmentation fits a reference: scores of masks (`dice`, `nsd`, `hd95`), label maps and boundaries."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["dice", "hd95", "nsd"]

if TYPE_CHECKING:
    from rfmedsam2.metrics.masks import dice, hd95, nsd


def __getattr__(name: str) -> Any:
    """Load public names when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("rfmedsam2.metrics.masks"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
