"""Building networks from plans, and loading them from checkpoints."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_never

from rfmedsam2.errors import CheckpointError, ExtensionError, require_type
from rfmedsam2.extensions import make
from rfmedsam2.nn.feature_cache import FeatureCache
from rfmedsam2.nn.library_networks import build_library_network
from rfmedsam2.nn.meta_device import skip_init
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.unet import UNet
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import CustomConfig, LibraryConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.store.checkpoints import read_weights


def build_stage(plan: Plan, stage: Stage | str, *, cache_features: bool = False) -> nn.Module:
    """Build the complete network of a plan's stage, randomly initialized from torch's global RNG.

    Includes the plan's `stage.compute`, `stage.sampling` and `stage.loss.deep_supervision`. Deep supervision is active
    in training mode only, and networks of libraries have none; the limit of objects only with gradients enabled.

    Args:
        plan: plan with the channels and labels.
        stage: one of its stages, or its name.
        cache_features: cache features of a frozen image encoder, up to `stage.compute.cache_features_mb`. For training;
            in prediction few frames repeat.

    Returns:
        A module whose `forward` returns logits (B, outputs, *patch) for (B, channels, *patch), or in training mode with
        deep supervision a list of them, highest resolution first. Channels: `plan.inputs_of(stage)`.

    Raises:
        UsageError: not a plan.
        PlanError: the plan has no stage of this name.
    """
    require_type(plan, Plan, "plan", remedy="Load it with Plan.load(path)")
    stage = stage if isinstance(stage, Stage) else plan.stage(stage)
    channels, outputs = plan.inputs_of(stage), plan.labels.num_outputs
    return _built(plan, stage, channels=channels, outputs=outputs, cache_features=cache_features)


def _built(plan: Plan, stage: Stage, *, channels: int, outputs: int, cache_features: bool = False) -> nn.Module:
    deep = stage.loss.deep_supervision
    match stage.model:
        case UNetConfig() as config:
            return UNet(config, channels=channels, outputs=outputs, deep_supervision=deep)
        case RFMedSam2Config() as config:
            limit_mb = stage.compute.cache_features_mb if cache_features else 0
            return RFMedSam2(
                config,
                channels=channels,
                outputs=outputs,
                regions=plan.labels.has_regions,
                compute=stage.compute,
                sampling=stage.sampling,
                deep_supervision=deep,
                cache=FeatureCache(limit_mb) if limit_mb else None,
            )
        case LibraryConfig() as config:
            return build_library_network(config, channels=channels, outputs=outputs, patch_size=stage.patch_size)
        case CustomConfig() as config:
            shape = {"channels": channels, "outputs": outputs, "patch_size": stage.patch_size}
            network = make("network", config, **shape)
            if not isinstance(network, nn.Module):
                found = type(network).__name__
                raise ExtensionError(
                    "An extension is not a network", where=config.name, expected="nn.Module", found=found
                )
            return network
        case _:
            assert_never(stage.model)


def build_without_weights(plan: Plan, stage: Stage) -> nn.Module:
    """Build the network of a stage to count its parameters, or to be given weights by `load_state_dict(assign=True)`.

    Nothing is initialized: parameters have shapes alone, except those of a library or an extension, which may need
    numbers.
    """
    with _without_weights(stage):
        return build_stage(plan, stage)


def shapes_of(
    plan: Plan, stage: Stage, *, channels: int | None = None, outputs: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a stage's network, by name; as it would be with other channels or outputs.

    Args:
        plan: the plan.
        stage: one of its stages.
        channels: input channels; None: the plan's.
        outputs: output channels; None: the plan's.
    """
    channels = plan.inputs_of(stage) if channels is None else channels
    outputs = plan.labels.num_outputs if outputs is None else outputs
    with _without_weights(stage):
        network = _built(plan, stage, channels=channels, outputs=outputs)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _without_weights(stage: Stage) -> AbstractContextManager[None]:
    return nullcontext() if isinstance(stage.model, CustomConfig | LibraryConfig) else skip_init()


def load_network(checkpoint: Path, *, device: torch.device | str = "cpu") -> tuple[CheckpointRecord, nn.Module]:
    """Load the network of a checkpoint, in evaluation mode on `device`.

    Raises:
        CheckpointError: the file is unreadable or damaged, or its weights do not match the network of its plan.
        ExtensionError: its network is another package's, which is not installed.
    """
    record, weights = read_weights(checkpoint)
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
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint's weights do not match the network of its plan ({' '.join(str(error).split())[:300]})",
            where=checkpoint,
            remedy="Train again, or use the checkpoint that belongs to this plan",
        ) from None
    return record, network.eval().to(device)
