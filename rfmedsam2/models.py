"""Networks from records: a plan's model record -> network; a checkpoint -> network ready to predict."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_never

from rfmedsam2.errors import CheckpointError
from rfmedsam2.nn.meta_device import skip_init
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.unet import UNet
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import ModelConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.checkpoints import read_weights


def build(config: ModelConfig, *, channels: int, outputs: int, regions: bool = False) -> nn.Module:
    """Build the network of a model record, freshly initialized from torch's current random state.

    Args:
        config: any model record.
        channels: input channels.
        outputs: output channels (`LabelSet.num_outputs`).
        regions: the outputs are overlapping regions, without background (`LabelSet.has_regions`).

    Returns:
        A module whose attribute `deep_supervision` (at first False) may be set: `forward` gives logits
        (B, outputs, *patch), or with deep supervision a list of them, highest resolution first.
    """
    match config:
        case UNetConfig():
            return UNet(config, channels=channels, outputs=outputs)
        case RFMedSam2Config():
            return RFMedSam2(config, channels=channels, outputs=outputs, regions=regions)
        case _:
            assert_never(config)


def build_stage(plan: Plan, stage: Stage) -> nn.Module:
    """Build the network of a plan's stage; see `build`."""
    return build(
        stage.model,
        channels=len(plan.channels),
        outputs=plan.labels.num_outputs,
        regions=plan.labels.has_regions,
    )


def load_network(checkpoint: Path, *, device: torch.device | str = "cpu") -> tuple[CheckpointRecord, nn.Module]:
    """Load the network of a checkpoint, in evaluation mode on `device`, with deep supervision off.

    Raises:
        CheckpointError: unreadable, damaged, or weights that are not those of its plan's network.
    """
    record = read_record_of(checkpoint)
    stage = record.plan.stages.get(record.stage)
    if stage is None:
        raise CheckpointError(
            "The checkpoint's stage is not in its plan",
            where=checkpoint,
            expected=f"one of {', '.join(record.plan.stages)}",
            found=record.stage,
        )
    with skip_init():  # shapes only: the weights below take the place of an initialization
        network = build_stage(record.plan, stage)
    try:
        network.load_state_dict(read_weights(checkpoint), assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint's weights do not fit the network of its plan ({' '.join(str(error).split())[:300]})",
            where=checkpoint,
            remedy="Train again, or take the checkpoint that belongs to this plan",
        ) from None
    return record, network.eval().to(device)
