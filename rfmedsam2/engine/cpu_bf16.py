"""What torch computes wrongly or slowly in bf16 while a CPU trains, computed otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
WIDE_KERNEL = 5
"""Depthwise kernels of this width and more are trained in float32."""


class CpuBf16(TorchFunctionMode):
    """Context of forward and backward passes under a CPU's bf16 autocast (torch 2.14.1).

    - Feature maps that are narrower than the kernel are convolved in float32: parts of the weights' bf16 gradient are
      uninitialized there, with a kernel of 3 on a depth of 2, a kernel of 7 on a height of 2. Such maps are the deepest
      and smallest of a network: float32 costs nothing.
    - Wide depthwise kernels (the 7x7 of SAM 2's memory encoder) are convolved in float32 with the channels last, which
      takes a fifth of the time of bf16 with backward pass (AMX, 23 maps of 256 channels of 16x16: 43 and 195 ms).
    - Attention with gradients is two matrix products and a softmax: torch's fused kernel takes 1.3 to 7 times as
      long, and longer than in float32 (AMX, 23 objects, 8 heads of 16 channels, 256 queries, 7 keys: 17 and 114 ms).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if torch.is_autocast_enabled("cpu"):
            if func in CONVOLUTIONS:
                return _convolved(func, *args, **given)
            if func is F.scaled_dot_product_attention and torch.is_grad_enabled():
                return _attended(*args, **given)
        return func(*args, **given)


def _convolved(function: Callable[..., Tensor], maps: Tensor, weight: Tensor, *args: Any, **given: Any) -> Tensor:
    """A convolution, in float32 where bf16 is wrong or slow."""
    sizes, kernel = maps.shape[2:], weight.shape[2:]
    small = any(size < width for size, width in zip(sizes, kernel, strict=False))
    wide = weight.shape[1] == 1 and len(kernel) == 2 and min(kernel) >= WIDE_KERNEL and torch.is_grad_enabled()
    if not small and not wide:
        return function(maps, weight, *args, **given)
    with torch.autocast("cpu", enabled=False):
        maps = maps.to(weight.dtype)
        if wide:
            maps = maps.contiguous(memory_format=torch.channels_last)
        return function(maps, weight, *args, **given)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, **given: Any) -> Tensor:
    """Attention of queries (..., Q, C), keys (..., K, C) and values (..., K, D): (..., Q, D)."""
    scale = given.pop("scale", None)
    if any(given.values()) or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask, scale=scale, **given)
    scores = (queries * (queries.shape[-1] ** -0.5 if scale is None else scale)) @ keys.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).to(values.dtype) @ values
