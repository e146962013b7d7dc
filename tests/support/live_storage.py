"""Bytes of tensors that are alive, and bytes that autograd keeps: counted, not sampled.

Every operation's results are followed until their storage is freed. What kernels allocate and free within one
operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorage(TorchDispatchMode):
    """While entered, follows the storages of all results.

    Attributes:
        now: bytes alive that were made since.
        peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = func(*args, **kwargs)
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and _storage(result) not in before:
                self._follow(result)
        return results

    def reset_peak(self) -> None:
        """Begin the peak anew at what is alive."""
        self.peak = self.now

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._watched[key] = weakref.ref(storage, lambda _: self._free(key))
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self._watched.pop(key, None)
        self.now -= self._sizes.pop(key)


@dataclass(slots=True)
class Kept:
    """What autograd kept: `bytes` of distinct storages, `count` of them."""

    bytes: int = 0
    count: int = 0


@contextmanager
def kept_by_autograd(*, besides: Sequence[Tensor] = ()) -> Iterator[Kept]:
    """Count the distinct storages that autograd saves, besides those of given tensors (weights, inputs).

    Autograd must keep what it saved until the count is read: hold on to the results.
    """
    kept, seen = Kept(), {_storage(t) for t in besides}

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in seen:
            seen.add(key)
            kept.bytes += tensor.untyped_storage().nbytes()
            kept.count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
