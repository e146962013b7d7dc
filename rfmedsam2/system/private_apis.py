"""Parts of other packages that we use although their authors promise nothing about them, and the check for each.

Where a release has changed one, the user reads which package, which version is installed and which are known to work,
instead of an AttributeError. Nothing is looked at when a module is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rfmedsam2.errors import PackageVersionError

KNOWN_TO_WORK = {
    "torch": ">=2.5.1,<=2.14.1",
    "batchgeneratorsv2": ">=0.3.2,<=0.3.6",
    "sam2": ">=1.1,<2",
}
"""Releases that the tests have run with, by distribution."""
PRIVATE = (
    ("torch", "torch.nn", "Module._compiled_call_impl"),
    ("torch", "torch.overrides", "_get_current_function_mode_stack"),
    ("torch", "torch.utils.data._utils.signal_handling", "_remove_worker_pids"),
    ("batchgeneratorsv2", "batchgeneratorsv2.transforms.spatial.spatial", "SpatialTransform._apply_to_segmentation"),
    ("sam2", "sam2.modeling.sam2_base", "SAM2Base._use_multimask"),
    ("sam2", "sam2.modeling.sam2_base", "SAM2Base._use_mask_as_output"),
)
"""(distribution, module, name in it) of all that can be seen without making an object."""


def private(owner: object, name: str, *, package: str) -> Any:
    """An attribute of another package's object, which its authors do not promise.

    Args:
        owner: object, class or module that should have it.
        name: of the attribute.
        package: distribution that `owner` comes from, one of `KNOWN_TO_WORK`.

    Raises:
        PackageVersionError: it is not there.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        where = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__
        raise _missing(f"{where}.{name}", package) from None


def missing() -> Iterator[PackageVersionError]:
    """What is no longer there of `PRIVATE`; packages that cannot be imported at all are left out."""
    for package, module, path in PRIVATE:
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == module.split(".")[0] and _version(package) is not None:
                yield _missing(module, package)
            continue
        except (ImportError, OSError):  # the package is damaged, which the doctor reports separately
            continue
        for name in path.split("."):
            found = getattr(found, name, missing)
            if found is missing:
                yield _missing(f"{module}.{path}", package)
                break


def _missing(what: str, package: str) -> PackageVersionError:
    known = KNOWN_TO_WORK[package]
    return PackageVersionError(
        f"The installed {package} lacks a part that this version of rfmedsam2 uses",
        where=what,
        expected=f"{package} {known}",
        found=f"{package} {_version(package) or 'of an unknown version'}",
        remedy=f"pip install '{package}{known}'",
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
