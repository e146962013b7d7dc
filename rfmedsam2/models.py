"""Networks from records: a plan's model record -> network; a checkpoint -> network ready to predict."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_never

from rfmedsam2.errors import CheckpointError, ExtensionError
from rfmedsam2.extensions import make
from rfmedsam2.nn.feature_cache import FeatureCache
from rfmedsam2.nn.meta_device import skip_init
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.unet import UNet
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import CustomConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.checkpoints import read_weights


def build_stage(plan: Plan, stage: Stage, *, cache_features: bool = False) -> nn.Module:
    """Build the network of a plan's stage, complete, freshly initialized from torch's current random state.

    What the plan says of computing (`stage.compute`, `stage.sampling.max_prompted_objects`,
    `stage.loss.deep_supervision`) is built in. Deep supervision acts in training mode alone, the limit of objects where
    gradients are wanted.

    Args:
        plan: for the channels and labels.
        stage: one of its stages.
        cache_features: keep features of a frozen image encoder as `stage.compute.cache_features_mb` says. For training:
            predicting sees few frames twice.

    Returns:
        A module whose `forward` gives logits (B, outputs, *patch) for (B, channels, *patch), or in training mode with
        deep supervision a list of them, highest resolution first.
    """
    channels, labels, deep = len(plan.channels), plan.labels, stage.loss.deep_supervision
    match stage.model:
        case UNetConfig() as config:
            return UNet(config, channels=channels, outputs=labels.num_outputs, deep_supervision=deep)
        case RFMedSam2Config() as config:
            limit_mb = stage.compute.cache_features_mb if cache_features else 0
            return RFMedSam2(
                config,
                channels=channels,
                outputs=labels.num_outputs,
                regions=labels.has_regions,
                compute=stage.compute,
                max_objects=stage.sampling.max_prompted_objects,
                deep_supervision=deep,
                cache=FeatureCache(limit_mb) if limit_mb else None,
            )
        case CustomConfig() as config:
            shape = {"channels": channels, "outputs": labels.num_outputs, "patch_size": stage.patch_size}
            network = make("network", config, **shape)
            if not isinstance(network, nn.Module):
                found = type(network).__name__
                raise ExtensionError("An extension is no network", where=config.name, expected="nn.Module", found=found)
            return network
        case _:
            assert_never(stage.model)


def build_without_weights(plan: Plan, stage: Stage) -> nn.Module:
    """Build the network of a stage to count its parameters, or to be given weights by `load_state_dict(assign=True)`.

    Nothing is initialized: parameters have shapes alone, except those of an extension, which may need numbers.
    """
    with nullcontext() if isinstance(stage.model, CustomConfig) else skip_init():
        return build_stage(plan, stage)


def load_network(checkpoint: Path, *, device: torch.device | str = "cpu") -> tuple[CheckpointRecord, nn.Module]:
    """Load the network of a checkpoint, in evaluation mode on `device`.

    Raises:
        CheckpointError: unreadable, damaged, or weights that are not those of its plan's network.
        ExtensionError: its network is another package's, which is not installed.
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
    network = build_without_weights(record.plan, stage)
    try:
        network.load_state_dict(read_weights(checkpoint), assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint's weights do not fit the network of its plan ({' '.join(str(error).split())[:300]})",
            where=checkpoint,
            remedy="Train again, or take the checkpoint that belongs to this plan",
        ) from None
    return record, network.eval().to(device)
