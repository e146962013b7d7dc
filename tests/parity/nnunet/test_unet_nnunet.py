"""The U-Net against the network that nnU-Net builds from its plans."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.nn.unet import UNet, load_nnunet_weights
from rfmedsam2.pipeline.planning.topology import FeatureWidths, topology_of
from rfmedsam2.records.model import UNetConfig

get_network_from_plans = pytest.importorskip("nnunetv2.utilities.get_network_from_plans").get_network_from_plans

CASES = [
    ("plain", (3.0, 0.8, 0.8), (8, 32, 32)),
    ("plain", (1.0, 1.0), (32, 48)),
    ("residual", (1.0, 1.0, 1.0), (16, 16, 24)),
    ("residual", (0.7, 0.7), (40, 32)),
]


NORMS = {"instance": "InstanceNorm", "batch": "BatchNorm"}


def small_config(block: str, spacing, patch) -> UNetConfig:
    return FeatureWidths(block=block, base=4, maximum=12).network(topology_of(spacing, patch))


def nnunets_network(config: UNetConfig, channels: int, outputs: int) -> torch.nn.Module:
    blocks = "n_conv_per_stage" if config.block == "plain" else "n_blocks_per_stage"
    kind = "PlainConvUNet" if config.block == "plain" else "ResidualEncoderUNet"
    arguments = {
        "n_stages": len(config.features),
        "features_per_stage": list(config.features),
        "conv_op": f"torch.nn.modules.conv.Conv{config.dimensions}d",
        "kernel_sizes": [list(k) for k in config.kernel_sizes],
        "strides": [list(s) for s in config.strides],
        blocks: list(config.encoder_blocks),
        "n_conv_per_stage_decoder": list(config.decoder_blocks),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.{config.norm}norm.{NORMS[config.norm]}{config.dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return get_network_from_plans(
        f"dynamic_network_architectures.architectures.unet.{kind}",
        arguments,
        ["conv_op", "norm_op", "dropout_op", "nonlin"],
        channels,
        outputs,
        allow_init=True,
        deep_supervision=True,
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("block", "spacing", "patch"), CASES)
def test_equal_weights_give_equal_outputs_bit_for_bit(block, spacing, patch, norm):
    config = small_config(block, spacing, patch).model_copy(update={"norm": norm})
    theirs = nnunets_network(config, 2, 3)
    for parameter in theirs.parameters():  # initial biases are zero and hide a wrong order
        torch.nn.init.normal_(parameter, std=0.2)
    mine = UNet(config, channels=2, outputs=3, deep_supervision=True)
    load_nnunet_weights(mine, theirs.state_dict())
    x = torch.randn(2, 2, *topology_of(spacing, patch).patch_size)
    with torch.no_grad():
        expected, found = theirs(x), mine(x)
        single, alone = mine.eval()(x), theirs.eval()(x)
    assert len(found) == len(expected) == len(config.features) - 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(single, alone[0])


@pytest.mark.parametrize(("block", "spacing", "patch"), CASES)
def test_equal_seeds_give_nnunets_initial_weights(block, spacing, patch):
    config = small_config(block, spacing, patch)
    torch.manual_seed(3)
    theirs = nnunets_network(config, 1, 2).state_dict()
    torch.manual_seed(3)
    mine = UNet(config, channels=1, outputs=2).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert sum(v.numel() for v in mine.values()) == sum({v.data_ptr(): v.numel() for v in theirs.values()}.values())
