"""Building networks without initialization: on the meta device, or before loading weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def skip_init() -> Iterator[None]:
    """Inside the `with` block, modules are built without initializing tensors or drawing random numbers."""
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    """Skips random initialization and scaling of tensors.

    On the meta device, torch would run these in Python and import its compiler for it: two seconds and 150 MB.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return given["tensor"] if "tensor" in given else args[0]
        drawn = func in (Tensor.normal_, Tensor.uniform_)
        if drawn or (func in (Tensor.mul, Tensor.__rmul__) and isinstance(args[1], float)):
            return args[0]
        return func(*args, **given)
