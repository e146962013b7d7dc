"""TinyViT with SAM's neck and early features: MobileSAM's and Light HQ-SAM's image encoder, in any published size.

Names and arguments are the published package's. Source: Wu et al. 2022 (TinyViT); Zhang et al. 2023 (MobileSAM: no
downsampling before the last stage, then SAM's neck).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from rfmedsam2.errors import PlanError, UsageError
from segment_anything_hq.modeling.common import LayerNorm2d
from segment_anything_hq.modeling.tiny_vit_blocks import (
    Attention,
    BasicLayer,
    Conv2d_BN,
    ConvLayer,
    DropPath,
    MBConv,
    Mlp,
    PatchEmbed,
    PatchMerging,
    TinyViTBlock,
)

__all__ = [
    "Attention",
    "BasicLayer",
    "Conv2d_BN",
    "ConvLayer",
    "DropPath",
    "LayerNorm2d",
    "MBConv",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "TinyViT",
    "TinyViTBlock",
    "register_tiny_vit_model",
    "tiny_vit_5m_224",
    "tiny_vit_11m_224",
    "tiny_vit_21m_224",
    "tiny_vit_21m_384",
    "tiny_vit_21m_512",
]

NECK_CHANNELS = 256
CLASSIFIER = ("norm_head.", "head.")
"""TinyViT's classifier, which the published files contain but segmentation does not use."""


class TinyViT(nn.Module):
    """MobileSAM's image encoder with early features.

    Args:
        img_size: S, a multiple of 32, at least 64; 1024 for SAM.
        in_chans: channels of a frame.
        num_classes: accepted and stored, but no classifier is built: the published package has one and never runs it.
        embed_dims: channels of the four stages.
        depths: number of blocks per stage.
        num_heads: attention heads per stage; the first value has no effect, as the first stage is convolutional.
        window_sizes: window side per stage; again the first value has no effect.
        mlp_ratio: hidden channels of the MLPs divided by a stage's channels.
        drop_rate: dropout probability of the MLPs.
        drop_path_rate: probability of dropping the last block in training; it grows linearly from 0 at the first.
        use_checkpoint: recompute blocks in the backward pass to save memory.
        mbconv_expand_ratio: hidden channels of the first stage's blocks divided by its channels.
        local_conv_size: kernel size of the convolutions between attention and MLP.
        layer_lr_decay: see `set_layer_lr_decay`.

    Shapes:
        frames (B, 3, S, S) -> the embedding (B, 256, S/16, S/16), and a list of one early feature map
        (B, S/16, S/16, C), the downsampled output of the second stage.

    Raises:
        PlanError: `img_size` is not a multiple of 32, or less than 64.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_checkpoint: bool = False,
        mbconv_expand_ratio: float = 4.0,
        local_conv_size: int = 3,
        layer_lr_decay: float = 1.0,
    ) -> None:
        if img_size < 64 or img_size % 32:
            raise PlanError("Invalid frame size for TinyViT", expected="a multiple of 32, at least 64", found=img_size)
        super().__init__()
        self.img_size = img_size
        self.num_classes = num_classes
        self.depths = depths
        self.num_layers = len(depths)
        self.mlp_ratio = mlp_ratio
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0], img_size, nn.GELU)
        self.patches_resolution = self.patch_embed.patches_resolution
        total = sum(depths)
        dropped = [drop_path_rate * index / max(total - 1, 1) for index in range(total)]
        self.layers = nn.ModuleList()
        for index, (width, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            last = index == len(depths) - 1
            side = self.patches_resolution[0] // 2 ** min(index, 2)
            first = sum(depths[:index])
            shared: dict[str, Any] = {
                "dim": width,
                "input_resolution": (side, side),
                "depth": depth,
                "drop_path": dropped[first : first + depth],
                "downsample": None if last else PatchMerging,
                "use_checkpoint": use_checkpoint,
                "out_dim": None if last else embed_dims[index + 1],
                "activation": nn.GELU,
            }
            if index == 0:
                self.layers.append(ConvLayer(conv_expand_ratio=mbconv_expand_ratio, **shared))
                continue
            self.layers.append(
                BasicLayer(
                    num_heads=num_heads[index],
                    window_size=window_sizes[index],
                    mlp_ratio=mlp_ratio,
                    drop=drop_rate,
                    local_conv_size=local_conv_size,
                    **shared,
                )
            )
        self.apply(_initialize)
        self.set_layer_lr_decay(layer_lr_decay)
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dims[-1], NECK_CHANNELS, 1, bias=False),
            LayerNorm2d(NECK_CHANNELS),
            nn.Conv2d(NECK_CHANNELS, NECK_CHANNELS, 3, padding=1, bias=False),
            LayerNorm2d(NECK_CHANNELS),
        )
        self.register_load_state_dict_pre_hook(_without_classifier)

    def set_layer_lr_decay(self, layer_lr_decay: float) -> None:
        """Set `lr_scale` on parameters: 1 in the last block, multiplied by `layer_lr_decay` per earlier block."""
        scales = [layer_lr_decay ** (sum(self.depths) - 1 - index) for index in range(sum(self.depths))]
        marked: list[tuple[nn.Module, float]] = [(self.patch_embed, scales[0])]
        index = 0
        for layer in self.layers:
            assert isinstance(layer, ConvLayer | BasicLayer)
            marked += zip(layer.blocks, scales[index:], strict=False)
            index += len(layer.blocks)
            if layer.downsample is not None:
                marked.append((layer.downsample, scales[index - 1]))
        for module, scale in marked:
            for parameter in module.parameters():
                vars(parameter)["lr_scale"] = scale

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay_keywords(self) -> set[str]:
        """Substrings of the names of parameters that are excluded from weight decay."""
        return {"attention_biases"}

    def forward_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See the class."""
        # channels-last suits both attention and convolutions, so that nothing is copied in between
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        early, side = [], self.img_size // 16
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 1:
                early.append(x.unflatten(1, (side, side)))
        return self.neck(x.unflatten(1, (side, side)).permute(0, 3, 1, 2)), early

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See the class."""
        return self.forward_features(x)


def register_tiny_vit_model(fn: Callable[[], TinyViT]) -> Callable[..., TinyViT]:
    """Give a builder timm's `pretrained` argument, without registering it in timm.

    `pretrained=True` raises an error: the published classifiers' weights have no neck and do not fit these models.
    """

    @wraps(fn)
    def build(pretrained: bool = False, **kwargs: Any) -> TinyViT:  # noqa: ARG001
        if pretrained:
            raise UsageError(
                f"No published weights exist for {fn.__name__} with SAM's neck",
                remedy='Build Light HQ-SAM with sam_model_registry["vit_tiny"] and its checkpoint',
            )
        return fn()

    del build.__wrapped__  # `build` has the published signature
    return build


@register_tiny_vit_model
def tiny_vit_5m_224() -> TinyViT:
    """TinyViT-5M, as in MobileSAM, for frames of 224 pixels."""
    return TinyViT(embed_dims=[64, 128, 160, 320], num_heads=[2, 4, 5, 10], drop_path_rate=0.0)


@register_tiny_vit_model
def tiny_vit_11m_224() -> TinyViT:
    """TinyViT-11M for frames of 224 pixels."""
    return TinyViT(embed_dims=[64, 128, 256, 448], num_heads=[2, 4, 8, 14], drop_path_rate=0.1)


@register_tiny_vit_model
def tiny_vit_21m_224() -> TinyViT:
    """TinyViT-21M for frames of 224 pixels."""
    return TinyViT(embed_dims=[96, 192, 384, 576], num_heads=[3, 6, 12, 18], drop_path_rate=0.2)


@register_tiny_vit_model
def tiny_vit_21m_384() -> TinyViT:
    """TinyViT-21M for frames of 384 pixels."""
    return TinyViT(384, embed_dims=[96, 192, 384, 576], num_heads=[3, 6, 12, 18], window_sizes=[12, 12, 24, 12])


@register_tiny_vit_model
def tiny_vit_21m_512() -> TinyViT:
    """TinyViT-21M for frames of 512 pixels."""
    return TinyViT(512, embed_dims=[96, 192, 384, 576], num_heads=[3, 6, 12, 18], window_sizes=[16, 16, 32, 16])


def _initialize(module: nn.Module) -> None:
    """TinyViT's initialization of linear layers: small weights, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _without_classifier(_module: nn.Module, weights: dict[str, Any], prefix: str, *_: object) -> None:
    """Remove TinyViT's classifier from weights that are being loaded."""
    for name in [name for name in weights if name.startswith(tuple(prefix + part for part in CLASSIFIER))]:
        del weights[name]
