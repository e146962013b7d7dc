"""Networks of libraries, built from their records: MONAI's SegResNet and SwinUNETR, Primus.

Each is given (B, channels, *patch) and returns logits (B, outputs, *patch), as the U-Net does in evaluation mode.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn
from typing_extensions import assert_never

from rfmedsam2.errors import MissingPackageError
from rfmedsam2.records.model import PRIMUS_SIZES, LibraryNetwork, PrimusConfig, SegResNetConfig, SwinUNETRConfig


def build_library_network(
    config: LibraryNetwork, *, channels: int, outputs: int, patch_size: Sequence[int]
) -> nn.Module:
    """Build a network of a library.

    Args:
        config: its record.
        channels: number of input channels.
        outputs: number of output channels.
        patch_size: voxels along each axis; position encodings of Primus have this size.

    Raises:
        MissingPackageError: MONAI is not installed.
    """
    match config:
        case SegResNetConfig():
            return _monai("SegResNet")(
                spatial_dims=config.dimensions,
                init_filters=config.features,
                in_channels=channels,
                out_channels=outputs,
                blocks_down=config.encoder_blocks,
                blocks_up=(1,) * (len(config.encoder_blocks) - 1),
            )
        case SwinUNETRConfig():
            return _monai("SwinUNETR")(
                spatial_dims=config.dimensions,
                feature_size=config.features,
                depths=config.depths,
                in_channels=channels,
                out_channels=outputs,
            )
        case PrimusConfig():
            return _primus(config, channels, outputs, tuple(patch_size))
        case _:
            assert_never(config)


def _monai(name: str) -> Any:
    try:
        return getattr(importlib.import_module("monai.networks.nets"), name)
    except ImportError:
        raise MissingPackageError(
            f"{name} needs MONAI, which is not installed", remedy="Install it with: pip install 'rfmedsam2[monai]'"
        ) from None


def _primus(config: PrimusConfig, channels: int, outputs: int, patch_size: tuple[int, ...]) -> nn.Module:
    # its layers come from timm, whose import takes longer than all other imports of a training
    primus = importlib.import_module("dynamic_network_architectures.architectures.primus").Primus
    width, layers, heads = PRIMUS_SIZES[config.size]
    return primus(
        input_channels=channels,
        embed_dim=width,
        patch_embed_size=(config.patch_multiple,) * 3,
        num_classes=outputs,
        eva_depth=layers,
        eva_numheads=heads,
        input_shape=patch_size,
        drop_path_rate=0.2,
        scale_attn_inner=True,
        init_values=0.1,
    )
