"""Networks of the folds of one model, from checkpoints of ours or of nnU-Net, and ready to predict by a backend."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn

from rfmedsam2.errors import UsageError
from rfmedsam2.inference.backends.backend import SourceNetwork
from rfmedsam2.inference.backends.choice import Running, run_networks
from rfmedsam2.inference.volume import PredictOptions
from rfmedsam2.models import build_without_weights, load_network
from rfmedsam2.pipeline.nnunet.models import read_fold
from rfmedsam2.pipeline.prediction.identity import require_same_model
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.store.checkpoint_header import NNUNET_CHECKPOINTS
from rfmedsam2.store.checkpoints import weights_sha256


def networks_of(
    paths: Sequence[Path], device: torch.device
) -> tuple[tuple[CheckpointRecord, ...], tuple[nn.Module, ...]]:
    """Records and networks of the folds of one model, in evaluation mode on `device`.

    Raises:
        UsageError: there are no checkpoints.
        CheckpointError: a checkpoint is damaged, or of another plan than the first.
    """
    if not paths:
        raise UsageError("No checkpoint was given", expected="at least one file")
    loaded = [_loaded(path, device) for path in paths]
    records = tuple(record for record, _ in loaded)
    for path, record in zip(paths[1:], records[1:], strict=True):
        require_same_model(records[0], record, where=path)
    return records, tuple(network for _, network in loaded)


def running(
    records: Sequence[CheckpointRecord], networks: Sequence[nn.Module], options: PredictOptions, device: torch.device
) -> Running:
    """The networks of one model, prepared by the backend of the options; see `inference.backends.choice`."""
    plan = records[0].plan
    stage = plan.stages[records[0].stage]
    sources = [
        SourceNetwork(
            network=network,
            model=stage.model,
            input_shape=(plan.inputs_of(stage), *stage.patch_size),
            weights_sha256=record.weights_sha256,
        )
        for record, network in zip(records, networks, strict=True)
    ]
    return run_networks(
        sources, wanted=options.backend, precision=options.precision, device=device, cache=options.cache_folder
    )


def prepared_alike(one: PredictOptions, other: PredictOptions) -> bool:
    """Whether `running` prepares networks by both options in the same way."""
    prepared_by = attrgetter("backend", "precision", "cache_folder")
    return prepared_by(one) == prepared_by(other)


def _loaded(path: Path, device: torch.device) -> tuple[CheckpointRecord, nn.Module]:
    if path.name not in NNUNET_CHECKPOINTS:
        return load_network(path, device=device)
    record, weights = read_fold(path)
    network = build_without_weights(record.plan, record.plan.stages[record.stage])
    network.load_state_dict(weights, assign=True)
    record = record.model_copy(update={"weights_sha256": weights_sha256(weights)})
    return record, network.eval().to(device)
