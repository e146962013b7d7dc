"""What is computed otherwise than by torch's bf16 kernels while a CPU trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rfmedsam2.engine.runtime import Runtime

RUNTIME = Runtime(device=torch.device("cpu"), precision=torch.bfloat16)


def attention_tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Queries (2, 4, 6, 8), keys (2, 4, 3, 8) and values (2, 4, 3, 8)."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, n, 8, generator=generator, requires_grad=True) for n in (6, 3, 3))  # type: ignore[return-value]


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("masked", ["no", "float", "bool"])
def test_attention_equals_float32_with_its_gradients(scale: float | None, masked: str) -> None:
    mask = {
        "no": None,
        "float": torch.linspace(-2, 2, 18).reshape(6, 3),
        "bool": torch.tensor([[True, False, True]]).expand(6, 3),
    }[masked]
    tensors = attention_tensors()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=scale)
    with RUNTIME.whole_gradients(), RUNTIME.autocast():
        ours = F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=scale)
    assert ours.dtype == torch.bfloat16
    answers = [(a, *torch.autograd.grad(a.square().sum(), tensors)) for a in (exact, ours.float())]
    for expected, found in zip(*answers, strict=True):
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_attention_with_gradients_needs_no_fused_kernel() -> None:
    with RUNTIME.whole_gradients(), RUNTIME.autocast():
        learning = F.scaled_dot_product_attention(*attention_tensors())
        with torch.no_grad():
            looking = F.scaled_dot_product_attention(*attention_tensors())
    assert "ScaledDotProduct" not in type(learning.grad_fn).__name__
    assert looking.grad_fn is None


def test_causal_attention_stays_torchs_own() -> None:
    queries, keys, values = attention_tensors()
    queries = queries[:, :, :3]
    with RUNTIME.whole_gradients(), RUNTIME.autocast():
        ours = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    assert (ours[:, :, 0].float() - values[:, :, 0]).abs().max() < 0.02  # the first query sees the first key alone


def test_wide_depthwise_kernels_are_convolved_in_float32_while_training() -> None:
    maps, wide, narrow = torch.randn(2, 8, 16, 16), torch.randn(8, 1, 7, 7), torch.randn(8, 1, 3, 3)
    with RUNTIME.whole_gradients(), RUNTIME.autocast():
        found = F.conv2d(maps, wide, padding=3, groups=8)
        assert F.conv2d(maps, narrow, padding=1, groups=8).dtype == torch.bfloat16
        with torch.no_grad():
            assert F.conv2d(maps, wide, padding=3, groups=8).dtype == torch.bfloat16
    torch.testing.assert_close(found, F.conv2d(maps, wide, padding=3, groups=8), atol=1e-4, rtol=1e-4)
