"""Networks of the folds of one model, from checkpoints of ours or of nnU-Net."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rfmedsam2.errors import UsageError
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


def _loaded(path: Path, device: torch.device) -> tuple[CheckpointRecord, nn.Module]:
    if path.name not in NNUNET_CHECKPOINTS:
        return load_network(path, device=device)
    record, weights = read_fold(path)
    network = build_without_weights(record.plan, record.plan.stages[record.stage])
    network.load_state_dict(weights, assign=True)
    record = record.model_copy(update={"weights_sha256": weights_sha256(weights)})
    return record, network.eval().to(device)
