"""Saving and restoring a training: weights, optimizer, loss scale and the RNG state of every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rfmedsam2.arguments import option
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.errors import CheckpointError, shortlist
from rfmedsam2.records.checkpoint import TrainedRecord
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.store.checkpoint_header import read_header
from rfmedsam2.store.checkpoints import read_all, write_checkpoint
from rfmedsam2.version import __version__

CHANGEABLE = {"epochs", "compile", "checkpoint_minutes", "validate_every_epochs", "workers", "worker_timeout_seconds"}
"""Fields of TrainConfig that may change on resume; only `epochs` affects results (through the schedule)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The objects of a training that hold state."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Progress of a training."""

    step: int = 0
    """Completed optimizer steps."""
    validated: int = 0
    """Step of the last validation."""
    best: float | None = None
    scores: dict[str, float] | None = None
    """Scores of the last validation."""
    seconds: float = 0.0
    """Seconds in steps and validations over all runs."""

    def as_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTraining:
    """What a checkpoint says about the training that wrote it."""

    position: Position
    config: TrainConfig
    rng_states: list[dict[str, Tensor]]
    """One per rank."""
    threads: int | None = None
    """Threads of torch on the CPU; None in checkpoints of version 0.1."""

    def notes(self, config: TrainConfig, runtime: Runtime) -> list[str]:
        """Sentences on what is different in the run that goes on with it."""
        notes = []
        if self.config.epochs != config.epochs:
            epochs = f"{self.config.epochs} to {config.epochs}"
            notes.append(f"Epochs changed from {epochs}: the learning rate now follows the new schedule")
        differs = "training continues, but not bit-identical to an uninterrupted one"
        if len(self.rng_states) != runtime.world_size:
            notes.append(f"Ranks changed from {len(self.rng_states)} to {runtime.world_size}: {differs}")
        threads = torch.get_num_threads()
        if runtime.device.type == "cpu" and self.threads not in (None, threads):
            # sums over several threads round differently
            notes.append(f"CPU threads (OMP_NUM_THREADS) changed from {self.threads} to {threads}: {differs}")
        return notes


def provenance() -> dict[str, Any]:
    """Record fields on versions, host and time; the digest is filled in when the checkpoint is written."""
    return {
        "weights_sha256": "",
        "code_version": __version__,
        "torch_version": torch.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save_training(
    path: Path,
    record: TrainedRecord,
    trained: TrainingState,
    *,
    config: TrainConfig,
    position: Position,
    rng_states: Sequence[Mapping[str, Tensor]],
) -> None:
    """Write everything that an exact resume needs; `rng_states` has one entry per rank."""
    optimizer, plain = _optimizer_state(trained.optimizer)
    random = {f"random/{rank}/{name}": t for rank, state in enumerate(rng_states) for name, t in state.items()}
    state = {
        "position": position.as_json(),
        "config": config.model_dump(mode="json"),
        "scaler": trained.scaler.state_dict(),
        "optimizer": plain,
        "ranks": len(rng_states),
        "threads": torch.get_num_threads(),
    }
    write_checkpoint(path, record, _weights(trained.model) | optimizer | random, state)


def save_model(path: Path, record: TrainedRecord, model: nn.Module) -> None:
    """Write only the weights: enough to predict, not to resume."""
    write_checkpoint(path, record, _weights(model), {})


def load_training(
    path: Path, expected: Callable[[int, dict[str, float]], TrainedRecord], trained: TrainingState, config: TrainConfig
) -> SavedTraining:
    """Restore a saved training into `trained`.

    Args:
        path: checkpoint written by `save_training`.
        expected: makes the record of this training from (step, scores), for comparison.
        trained: the same kind of model and optimizer; modified in place.
        config: training configuration of this run.

    Raises:
        CheckpointError: damaged, of another plan, stage, fold or configuration, or without training state.
    """
    record, tensors, state = read_all(path, type(expected(0, {})))
    if "position" not in state:
        raise CheckpointError(
            "This checkpoint holds only weights and cannot be resumed", where=path, remedy="Start a new training"
        )
    saved_config = TrainConfig.parse(state["config"], where=path)
    position = Position(**state["position"])
    _check_same_training(path, record, expected(record.step, record.scores), _config_changes(saved_config, config))
    load_weights(path, trained.model, _group(tensors, "model/"))
    _load_optimizer(path, trained.optimizer, _group(tensors, "optimizer/"), state["optimizer"])
    if state["scaler"] and trained.scaler.is_enabled():
        trained.scaler.load_state_dict(state["scaler"])
    return SavedTraining(
        position=position,
        config=saved_config,
        rng_states=[_group(tensors, f"random/{rank}/") for rank in range(state["ranks"])],
        threads=state.get("threads"),
    )


def is_of_step(path: Path, kind: type[TrainedRecord], step: int) -> bool:
    """Whether the file is a valid checkpoint of this kind and step."""
    try:
        return read_header(path, kind).record.step == step
    except CheckpointError:
        return False


def load_weights(path: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model with the same names and shapes.

    Raises:
        CheckpointError: names or shapes differ; lists them.
    """
    own = model.state_dict()
    faults = [f"{n} is missing" for n in own.keys() - weights.keys()]
    faults += [f"{n} is not in this model" for n in weights.keys() - own.keys()]
    faults += [
        f"{n} has shape {tuple(weights[n].shape)}, not {tuple(own[n].shape)}"
        for n in own.keys() & weights.keys()
        if weights[n].shape != own[n].shape
    ]
    if faults:
        raise CheckpointError(
            f"The weights do not match this model ({len(faults)} differences)",
            where=path,
            found=shortlist(sorted(faults), separator="; "),
            remedy="Use the plan that the checkpoint was trained with",
        )
    model.load_state_dict(dict(weights))


def differences(saved: object, now: object, place: str = "") -> list[str]:
    """List the fields in which two plain JSON values differ, each with both values."""
    if isinstance(saved, dict) and isinstance(now, dict):
        found: list[str] = []
        for key in sorted(saved.keys() | now.keys()):
            found += differences(saved.get(key), now.get(key), f"{place}.{key}" if place else str(key))
        return found
    return [] if saved == now else [f"{place} was {saved!r:.60}, is {now!r:.60}"]


def _check_same_training(path: Path, saved: TrainedRecord, now: TrainedRecord, config_changes: list[str]) -> None:
    faults = differences(saved.identity(), now.identity()) + config_changes
    if faults:
        raise CheckpointError(
            "The checkpoint is of another training",
            where=path,
            found=f"other settings ({shortlist(faults, separator='; ')})",
            remedy=f"Use the same plan and options as before, or start over with {option('restart', True)}",
        )


def _config_changes(saved: TrainConfig, now: TrainConfig) -> list[str]:
    old, new = saved.model_dump(mode="json", exclude=CHANGEABLE), now.model_dump(mode="json", exclude=CHANGEABLE)
    return differences(old, new, "train")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"model/{name}": tensor for name, tensor in model.state_dict().items()}


def _group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors named "optimizer/INDEX/NAME", and the other state as plain JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        values[str(index)] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
        tensors |= {f"optimizer/{index}/{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
    groups = state["param_groups"]
    # Adan counts its steps there
    counted = [{k: v for k, v in group.items() if k == "step"} for group in groups]
    return tensors, {"values": values, "groups": [len(group["params"]) for group in groups], "counted": counted}


def _load_optimizer(path: Path, optimizer: Optimizer, tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> None:
    """Restore the moments from the file; learning rates and other settings stay those of this run's optimizer."""
    fresh = optimizer.state_dict()
    groups = [len(group["params"]) for group in fresh["param_groups"]]
    if groups != plain["groups"]:
        raise CheckpointError(
            "The optimizer state is of other parameters", where=path, expected=groups, found=plain["groups"]
        )
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain["values"].items()}
    for name, tensor in tensors.items():
        index, key = name.split("/", 1)
        state[int(index)][key] = tensor
    counted = plain.get("counted", [{}] * len(groups))  # none in checkpoints of version 0.2
    own = [group | steps for group, steps in zip(fresh["param_groups"], counted, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": own})
