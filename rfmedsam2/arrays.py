"""Arrays as programs hand them in: NumPy, tensors of torch, nested lists of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from rfmedsam2.errors import UsageError, type_name


def is_array(thing: object) -> bool:
    """Whether `as_array` takes it: a NumPy array, a tensor, or lists that begin with a number or an array."""
    if not isinstance(thing, list | tuple):
        return _is_one(thing)
    innermost = _innermost(thing)
    return _is_one(innermost) or isinstance(innermost, int | float | np.number | np.bool_)


def _innermost(thing: object) -> object:
    """The first element of nested lists."""
    while isinstance(thing, list | tuple) and thing:
        thing = thing[0]
    return thing


def _is_one(thing: object) -> bool:
    return isinstance(thing, np.ndarray) or _is_tensor(thing)


def _is_tensor(thing: object) -> bool:
    return hasattr(thing, "detach") and hasattr(thing, "numpy")  # open files have "detach", too


def intensity_limit(dtype: np.dtype) -> float:
    """Largest magnitude of an intensity of this type, beyond which 32-bit floats do not show what the image shows.

    Floats would become infinite. Integers beyond 2^53 are markers, such as -1 as an unsigned number.
    """
    return float(np.finfo(np.float32).max) if dtype.kind == "f" else float(1 << 53)


def as_array(thing: Any, what: str) -> np.ndarray:
    """A NumPy array as it is; a tensor from any device, without its gradient; lists of numbers or arrays as one.

    Lists of masked arrays are a masked array.

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
        if _is_tensor(thing):
            # NumPy has no bfloat16, no sparse and no quantized arrays
            remedy = "Give tensor.to_dense().float(), or .long() where it holds masks or labels"
            return thing.detach().cpu().resolve_conj().resolve_neg().numpy()
        if is_array(thing):
            remedy = "Give lists, or arrays, of equal lengths"
            if not _is_one(_innermost(thing)):
                return np.array(thing)
            parts = [as_array(part, what) for part in thing]
            return (np.ma if any(isinstance(part, np.ma.MaskedArray) for part in parts) else np).stack(parts)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise UsageError(
        f"{what} is not an array of numbers",
        expected="a NumPy array, a tensor or nested lists of numbers",
        found=f"{type_name(thing)} of {thing.dtype}" if hasattr(thing, "dtype") else type_name(thing),
        remedy=remedy,
    )
