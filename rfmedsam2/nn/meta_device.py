"""Networks without numbers: built on the device "meta" to count their parameters, or to be given weights at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def skip_init() -> Iterator[None]:
    """Build modules within: their tensors have shapes and nothing else, and no random number is drawn."""
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    """Leaves tensors as they are where modules are initialized: drawn from a distribution, or scaled by a number.

    On "meta", torch does these in Python, for which it imports its compiler: two seconds and 150 MB.
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
