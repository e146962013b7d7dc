"""The U-Net: dynamic-network-architectures' plain or residual encoder and decoder, as in nnU-Net.

Built from a `UNetConfig`: instance or batch norm (affine, eps 1e-5), leaky ReLU, convolutions with bias, nnU-Net's He
initialization. Parameter names are a subset of nnU-Net's: modules that the library registers twice are kept once, so
that a state dict contains every tensor exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from typing_extensions import Self, assert_never

from rfmedsam2.errors import CheckpointError, PlanError, shortlist
from rfmedsam2.nn.attention import TransformerBlock
from rfmedsam2.nn.meta_device import skip_init
from rfmedsam2.records.model import UNetConfig

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}

POOLS = {2: F.avg_pool2d, 3: F.avg_pool3d}
INTERPOLATIONS = {2: "bilinear", 3: "trilinear"}


class UNet(nn.Module):
    """A U-Net of two or three dimensions; with `config.attention` a transformer block at its bottleneck (Table 7).

    With `config.input_stride` it works on means of blocks of voxels, and its finest logits are interpolated to the
    input's grid; those of the other decoder levels stay at theirs.

    Args:
        config: topology and blocks of the network.
        channels: number of input channels.
        outputs: number of output channels.
        deep_supervision: whether to return the logits of every resolution in training mode.

    Shapes:
        input (B, channels, *patch) with every axis a multiple of the total stride; output logits
        (B, outputs, *patch), or with `deep_supervision` in training mode a list of them, highest resolution first, one
        per decoder level.
    """

    def __init__(self, config: UNetConfig, *, channels: int, outputs: int, deep_supervision: bool = False) -> None:
        super().__init__()
        self.deep_supervision, self.blocks = deep_supervision, config.blocks
        network = _library_network(config, channels, outputs)
        network.apply(network.initialize)
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.bottleneck = TransformerBlock(config.features[-1]) if config.attention else None
        _keep_modules_once(self)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode; deep supervision is active in training mode only."""
        self.decoder.deep_supervision = mode and self.deep_supervision
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits; see the class.

        Raises:
            PlanError: with `config.input_stride`, an axis of the input is not a multiple of a block's.
        """
        size = x.shape[2:]
        if not self.decoder.deep_supervision:
            return _enlarged(self.head(self._decoded(x)), size)
        levels: list[torch.Tensor] = []
        self._decoded(x, levels)
        logits = [layer(level) for layer, level in zip(self.decoder.seg_layers, levels, strict=True)][::-1]
        return [_enlarged(logits[0], size), *logits[1:]]

    @property
    def head(self) -> nn.Module:
        """The last layer: a linear map of each voxel's features to its logits."""
        return self.decoder.seg_layers[-1]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What `head` makes logits of, on the input's grid: (B, features, *patch); errors as in `forward`."""
        return _enlarged(self._decoded(x), x.shape[2:])

    def _decoded(self, x: torch.Tensor, levels: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Features of the finest level of the decoder; those of all levels are appended to `levels`, coarsest first."""
        skips = self.encoder(self._block_means(x))
        x = skips.pop()
        if self.bottleneck is not None:
            x = self.bottleneck(x)
        for enlarge, stage in zip(self.decoder.transpconvs, self.decoder.stages, strict=True):
            # popped, and without a name for the pair: large patches need their memory for what follows
            x = stage(torch.cat((enlarge(x), skips.pop()), 1))
            if levels is not None:
                levels.append(x)
        return x

    def _block_means(self, x: torch.Tensor) -> torch.Tensor:
        if set(self.blocks) == {1}:
            return x
        if any(n % block for n, block in zip(x.shape[2:], self.blocks, strict=True)):
            raise PlanError(
                "The input of a U-Net does not divide into its blocks of voxels",
                where="model.input_stride",
                expected=f"a multiple of {' x '.join(map(str, self.blocks))} voxels",
                found=" x ".join(map(str, x.shape[2:])),
            )
        return POOLS[len(self.blocks)](x, self.blocks)


def load_nnunet_weights(network: UNet, weights: Mapping[str, torch.Tensor]) -> None:
    """Load the state dict of nnU-Net's own network of the same architecture.

    Raises:
        CheckpointError: as in `own_weights`.
    """
    network.load_state_dict(own_weights(network, weights))


def own_weights(network: UNet, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a U-Net in the state dict of nnU-Net's own network, which has most of them under several names.

    Raises:
        CheckpointError: a tensor is missing or has a different shape, or there is one that the U-Net lacks.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in weights]
    shapes = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    others = [name for name in weights if _own_name(name) not in own]
    if missing or shapes or others:
        counts = f"{len(missing)} missing, {len(shapes)} of another shape, {len(others)} unexpected"
        raise CheckpointError(
            "The weights are of another network",
            expected=f"{len(own)} tensors of this architecture",
            found=f"{counts}: {shortlist([*missing, *shapes, *others])}",
            remedy="Use the plans.json that these weights were trained with",
        )
    # nnU-Net too loads weights of any precision into a network of single precision
    return {name: weights[name].to(tensor.dtype) for name, tensor in own.items()}


def nnunet_weights(
    config: UNetConfig, weights: Mapping[str, torch.Tensor], *, channels: int, outputs: int
) -> dict[str, torch.Tensor]:
    """The state dict of nnU-Net's own network: the U-Net's tensors, most of them under several names.

    Args:
        config: topology and blocks of the network.
        weights: state dict of the `UNet`.
        channels: number of input channels.
        outputs: number of output channels.
    """
    with skip_init():
        names = _library_network(config, channels, outputs).state_dict()
    return {name: weights[_own_name(name)] for name in names}


def _own_name(name: str) -> str:
    """The name that stays (see `_keep_modules_once`) of a tensor in nnU-Net's state dict."""
    # found by names, as tensors that were converted, averaged or copied no longer share their memory
    name = name.removeprefix("decoder.") if name.startswith("decoder.encoder.") else name
    return name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")


def _enlarged(values: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Logits or features on the input's grid; block means lie at the centers of their blocks."""
    if values.shape[2:] == size:
        return values
    return F.interpolate(values, size, mode=INTERPOLATIONS[len(size)], align_corners=False)


def _library_network(config: UNetConfig, channels: int, outputs: int) -> PlainConvUNet | ResidualEncoderUNet:
    shared = {
        "input_channels": channels,
        "n_stages": len(config.features),
        "features_per_stage": config.features,
        "conv_op": CONVOLUTIONS[config.dimensions],
        "kernel_sizes": config.kernel_sizes,
        "strides": config.strides,
        "num_classes": outputs,
        "n_conv_per_stage_decoder": config.decoder_blocks,
        "conv_bias": True,
        "norm_op": NORMS[config.norm][config.dimensions],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": False,
    }
    match config.block:
        case "plain":
            return PlainConvUNet(n_conv_per_stage=config.encoder_blocks, **shared)
        case "residual":
            return ResidualEncoderUNet(n_blocks_per_stage=config.encoder_blocks, **shared)
        case _:
            assert_never(config.block)


def _keep_modules_once(network: UNet) -> None:
    """Unregister duplicates: the decoder's copy of the encoder, and each block's parts besides its `all_modules`.

    The library only runs `all_modules`; with the duplicates, every tensor would be saved several times.
    """
    del network.decoder.encoder
    for module in list(network.modules()):
        if "all_modules" in module._modules:
            for name in [n for n in module._modules if n != "all_modules"]:
                delattr(module, name)
