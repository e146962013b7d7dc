"""Our TinyViT against timm's on equal weights."""

from __future__ import annotations

import torch
from timm.models.tiny_vit import MBConv as TimmMBConv
from timm.models.tiny_vit import PatchMerging as TimmPatchMerging
from timm.models.tiny_vit import TinyVitBlock as TimmBlock
from torch import nn

from rfmedsam2.nn.sam2.tiny_vit import Downsample, MBConv, TinyVitBlock


def randomised(module: nn.Module) -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=rng) * 0.3 + 0.05)
    return module.eval()


def renamed(theirs: nn.Module) -> dict[str, torch.Tensor]:
    return {key.replace(".conv.", ".c."): value for key, value in theirs.state_dict().items()}


def test_attention_blocks_equal_timms_with_and_without_padding() -> None:
    theirs = randomised(TimmBlock(64, 2, window_size=7))
    ours = TinyVitBlock(64, heads=2, window=7).eval()
    ours.load_state_dict(renamed(theirs))
    for height, width in ((7, 7), (14, 21), (8, 5)):
        x = torch.randn(2, height, width, 64)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_convolution_blocks_equal_timms() -> None:
    x = torch.randn(2, 32, 8, 8)
    for theirs, ours in (
        (TimmMBConv(32, 32, 4.0, nn.GELU, 0.0), MBConv(32)),
        (TimmPatchMerging(32, 48, nn.GELU), Downsample(32, 48, stride=2)),
    ):
        ours.eval().load_state_dict(renamed(randomised(theirs)))
        torch.testing.assert_close(ours(x), theirs(x.clone()), rtol=1e-5, atol=1e-5)
