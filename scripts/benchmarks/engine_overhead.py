"""Overhead of the engine's loop compared to a bare torch loop: same model, same batches, same machine, in turns.

The model is small, so that the cost of the loop itself shows; a real step takes a hundred times as long. Prints one
JSON object as its last line: seconds per step of both and their ratio (1: no overhead).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.toy_task import make_record  # pyright: ignore[reportMissingImports]

from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.optimizers import build_optimizer
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.engine.task import Run
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.system.progress import OnStep


class Task:
    """Three 3D convolutions on a fixed batch."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self._config = config
        layers = [
            nn.Conv3d(1, 16, 3, padding=1),
            nn.InstanceNorm3d(16),
            nn.LeakyReLU(),
            nn.Conv3d(16, 16, 3, padding=1),
        ]
        self.model: nn.Module = nn.Sequential(*layers, nn.LeakyReLU(), nn.Conv3d(16, 2, 1)).to(device)
        self._batch = torch.randn(2, 1, 24, 24, 24), torch.randint(0, 2, (2, 24, 24, 24))

    def optimizer(self) -> torch.optim.Optimizer:
        """Train all parameters."""
        return build_optimizer(self.model.parameters(), self._config)

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same batch repeatedly."""
        for _ in range(start, self._config.iterations):
            yield self._batch

    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy."""
        return {"cross_entropy": nn.functional.cross_entropy(self.model(batch[0]), batch[1])}

    def validate(self) -> dict[str, float]:
        """Nothing to validate."""
        return {"score": 0.0}


def ours(config: TrainConfig, device: torch.device) -> float:
    """Seconds per step of fit, with metrics."""
    task, marks = Task(config, device), []
    with tempfile.TemporaryDirectory() as folder:
        fit(
            task,
            config,
            Run(
                folder=Path(folder),
                record=lambda step, scores: make_record(step, scores),
                runtime=Runtime(device=device),
                track=OnStep(lambda report: marks.append(time.perf_counter()) if report.scores is None else None),
            ),
        )
    return median_step(marks)


def bare(config: TrainConfig, device: torch.device) -> float:
    """Seconds per step of a hand-written loop that clips gradients and reads the loss in each step."""
    task = Task(config, device)
    optimizer, marks = task.optimizer(), []
    for batch in task.batches(0):
        loss = task.loss((batch[0].to(device), batch[1].to(device)))["cross_entropy"]
        loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 12.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        marks.append(time.perf_counter())
    return median_step(marks)


def median_step(marks: list[float]) -> float:
    """Median step in seconds, from the times at which steps ended."""
    return statistics.median(later - sooner for sooner, later in itertools.pairwise(marks))


def main() -> None:
    """Run both in turns and compare the median steps of their fastest rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    config = TrainConfig(epochs=1, iterations_per_epoch=arguments.steps, compile="off")
    bare(config, device)
    rounds = [(ours(config, device), bare(config, device)) for _ in range(arguments.rounds)]
    engine, loop = (min(times) for times in zip(*rounds, strict=True))
    result = {"name": "engine_overhead", "ours": round(engine, 6), "peer": round(loop, 6)}
    print(json.dumps(result | {"ratio": round(engine / loop, 4), "unit": "seconds a step"}))


if __name__ == "__main__":
    main()
