"""TinyViT-5M, the image encoder of MobileSAM and LiteMedSAM, as a replacement of SAM 2's Hiera.

Parameter names are those of the published checkpoints. timm's implementation is not used, because its attention has an
index table that a model built on the meta device lacks, and a cache that outlives changes of the weights; the parity
test compares with timm's blocks. Sources: Wu et al. 2022 (TinyViT); Zhang et al. 2023 (MobileSAM: no downsampling
before the last stage, then SAM's neck); LiteMedSAM's published code (a stem without strides: images of 256 pixels
instead of MobileSAM's 1024).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn
from typing_extensions import assert_never

from rfmedsam2.errors import PlanError
from rfmedsam2.nn.sam2.positions import SinePositions
from rfmedsam2.nn.sam2.sizes import seen_side

WIDTHS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
HEADS = (2, 4, 5, 10)
WINDOWS = (7, 7, 14, 7)
NECK_CHANNELS = 256

Scaling = Literal["none", "unit"]


class FixedBatchNorm(nn.BatchNorm2d):
    """Batch normalization with the published statistics, also in training.

    Weight and bias are trained unless frozen. A frame's features thus never depend on other frames of the batch, nor on
    how frames are chunked.
    """

    def train(self, mode: bool = True) -> FixedBatchNorm:  # noqa: ARG002
        """Stay in evaluation mode."""
        return super().train(False)


class ConvNorm(nn.Sequential):
    """A convolution without bias, and its batch normalization."""

    def __init__(self, channels: int, outputs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        convolution = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(OrderedDict(c=convolution, bn=FixedBatchNorm(outputs).eval()))


class PatchEmbedding(nn.Module):
    """(N, 3, h, w) -> (N, 64, h/4, w/4); LiteMedSAM's, whose convolutions have no strides, -> (N, 64, h, w)."""

    def __init__(self, *, strided: bool) -> None:
        super().__init__()
        half = WIDTHS[0] // 2
        kernel, stride = (3, 2) if strided else (1, 1)
        first = ConvNorm(3, half, kernel, stride=stride)
        self.seq = nn.Sequential(first, nn.GELU(), ConvNorm(half, WIDTHS[0], kernel, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted bottleneck with a shortcut, (N, width, h, w) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, 4 * width)
        self.conv2 = ConvNorm(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = ConvNorm(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class Downsample(nn.Module):
    """Transition between stages, (N, width, h, w) -> (N, outputs, h/stride, w/stride)."""

    def __init__(self, width: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, outputs)
        self.conv2 = ConvNorm(outputs, outputs, 3, stride=stride, groups=outputs)
        self.conv3 = ConvNorm(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Self-attention within a window, with biases by relative position, (windows, positions, dim) -> the same.

    Args:
        dim: channels.
        key_dim: channels of a head's queries and keys.
        num_heads: heads.
        attn_ratio: a head's values have this many times `key_dim` channels.
        resolution: (rows, columns) of a window.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: tuple[int, int] = (14, 14),
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = key_dim**-0.5
        self.key_dim = key_dim
        self.nh_kd = key_dim * num_heads
        self.d = int(attn_ratio * key_dim)
        self.dh = self.d * num_heads
        self.attn_ratio = attn_ratio
        self.resolution = resolution
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, self.dh + 2 * self.nh_kd)
        self.proj = nn.Linear(self.dh, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution[0] * resolution[1]))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        heads = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = heads.split([self.key_dim, self.key_dim, self.d], dim=-1)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=self._biases().to(q.dtype))
        return self.proj(seen.transpose(1, 2).flatten(2))

    def _biases(self) -> Tensor:
        """(num_heads, places, places): entry |dy| * columns + |dx| of the learned table.

        From the weights at every call: a table that is kept would outlive weights that are loaded later.
        """
        rows, columns = (torch.arange(side, device=self.attention_biases.device) for side in self.resolution)
        down, across = ((at[:, None] - at).abs() for at in (rows, columns))
        entry = down[:, None, :, None] * len(columns) + across[None, :, None, :]
        return self.attention_biases[:, entry.flatten(2).flatten(0, 1)]


class Mlp(nn.Module):
    """Layer norm and two linear layers, (..., in_features) -> (..., out_features)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.norm = nn.LayerNorm(in_features)
        self.fc1 = nn.Linear(in_features, hidden)
        self.fc2 = nn.Linear(hidden, out_features or in_features)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(self.norm(x))))))


class TinyVitBlock(nn.Module):
    """Windowed attention, a depth-wise convolution, an MLP: x + attend(x), local_conv, x + mlp(x).

    Shapes:
        (N, h, w, width) -> the same, for any h and w; windows are padded with zeros.
    """

    def __init__(self, width: int, *, heads: int, window: int) -> None:
        super().__init__()
        self.dim, self.window_size = width, window
        self.attn = WindowAttention(width, width // heads, heads, attn_ratio=1, resolution=(window, window))
        self.mlp = Mlp(width, 4 * width)
        self.local_conv = ConvNorm(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.convolve(x + self.attend(x))
        return x + self.mlp(x)

    def convolve(self, x: Tensor) -> Tensor:
        """Convolution between attention and MLP, (N, h, w, width) -> the same."""
        return self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def attend(self, x: Tensor) -> Tensor:
        """Attention without the shortcut, on the whole map (N, h, w, width)."""
        frames, height, width, channels = x.shape
        side = self.window_size
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.view(frames, rows, side, columns, side, channels).transpose(2, 3).reshape(-1, side * side, channels)
        x = self.attn(x).view(frames, rows, columns, side, side, channels)
        return x.transpose(2, 3).reshape(frames, rows * side, columns * side, channels)[:, :height, :width]


class Stage(nn.Module):
    """Blocks of one width, and the transition to the next stage (none after the last), which `forward` does not run."""

    def __init__(self, index: int) -> None:
        super().__init__()
        width = WIDTHS[index]
        blocks = (
            MBConv(width) if index == 0 else TinyVitBlock(width, heads=HEADS[index], window=WINDOWS[index])
            for _ in range(DEPTHS[index])
        )
        self.blocks = nn.Sequential(*blocks)
        self.channels_last = index > 0
        self.downsample = None
        if index + 1 < len(WIDTHS):
            self.downsample = Downsample(width, WIDTHS[index + 1], stride=2 if index < 2 else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, h, w) -> the same."""
        return self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else self.blocks(x)


class Neck(nn.Sequential):
    """SAM's neck, (N, 320, s, s) -> (N, 256, s, s); SAM2Base reads `d_model`."""

    d_model = NECK_CHANNELS

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(WIDTHS[-1], NECK_CHANNELS, 1, bias=False),
            LayerNorm2d(NECK_CHANNELS),
            nn.Conv2d(NECK_CHANNELS, NECK_CHANNELS, 3, padding=1, bias=False),
            LayerNorm2d(NECK_CHANNELS),
        )


class TinyVitEncoder(nn.Module):
    """TinyViT-5M with SAM's neck and, for SAM 2's decoder, two finer levels.

    LiteMedSAM's encoder works on images smaller than the frame (`seen_side`): a quarter of the frame's side gives
    the frame's strides, as published for 256 of 1024; features of larger images are averaged to these strides.

    Args:
        frame_size: S, side length of the frames in pixels.
        scaling: "unit" first scales each frame to [0, 1] over all its channels, as LiteMedSAM was
            trained; "none" expects normalized frames (MobileSAM: ImageNet's mean and standard deviation).
        seen_size: side length at which frames are encoded, whatever theirs; None: see `seen`. There is no embedding of
            absolute positions, so that any size will do.
        strided: whether the stem has stride 4 (MobileSAM) or no strides (LiteMedSAM).

    Shapes:
        frames (N, 3, S, S), for LiteMedSAM's of any size -> what sam2's ImageEncoder gives: "vision_features"
        (N, 256, S/16, S/16), the neck's output; "backbone_fpn", levels of 256 channels at strides 4, 8, 16, the last
        one the neck's output; "vision_pos_enc", a sine encoding for each.
    """

    def __init__(
        self, *, frame_size: int, scaling: Scaling = "none", strided: bool = True, seen_size: int | None = None
    ) -> None:
        super().__init__()
        self.seen_size = seen_size
        self.scaling: Scaling = scaling
        self.frame_size = frame_size
        self.strided = strided
        self.patch_embed = PatchEmbedding(strided=strided)
        self.layers = nn.ModuleList(Stage(index) for index in range(len(WIDTHS)))
        self.neck = Neck()
        self.laterals = nn.ModuleList(nn.Conv2d(WIDTHS[level], NECK_CHANNELS, 1) for level in range(2))
        self.position_encoding = SinePositions(NECK_CHANNELS)
        self.apply(_initialize)

    def forward(self, frames: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """See the class."""
        fine, middle, embedding = self.levels(frames)
        levels = [self.laterals[0](fine), self.laterals[1](middle), embedding]
        positions = [self.position_encoding(level).to(level.dtype) for level in levels]
        return {"vision_features": levels[-1], "vision_pos_enc": positions, "backbone_fpn": levels}

    def levels(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is published of the pyramid: stages of 64 and 128 channels before their laterals, and the embedding."""
        size = (self.seen(frames.shape[-1]),) * 2
        if tuple(frames.shape[-2:]) != size:
            frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
        fine, middle, last = self.stages(scaled(frames, self.scaling))
        return self._at(fine, stride=4), self._at(middle, stride=8), self._at(self.neck(last), stride=16)

    def seen(self, side: int) -> int:
        """Side length of the stem's input for frames of `side`."""
        if self.seen_size is not None:
            return self.seen_size
        return self.frame_size if self.strided else seen_side(side, self.frame_size)

    def stages(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the stages with 64, 128 and 320 channels, for scaled frames.

        Their strides are 4, 8, 16 with MobileSAM's stem, 1, 2, 4 with LiteMedSAM's.
        """
        x = self.patch_embed(frames)
        outputs = []
        for stage in self.layers:
            x = stage(x)
            outputs.append(x)
            downsample = stage.downsample
            if isinstance(downsample, nn.Module):
                x = downsample(x)
        return outputs[0], outputs[1], outputs[3]

    def _at(self, features: Tensor, *, stride: int) -> Tensor:
        """Average feature maps to one position per `stride` x `stride` pixels of the frame."""
        side = self.frame_size // stride
        return features if features.shape[-1] == side else F.adaptive_avg_pool2d(features, side)


def build_tiny_vit_encoder(
    frame_size: int, scaling: Scaling = "none", *, seen_size: int | None = None
) -> TinyVitEncoder:
    """Build the encoder for frames of `frame_size` x `frame_size`, randomly initialized.

    Args:
        frame_size: a multiple of 32, at least 64.
        scaling: "none" for MobileSAM's; "unit" for LiteMedSAM's, which scales each frame and has its own stem.
        seen_size: see `TinyVitEncoder`.

    Raises:
        PlanError: the size is not a multiple of 32, or below 64.
    """
    if frame_size < 64 or frame_size % 32:
        raise PlanError(
            "Invalid frame size for TinyViT", expected="a multiple of 32, at least 64", found=str(frame_size)
        )
    return TinyVitEncoder(frame_size=frame_size, scaling=scaling, strided=scaling == "none", seen_size=seen_size)


def scaled(frames: Tensor, scaling: Scaling) -> Tensor:
    """Scale frames (N, 3, S, S) for the encoder; with "unit", a constant frame becomes zeros."""
    match scaling:
        case "none":
            return frames
        case "unit":
            low = frames.amin((1, 2, 3), keepdim=True)
            high = frames.amax((1, 2, 3), keepdim=True)
            return (frames - low) / (high - low).clamp_min(1e-8)
        case _ as unreachable:
            assert_never(unreachable)


def _initialize(module: nn.Module) -> None:
    """TinyViT's initialization: small weights in linear layers, no bias, bottlenecks that start as identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, MBConv):
        normalization = module.conv3[1]
        if isinstance(normalization, FixedBatchNorm):
            nn.init.zeros_(normalization.weight)
