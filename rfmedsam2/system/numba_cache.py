"""How loops are compiled: kept on disk between runs where there is a place for that, else anew in each process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:
    """Decorate a function of arrays and numbers: it is compiled when first called, and releases the interpreter lock.

    numba refuses to decorate where it can keep nothing: a package that may not be written, and no home folder.

    Args:
        options: numba's, such as fastmath.
    """

    def decorate(function: F) -> F:
        try:
            return cast(F, njit(nogil=True, cache=True, **options)(function))
        except RuntimeError:
            return cast(F, njit(nogil=True, **options)(function))

    return decorate
