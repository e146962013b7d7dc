"""SimpleITK as `sitk`, loaded when it is first used: NIfTI files need none, and it takes 70 ms of every start."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813 - its usual name
else:

    class _LoadedWhenUsed:
        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("SimpleITK"), name)

    sitk = _LoadedWhenUsed()

__all__ = ["sitk"]
