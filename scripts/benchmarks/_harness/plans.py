"""nnU-Net's plans with a small network. Imports nothing, because nnunetv2 reads its folders on import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def shrink(
    stage: dict[str, Any], features: Sequence[int], *, stride: Sequence[int] = (2, 2, 2), layers: int = 2
) -> None:
    """Change a configuration of nnU-Net's plans in place.

    Args:
        stage: one of its `configurations`; patch, batch and spacing are unchanged.
        features: channels per stage of the U-Net.
        stride: stride between two stages.
        layers: convolutions per stage.
    """
    count = len(features)
    stage["architecture"]["arch_kwargs"].update(
        n_stages=count,
        features_per_stage=list(features),
        kernel_sizes=[[3, 3, 3]] * count,
        strides=[[1, 1, 1]] + [list(stride)] * (count - 1),
        n_conv_per_stage=[layers] * count,
        n_conv_per_stage_decoder=[layers] * (count - 1),
    )
