"""Small tasks and records for the engine's tests; importable by the processes that the tests start."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rfmedsam2.engine.monitoring.log import read_events
from rfmedsam2.engine.optimizers import build_optimizer
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.engine.task import Run
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.plan import Plan
from rfmedsam2.records.training import AdamW, Sgd, TrainConfig
from rfmedsam2.store.checkpoint_header import read_record_of


def make_plan(name: str = "toy") -> Plan:
    """A plan of the smallest size."""
    stage = {
        "spacing_mm": [1, 1, 1],
        "median_shape": [8, 8, 8],
        "patch_size": [8, 8, 8],
        "batch_size": 2,
        "normalization": [{"kind": "zscore"}],
        "model": {
            "kind": "unet",
            "features": [4, 8],
            "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1, 1], [2, 2, 2]],
            "encoder_blocks": [1, 1],
            "decoder_blocks": [1],
        },
    }
    keys = ("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5")
    return Plan.parse(
        {
            "name": name,
            "dataset": "Dataset001_Toy",
            "fingerprint": "0",
            "channels": ["CT"],
            "labels": {"names": {"background": 0, "thing": 1}},
            "file_ending": ".nii.gz",
            "intensities": [dict.fromkeys(keys, 1.0)],
            "stages": {"3d_fullres": stage},
        }
    )


def make_record(step: int = 0, scores: dict[str, float] | None = None, *, plan: str = "toy", fold: str = "0"):
    """A checkpoint record of the toy plan."""
    return CheckpointRecord(
        plan=make_plan(plan),
        stage="3d_fullres",
        fold=fold,
        step=step,
        scores=scores or {},
        weights_sha256="",
        code_version="0",
        torch_version="0",
        created="2025-01-01T00:00:00Z",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyBatch:
    """x (B, 6), y (B, 1), and where it is from."""

    x: torch.Tensor
    y: torch.Tensor
    ids: tuple[str, ...]


class ToyNet(torch.nn.Module):
    """Has all that makes resuming hard: dropout, batch norm, a frozen part, optionally a part without gradient."""

    def __init__(self, *, batch_norm: bool = True, dropout: float = 0.3, idle: bool = False) -> None:
        super().__init__()
        self.frozen = torch.nn.Linear(6, 8)
        self.frozen.requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(8) if batch_norm else torch.nn.Identity()
        self.drop = torch.nn.Dropout(dropout)
        self.out = torch.nn.Linear(8, 1)
        self.idle = torch.nn.Linear(2, 2) if idle else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(torch.tanh(self.norm(self.frozen(x)))))


class ToyTask:
    """Regression; batch i is a function of (seed, rank, i). Attributes `at` maps a batch number to what happens."""

    def __init__(self, config: TrainConfig, *, rank: int = 0, ranks: int = 1, size: int = 4, **net: Any) -> None:
        torch.manual_seed(0)
        self.config, self.rank, self.ranks, self.size = config, rank, ranks, size
        self.model = ToyNet(**net)
        self.at: dict[int, Callable[[], None]] = {}
        self.at_validation: dict[int, Callable[[], None]] = {}
        self.nan_at: int | None = None
        self.validations = 0

    def optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model.parameters(), self.config)

    def batch(self, number: int) -> ToyBatch:
        """This rank's share of a batch of ranks * size rows."""
        rng = torch.Generator().manual_seed(number)
        x = torch.randn(self.ranks * self.size, 6, generator=rng)
        y = x.sum(1, keepdim=True) / 3
        if number == self.nan_at:
            x[0, 0] = float("nan")
        mine = slice(self.rank * self.size, (self.rank + 1) * self.size)
        return ToyBatch(x=x[mine], y=y[mine], ids=(f"case_{number}",))

    def batches(self, start: int) -> Iterator[ToyBatch]:
        for number in range(start, self.config.iterations * self.config.accumulation):
            self.at.get(number, lambda: None)()
            yield self.batch(number)

    def loss(self, batch: ToyBatch) -> dict[str, torch.Tensor]:
        error = self.model(batch.x) - batch.y
        return {"square": (error**2).mean(), "absolute": 0.1 * error.abs().mean()}

    def validate(self) -> dict[str, float]:
        self.validations += 1
        self.at_validation.get(self.validations, lambda: None)()
        batch = self.batch(10_000)
        noise = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002, F841 - draws from all generators
        return {"score": -float((self.model(batch.x) - batch.y).pow(2).mean()), "other": 1.0}


class BranchingTask(ToyTask):
    """A part of the network has no part in the loss of some batches, on one rank or on all.

    `used` holds, for every step in turn, the ranks on which it has.
    """

    def __init__(self, config: TrainConfig, *, used: Sequence[tuple[int, ...]], **fields: Any) -> None:
        super().__init__(config, **fields)
        self.used = used
        self.model.branch = torch.nn.Linear(6, 1)

    def loss(self, batch: ToyBatch) -> dict[str, torch.Tensor]:
        number = int(batch.ids[0].removeprefix("case_"))
        used = self.used[number // self.config.accumulation % len(self.used)]
        # one process that stands for two ranks has the rows of both, one after the other
        shares = [(self.rank, batch.x, batch.y)]
        if self.ranks == 1:
            shares = list(zip((0, 1), batch.x.chunk(2), batch.y.chunk(2), strict=True))
        losses = []
        for rank, x, y in shares:
            found = self.model(x)
            if rank in used:
                found = found + self.model.branch(x)
            losses.append((found - y).square().mean())
        return {"square": torch.stack(losses).mean()}


def make_config(**fields: Any) -> TrainConfig:
    """A training of 4 epochs of 5 steps."""
    base = {"epochs": 4, "iterations_per_epoch": 5, "learning_rate": 0.05, "optimizer": AdamW()}
    return TrainConfig(**(base | fields))


def branching_config() -> TrainConfig:
    """Without momentum, so that a gradient of zero and none at all do the same."""
    return make_config(accumulation=2, optimizer=Sgd(momentum=0, nesterov=False), learning_rate=0.01, weight_decay=0)


def make_run(folder: Path, *, runtime: Runtime | None = None, **fields: Any) -> Run:
    """A run of the toy plan on the CPU."""
    plan, fold = fields.pop("plan", "toy"), fields.pop("fold", "0")
    return Run(
        folder=folder,
        record=lambda step, scores: make_record(step, scores, plan=plan, fold=fold),
        runtime=runtime or Runtime(device=torch.device("cpu")),
        **fields,
    )


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what differs between any two runs."""
    return [
        {k: v for k, v in event.items() if k not in ("seconds", "memory_mb")}
        for event in read_events(folder / "metrics.jsonl")
    ]


def weights_of(folder: Path, name: str = "final") -> str:
    """Identity of the weights in a checkpoint."""
    return read_record_of(folder / f"checkpoint_{name}.safetensors").weights_sha256
