"""The distributed tests' ranks under torch's launcher, forked from a process that has imported everything once.

usage: python ddp_worker.py < REQUESTS

A request is a line of JSON [FOLDER, MODE]; its answer is a line with the exit code. What launcher and ranks say goes to
FOLDER/MODE.txt. The launcher is the function that torchrun itself calls. Most modes train the toy; "train" is
rfmed_train with the words of FOLDER/words.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - as every optimizer does: imported before the forks
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.runtime import start_runtime
from rfmedsam2.errors import RfMedSamError
from rfmedsam2.records.training import Sgd
from rfmedsam2.store.checkpoints import weights_sha256
from support.commands import run_ok
from support.toy_task import BranchingTask, ToyTask, branching_config, make_config, make_run

BRANCHES: dict[str, list[tuple[int, ...]]] = {
    "all_at_first": [(0, 1), (0,), (1,), ()],
    "one_at_first": [(1,), (0, 1), (), (0,)],
}
"""Ranks on which a part of the network is used, step by step."""


def rank(folder: Path, mode: str) -> None:
    """Train as this rank does; the toy leaves the identity of its weights."""
    if mode == "train":
        run_ok("train", *json.loads((folder / "words.json").read_text()))
        return
    config = make_config(accumulation=2, checkpoint_minutes=1e-9, optimizer=Sgd(), learning_rate=0.01)
    with start_runtime("cpu", precision="fp32", timeout_seconds=60.0) as runtime:
        number = runtime.rank
        place: dict[str, Any] = {"rank": number, "ranks": runtime.world_size, "dropout": 0.0, "batch_norm": False}
        if mode in BRANCHES:
            config = branching_config()
            task = BranchingTask(config, used=BRANCHES[mode], **place)
        else:
            task = ToyTask(config, idle=True, **place)
        if mode == "die" and number == 1:
            task.at[31] = lambda: os.kill(os.getpid(), signal.SIGKILL)
        if mode == "stop" and number == 1:
            task.at[21] = lambda: os.kill(os.getpid(), signal.SIGTERM)
        if mode == "diverge":
            task.nan_at = 13
        progress = fit(task, config, make_run(folder, runtime=runtime), resume=True)
        (folder / f"rank_{number}.txt").write_text(f"{progress.status} {weights_sha256(task.model.state_dict())}")


def rank_or_sentence(folder: Path, mode: str) -> None:
    """A rank that ends with a sentence, as in the commands."""
    try:
        rank(folder, mode)
    except RfMedSamError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def launched(folder: Path, mode: str) -> int:
    """Run two ranks under a launcher of their own; gives the launcher's exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        said = os.open(folder / f"{mode}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(said, stream)
        place = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "rdzv_backend": "c10d"}
        config = LaunchConfig(
            **place, rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1, start_method="fork"
        )
        elastic_launch(config, rank_or_sentence)(folder, mode)
        code = 0
    except BaseException:  # noqa: BLE001 - as the interpreter does at its border
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        folder, mode = json.loads(line)
        print(launched(Path(folder), mode), flush=True)  # noqa: T201
