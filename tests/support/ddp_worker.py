"""One rank of the distributed tests, started by torch's launcher: FOLDER MODE."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.runtime import start_runtime
from rfmedsam2.errors import RfMedSamError
from rfmedsam2.records.plan import Sgd
from rfmedsam2.store.checkpoints import weights_sha256
from support.toy_task import BranchingTask, ToyTask, branching_config, make_config, make_run

BRANCHES: dict[str, list[tuple[int, ...]]] = {
    "all_at_first": [(0, 1), (0,), (1,), ()],
    "one_at_first": [(1,), (0, 1), (), (0,)],
}
"""Ranks on which a part of the network is used, step by step."""


def main(folder: Path, mode: str) -> None:
    """Train the toy as this rank does, and leave the identity of its weights."""
    config = make_config(accumulation=2, checkpoint_minutes=1e-9, optimizer=Sgd(), learning_rate=0.01)
    with start_runtime("cpu", precision="fp32", timeout_seconds=60.0) as runtime:
        rank = runtime.rank
        place: dict[str, Any] = {"rank": rank, "ranks": runtime.world_size, "dropout": 0.0, "batch_norm": False}
        if mode in BRANCHES:
            config = branching_config()
            task = BranchingTask(config, used=BRANCHES[mode], **place)
        else:
            task = ToyTask(config, idle=True, **place)
        if mode == "die" and rank == 1:
            task.at[31] = lambda: os.kill(os.getpid(), signal.SIGKILL)
        if mode == "stop" and rank == 1:
            task.at[21] = lambda: os.kill(os.getpid(), signal.SIGTERM)
        if mode == "diverge":
            task.nan_at = 13
        progress = fit(task, config, make_run(folder, runtime=runtime), resume=True)
        (folder / f"rank_{rank}.txt").write_text(f"{progress.status} {weights_sha256(task.model.state_dict())}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except RfMedSamError as error:
        sys.exit(f"{type(error).__name__}: {error}")
