"""A small RFMedSAM 2 without published weights, its patches and its prompts."""

from __future__ import annotations

from typing import Any

import torch

from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.prompts import Prompts
from rfmedsam2.records.model import AdapterConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Compute, Sampling

NO_ADAPTERS = AdapterConfig(blocks="none", convolutions="none")


def small_unet(dimensions: int = 3, **fields: Any) -> UNetConfig:
    return UNetConfig(
        features=(4, 8),
        kernel_sizes=((3,) * dimensions,) * 2,
        strides=((1,) * dimensions, (2,) * dimensions),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
        **fields,
    )


def config(**fields: Any) -> RFMedSam2Config:
    given: dict[str, Any] = {
        "unet": small_unet(),
        "backbone": "nano",
        "frame_size": 32,
        "freeze_backbone": False,
        "adapters": NO_ADAPTERS,
    }
    return RFMedSam2Config(**(given | fields))


def network(
    *,
    channels: int = 1,
    outputs: int = 3,
    regions: bool = False,
    compute: Compute | None = None,
    sampling: Sampling | None = None,
    **fields: Any,
) -> RFMedSam2:
    torch.manual_seed(0)
    return RFMedSam2(
        config(**fields), channels=channels, outputs=outputs, regions=regions, compute=compute, sampling=sampling
    ).eval()


def patch(channels: int = 1, frames: int = 4, size: int = 32, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, frames, size, size, generator=torch.Generator().manual_seed(1))


def boxes(frames: int, classes: int) -> Prompts:
    return Prompts(
        boxes=torch.tensor([4.0, 6.0, 20.0, 24.0]).expand(frames, classes, 4).clone(),
        present=torch.ones(frames, classes, dtype=torch.bool),
    )
