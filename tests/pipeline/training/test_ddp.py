"""Two ranks on the CPU under torch's launcher: equal weights, the same training as one process, clear ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.ddp_worker import BRANCHES
from support.toy_task import BranchingTask, ToyTask, branching_config, make_config, make_run, timeless, weights_of

from rfmedsam2.engine.fit import fit
from rfmedsam2.records.training import Sgd
from rfmedsam2.store.checkpoints import read_all, read_weights

TESTS = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """A launcher that has ended."""

    returncode: int
    stderr: str


Launch = Callable[[Path, str], Done]


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """Two ranks in a folder, in one of the modes of `ddp_worker`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    command = [sys.executable, str(TESTS / "support" / "ddp_worker.py")]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def launched(folder: Path, mode: str) -> Done:
        folder.mkdir(exist_ok=True)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([str(folder), mode]) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, "the launchers' server has ended"
        return Done(int(code), (folder / f"{mode}.txt").read_text())

    yield launched
    server.communicate()  # the end of its input ends it


@pytest.fixture(scope="module")
def together(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp") / "run"
    done = launch(folder, "plain")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the batches of both ranks; some parameters get no gradient."""
    folder = tmp_path_factory.mktemp("alone")
    config = make_config(accumulation=2, optimizer=Sgd(), learning_rate=0.01)
    fit(ToyTask(config, ranks=1, size=8, dropout=0.0, batch_norm=False, idle=True), config, make_run(folder))
    return folder


def test_ranks_end_with_equal_weights(together):
    texts = [(together / f"rank_{n}.txt").read_text() for n in (0, 1)]
    assert texts[0] == texts[1] == f"finished {weights_of(together)}"


def test_two_ranks_learn_what_one_process_does_with_both_batches(together, alone):
    ours, theirs = (read_weights(f / "checkpoint_final.safetensors")[1] for f in (together, alone))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-5), name
    losses = [[e["loss"] for e in timeless(f) if e["event"] == "step"] for f in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(timeless(together)) == len(timeless(alone))


@pytest.mark.parametrize("mode", [pytest.param(m, marks=pytest.mark.whole) if i else m for i, m in enumerate(BRANCHES)])
def test_a_part_without_gradient_on_one_rank_in_some_steps_neither_hangs_nor_parts_the_ranks(launch, tmp_path, mode):
    done = launch(tmp_path / "two", mode)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [(tmp_path / "two" / f"rank_{n}.txt").read_text() for n in (0, 1)]
    assert texts[0] == texts[1] == f"finished {weights_of(tmp_path / 'two')}"

    config = branching_config()
    task = BranchingTask(config, used=BRANCHES[mode], ranks=1, size=8, dropout=0.0, batch_norm=False)
    before = task.model.branch.weight.detach().clone()
    fit(task, config, make_run(tmp_path / "one"))
    ours, theirs = (read_weights(tmp_path / n / "checkpoint_final.safetensors")[1] for n in ("two", "one"))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-6), name
    assert not torch.allclose(before, ours["branch.weight"], atol=1e-3)


def test_whatever_ends_a_training_the_same_command_goes_on_exactly(launch, tmp_path, together):
    """Divergence, a signal to one rank, a killed rank: all ranks end, and nothing of it can be seen after."""
    done = launch(tmp_path, "diverge")
    assert done.returncode != 0
    assert "DivergedError: Training diverged at step 6" in done.stderr
    assert "cases case_12, case_13" in done.stderr
    assert steps_done(tmp_path) == 6

    done = launch(tmp_path, "stop")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {(tmp_path / f"rank_{n}.txt").read_text().split()[0] for n in (0, 1)} == {"stopped"}
    assert steps_done(tmp_path) == 11

    began = time.monotonic()
    done = launch(tmp_path, "die")
    assert time.monotonic() - began < 60
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert steps_done(tmp_path) == 15

    assert launch(tmp_path, "plain").returncode == 0
    assert timeless(tmp_path) == timeless(together)
    assert weights_of(tmp_path) == weights_of(together)


def steps_done(folder):
    record, tensors, _ = read_all(folder / "checkpoint_latest.safetensors")
    assert {n.split("/")[1] for n in tensors if n.startswith("random/")} == {"0", "1"}
    return record.step
