"""Compilation with numba, cached on disk where the cache folder is writable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

from rfmedsam2.system.memory import require_allocatable

COMPILER_BYTES = 24 << 20
"""Upper bound of what LLVM allocates to compile one of our functions or to load it from the cache."""

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
            return cast(F, _within_memory(njit(nogil=True, cache=True, **options)(function)))
        except RuntimeError:
            return cast(F, _within_memory(njit(nogil=True, **options)(function)))

    return decorate


def _within_memory(function: Any) -> Any:
    """The same function, which raises MemoryError where LLVM would end the process because it gets no memory."""
    compile_for = function.compile

    def checked(signature: object) -> object:
        require_allocatable(COMPILER_BYTES)
        return compile_for(signature)

    function.compile = checked
    return function
