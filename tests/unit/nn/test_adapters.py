"""Adapters: what each adds, and that it adds nothing before it is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rfmedsam2.nn.adapters import (
    Adapter,
    ChannelAdapter,
    CNNAdapter,
    DWConvAdapter,
    WithAdapter,
    adapted,
    adapted_positions,
)

SHAPES = [(Adapter, (2, 5, 8)), (DWConvAdapter, (2, 4, 6, 8)), (CNNAdapter, (2, 8, 4, 6))]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def perturbed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
def test_an_untrained_adapter_adds_nothing(kind, shape):
    x = torch.randn(shape)
    assert torch.equal(kind(8)(x), torch.zeros(shape))
    assert torch.equal(adapted(x, kind(8)), x)


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
def test_every_parameter_learns_once_the_last_projection_has_moved(kind, shape):
    adapter = perturbed(kind(8))
    added = adapter(torch.randn(shape))
    assert added.shape == shape
    added.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


@pytest.mark.parametrize(("kind", "spatial"), [(Adapter, 0), (DWConvAdapter, 11), (CNNAdapter, 11)])
def test_width_of_the_bottleneck_and_count(kind, spatial):
    features, hidden = 32, 8
    down, up = features * hidden + hidden, hidden * features + features
    # depth-wise 3x3 with bias (10 a channel), layer norm (2 a channel), less what a plain adapter has not
    expected = down + up + (hidden * (spatial + 1) if spatial else 0)
    assert sum(p.numel() for p in kind(features, ratio=0.25).parameters()) == expected


@pytest.mark.parametrize("kind", [DWConvAdapter, CNNAdapter])
def test_spatial_adapters_see_the_nearest_neighbors(kind):
    adapter = perturbed(kind(8, ratio=1.0))
    channels = 3 if kind is DWConvAdapter else 1
    x = torch.randn(1, 7, 7, 8).movedim(3, channels)
    touched = x.clone()
    touched.movedim(channels, 3)[0, 3, 3] += 1.0
    changed = (adapter(touched) - adapter(x)).abs().sum(channels)[0] > 1e-6
    near = torch.zeros(7, 7, dtype=torch.bool)
    near[2:5, 2:5] = True
    assert torch.equal(changed, near)


def test_dwconv_keeps_what_comes_in_where_the_convolution_gives_nothing():
    adapter = perturbed(DWConvAdapter(8))
    nn.init.zeros_(adapter.norm.weight)
    nn.init.zeros_(adapter.norm.bias)
    x = torch.randn(1, 4, 4, 8)
    torch.testing.assert_close(adapter(x), adapter.up(adapter.down(x)))


def test_tokens_of_square_maps_are_the_same_as_positions():
    adapter = perturbed(DWConvAdapter(8))
    x = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(adapted_positions(x.flatten(1, 2), adapter), (x + adapter(x)).flatten(1, 2))
    assert adapted_positions(x, None) is x


@pytest.mark.parametrize(("channels", "start"), [(1, lambda x: x.expand(-1, 3, -1, -1)), (3, lambda x: x)])
def test_the_channel_adapter_starts_as_replication_or_identity(channels, start):
    x = torch.randn(2, channels, 9, 7)
    assert torch.equal(ChannelAdapter(channels, 16)(x), start(x))


def test_the_channel_adapter_starts_with_the_mean_of_other_numbers_of_channels():
    x = torch.randn(2, 4, 9, 7)
    out = ChannelAdapter(4, 16)(x)
    assert torch.equal(out, x.mean(1, keepdim=True).expand(-1, 3, -1, -1))


def test_a_wrapped_module_is_adapted_and_still_there():
    convolution = nn.Conv2d(3, 8, 3)
    wrapped = WithAdapter(convolution, perturbed(CNNAdapter(8)))
    x = torch.randn(1, 3, 6, 6)
    y = convolution(x)
    torch.testing.assert_close(wrapped(x), y + wrapped.adapter(y))
    assert wrapped.original is convolution


@pytest.mark.parametrize(("kind", "shape"), [*SHAPES, (lambda n: ChannelAdapter(n, 16), (1, 8, 5, 5))])
def test_bf16_autocast_runs_forward_and_backward(kind, shape):
    adapter = perturbed(kind(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        added = adapter(torch.randn(shape))
    added.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
