"""Compilation with numba, cached on disk where the cache folder is writable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:
    """Decorate a function of arrays and numbers: compiled on the first call, runs without the GIL.

    numba raises RuntimeError if neither the package nor the home folder is writable; the function is then compiled
    again in each process.

    Args:
        options: options of `numba.njit`, such as fastmath.
    """

    def decorate(function: F) -> F:
        try:
            return cast(F, njit(nogil=True, cache=True, **options)(function))
        except RuntimeError:
            return cast(F, njit(nogil=True, **options)(function))

    return decorate
