"""TinyViT's blocks and stages, with the published package's names and arguments.

Tensors are channels-last in memory throughout, so that converting between maps (B, C, h, w) and sequences (B, h * w, C)
copies nothing. Source: Wu et al. 2022 (TinyViT).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.sam2.tiny_vit import Mlp
from rfmedsam2.nn.sam2.tiny_vit import WindowAttention as Attention

__all__ = [
    "Attention",
    "BasicLayer",
    "Conv2d_BN",
    "ConvLayer",
    "DropPath",
    "MBConv",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "TinyViTBlock",
]

UNSTRIDED = (320, 448, 576)
"""Widths of the last stage, before which there is no downsampling, as SAM needs stride 16 (MobileSAM)."""


class Conv2d_BN(nn.Sequential):  # noqa: N801
    """Convolution without bias from a to b channels, followed by batch normalization."""

    def __init__(
        self,
        a: int,
        b: int,
        ks: int = 1,
        stride: int = 1,
        pad: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bn_weight_init: float = 1,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(a, b, ks, stride, pad, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(b)
        nn.init.constant_(self.bn.weight, bn_weight_init)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Fold the normalization into a single convolution, equivalent in evaluation mode."""
        return nn.utils.fuse_conv_bn_eval(self.c.eval(), self.bn.eval())


class DropPath(StochasticDepth):
    """Drops whole samples of a residual branch in training, with probability `drop_prob`."""

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__(drop_prob or 0.0, mode="row")
        self.drop_prob = drop_prob


class PatchEmbed(nn.Module):
    """Two strided convolutions, (B, in_chans, h, w) -> (B, embed_dim, h/4, w/4)."""

    def __init__(
        self, in_chans: int, embed_dim: int, resolution: int | tuple[int, int], activation: type[nn.Module]
    ) -> None:
        super().__init__()
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.patches_resolution = (height // 4, width // 4)
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        half = embed_dim // 2
        self.seq = nn.Sequential(Conv2d_BN(in_chans, half, 3, 2, 1), activation(), Conv2d_BN(half, embed_dim, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted bottleneck with a shortcut, (B, in_chans, h, w) -> (B, out_chans, h, w)."""

    def __init__(
        self, in_chans: int, out_chans: int, expand_ratio: float, activation: type[nn.Module], drop_path: float
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.hidden_chans = hidden = int(in_chans * expand_ratio)
        self.out_chans = out_chans
        self.conv1, self.act1 = Conv2d_BN(in_chans, hidden), activation()
        self.conv2, self.act2 = Conv2d_BN(hidden, hidden, 3, 1, 1, groups=hidden), activation()
        self.conv3, self.act3 = Conv2d_BN(hidden, out_chans, bn_weight_init=0.0), activation()
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        inner = self.conv3(self.act2(self.conv2(self.act1(self.conv1(x)))))
        return self.act3(x + self.drop_path(inner))


class PatchMerging(nn.Module):
    """Downsample to the next stage's width and half the resolution; before the last stage, keep the resolution.

    Shapes:
        (B, h * w, dim) or (B, dim, h, w) -> (B, positions, out_dim).
    """

    def __init__(self, input_resolution: tuple[int, int], dim: int, out_dim: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        self.dim = dim
        self.out_dim = out_dim
        self.act = activation()
        stride = 1 if out_dim in UNSTRIDED else 2
        self.conv1 = Conv2d_BN(dim, out_dim)
        self.conv2 = Conv2d_BN(out_dim, out_dim, 3, stride, 1, groups=out_dim)
        self.conv3 = Conv2d_BN(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.ndim == 3:
            x = _maps(x, self.input_resolution)
        return _sequence(self.conv3(self.act(self.conv2(self.act(self.conv1(x))))))


class ConvLayer(nn.Module):
    """The first stage, of MBConv blocks: (B, dim, h, w) -> the output of `downsample`, or the same shape without it."""

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        depth: int,
        activation: type[nn.Module],
        drop_path: float | list[float] = 0.0,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
        out_dim: int | None = None,
        conv_expand_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.input_resolution = input_resolution
        self.depth = depth
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            MBConv(dim, dim, conv_expand_ratio, activation, _at(drop_path, index)) for index in range(depth)
        )
        self.downsample = None
        if downsample is not None:
            self.downsample = downsample(input_resolution, dim=dim, out_dim=out_dim, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return _through(self.blocks, self.downsample, x, checkpointed=self.use_checkpoint)


class TinyViTBlock(nn.Module):
    """Window attention, a depth-wise convolution and an MLP, (B, h * w, dim) -> the same shape.

    Args:
        dim: channels.
        input_resolution: (h, w).
        num_heads: number of attention heads.
        window_size: side of a window in positions; maps are zero-padded to whole windows.
        mlp_ratio: hidden channels of the MLP divided by `dim`.
        drop: dropout probability of the MLP.
        drop_path: see `DropPath`.
        local_conv_size: kernel size of the depth-wise convolution.
        activation: activation of the MLP.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        local_conv_size: int = 3,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        if window_size < 1 or dim % num_heads:
            raise UsageError(
                "Invalid TinyViT block",
                expected="window_size of at least 1, and dim divisible by num_heads",
                found=f"window_size={window_size}, dim={dim}, num_heads={num_heads}",
            )
        self.dim = dim
        self.input_resolution = input_resolution
        self.num_heads = num_heads
        self.window_size = window_size
        self.mlp_ratio = mlp_ratio
        self.drop_path = _drop_path(drop_path)
        window = (window_size, window_size)
        self.attn = Attention(dim, dim // num_heads, num_heads, attn_ratio=1, resolution=window)
        self.mlp = Mlp(in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=activation, drop=drop)
        self.local_conv = Conv2d_BN(dim, dim, local_conv_size, 1, local_conv_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x + self.drop_path(self._attended(x))
        x = _sequence(self.local_conv(_maps(x, self.input_resolution)))
        return x + self.drop_path(self.mlp(x))

    def extra_repr(self) -> str:
        """The block's sizes for `print`."""
        sizes = (f"{name}={getattr(self, name)}" for name in ("dim", "input_resolution", "num_heads", "window_size"))
        return ", ".join([*sizes, f"mlp_ratio={self.mlp_ratio}"])

    def _attended(self, x: Tensor) -> Tensor:
        side, (height, width) = self.window_size, self.input_resolution
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        windows = x.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
        seen = self.attn(windows.reshape(-1, side * side, self.dim))
        seen = seen.view(len(x), rows, columns, side, side, self.dim).transpose(2, 3)
        return seen.reshape(len(x), rows * side, columns * side, self.dim)[:, :height, :width].flatten(1, 2)


class BasicLayer(nn.Module):
    """A stage of TinyViT blocks: (B, h * w, dim) -> the output of `downsample`, or the same shape without it."""

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        depth: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float | list[float] = 0.0,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
        local_conv_size: int = 3,
        activation: type[nn.Module] = nn.GELU,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.input_resolution = input_resolution
        self.depth = depth
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            TinyViTBlock(
                dim,
                input_resolution,
                num_heads,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop=drop,
                drop_path=_at(drop_path, index),
                local_conv_size=local_conv_size,
                activation=activation,
            )
            for index in range(depth)
        )
        self.downsample = None
        if downsample is not None:
            self.downsample = downsample(input_resolution, dim=dim, out_dim=out_dim, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return _through(self.blocks, self.downsample, x, checkpointed=self.use_checkpoint)

    def extra_repr(self) -> str:
        """The block's sizes for `print`."""
        return f"dim={self.dim}, input_resolution={self.input_resolution}, depth={self.depth}"


def _drop_path(probability: float) -> nn.Module:
    return DropPath(probability) if probability > 0 else nn.Identity()


def _at(drop_path: float | list[float], index: int) -> float:
    """The drop probability of one block of a stage."""
    return drop_path[index] if isinstance(drop_path, list) else drop_path


def _maps(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h * w, C) -> (B, C, h, w), channels last in memory."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def _sequence(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


def _through(blocks: nn.ModuleList, downsample: nn.Module | None, x: Tensor, *, checkpointed: bool) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    return x if downsample is None else downsample(x)
