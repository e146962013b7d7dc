"""Arrays as programs hand them in: NumPy, tensors of torch, nested lists of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from rfmedsam2.errors import UsageError, type_name


def is_array(thing: object) -> bool:
    """Whether `as_array` takes it: a NumPy array, a tensor, or lists that begin with a number."""
    if isinstance(thing, np.ndarray) or hasattr(thing, "detach"):
        return True
    if not isinstance(thing, list | tuple):
        return False
    while isinstance(thing, list | tuple) and thing:
        thing = thing[0]
    return isinstance(thing, int | float | np.number | np.bool_)


def as_array(thing: Any, what: str) -> np.ndarray:
    """A NumPy array as it is; a tensor from any device, without its gradient; nested lists as an array.

    Args:
        thing: what was handed in.
        what: what it is, for messages ("The reference").

    Raises:
        UsageError: anything else, or lists of unequal lengths.
    """
    if isinstance(thing, np.ndarray):
        return thing
    remedy = None
    try:
        if hasattr(thing, "detach"):
            remedy = "Give tensor.float()"  # NumPy has no bfloat16
            return thing.detach().cpu().numpy()
        if is_array(thing):
            remedy = "Give lists of equal lengths"
            return np.array(thing)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise UsageError(
        f"{what} is not an array of numbers",
        expected="a NumPy array, a tensor or nested lists of numbers",
        found=f"{type_name(thing)} of {thing.dtype}" if hasattr(thing, "dtype") else type_name(thing),
        remedy=remedy,
    )
