"""A training that is killed, stopped or told to save: what is lost, and what the same command makes of it."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from support.commands import unfinished_files
from support.live_process import Launcher, Process

from rfmedsam2.engine.monitoring.log import read_events
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.checkpoints import read_all

pytestmark = pytest.mark.timeout(300)
FOLD = Path("results/Dataset900_PhantomCT/rfmed_cpu__3d_fullres/fold_0")
KILLS, KILLS_OF_THE_SHORT_FORM = 20, 3
EPOCHS, STEPS_AN_EPOCH = 5, 20
WORKERS = "3d_fullres.train.workers=1"
LONGEST_SECONDS = 10.0
"""From a signal to its checkpoint."""
OFTEN = "3d_fullres.train.checkpoint_minutes=1e-9"
"""A checkpoint after every step."""


def training(root: Path, *changes: str, epochs: int = EPOCHS, iterations: int = STEPS_AN_EPOCH) -> list[object]:
    words: list[object] = ["3d_fullres", "fold", 0, "--epochs", epochs, "--iterations", iterations, "--no-validate"]
    return [*words, "--set", *changes, "--root", root]


def latest(root: Path) -> Path:
    return root / FOLD / "checkpoint_latest.safetensors"


def saved_step(root: Path) -> int:
    """Step of the last checkpoint, after reading all of it; 0: there is none."""
    return read_all(latest(root))[0].step if latest(root).exists() else 0


def timeless(root: Path) -> list[dict[str, Any]]:
    """The metrics without what differs between any two runs."""
    events = read_events(root / FOLD / "metrics.jsonl")
    return [{k: v for k, v in event.items() if k not in ("seconds", "memory_mb")} for event in events]


def weights(root: Path, name: str) -> str:
    return read_record_of(root / FOLD / f"checkpoint_{name}.safetensors").weights_sha256


def saved(root: Path, step: int) -> bool:
    """Tell whether a checkpoint of this step, or a later one, is there."""
    return latest(root).exists() and read_record_of(latest(root)).step >= step


def test_killed_many_times_it_ends_as_if_unbroken(
    planned_root, root_of, launcher: Launcher, tmp_path, whole, fault_seed
):
    """Kills hit the start, steps, checkpoints being written, validations and the writing of logs."""
    unbroken = root_of(planned_root).rename(tmp_path / "unbroken")
    broken = root_of(planned_root)
    words = training(broken, OFTEN)
    launcher.finished("train", *training(unbroken, OFTEN), folder=tmp_path)
    events = read_events(unbroken / FOLD / "metrics.jsonl")
    step_seconds = median(event["seconds"] for event in events if event["event"] == "step")
    rng, before = np.random.default_rng((11, fault_seed)), 0
    for _ in range(KILLS if whole else KILLS_OF_THE_SHORT_FORM):
        process = launcher.start("train", *words, folder=tmp_path)
        wanted = before + int(rng.integers(0, 5))  # what it may save before it is killed; nothing: while it starts
        if wanted > before:
            process.until(lambda step=wanted: saved(broken, step))
        time.sleep(float(rng.uniform(0, 2 * step_seconds if wanted > before else 0.5)))
        assert process.kill() == -signal.SIGKILL, process.text()
        step = saved_step(broken)
        assert step >= wanted  # what was saved is neither lost nor begun again
        before = step
    assert before < EPOCHS * STEPS_AN_EPOCH
    assert f"Trained {EPOCHS * STEPS_AN_EPOCH} steps" in launcher.finished("train", *words, folder=tmp_path)
    assert timeless(broken) == timeless(unbroken)
    for name in ("final", "best", "latest"):
        assert weights(broken, name) == weights(unbroken, name)
    assert unfinished_files(broken) == []
    assert not (broken / FOLD / ".lock").exists()


def told(process: Process) -> int:
    """Number of progress lines so far."""
    return len(re.findall(r"step \d+/", process.text()))


def test_sigusr1_saves_within_seconds_and_sigterm_stops_with_143(planned_root, root_of, launcher: Launcher, tmp_path):
    """With workers that load data, and no checkpoint due for minutes: the first one is the signal's."""
    root = root_of(planned_root)
    words = training(root, WORKERS, "3d_fullres.train.checkpoint_minutes=100", epochs=900, iterations=1)
    process = launcher.start("train", *words, folder=tmp_path)
    process.until(lambda: told(process) > 0)
    assert not latest(root).exists()
    process.signal(signal.SIGUSR1)
    process.until(lambda: saved_step(root) > 0, seconds=LONGEST_SECONDS)
    step = saved_step(root)
    before = told(process)
    process.until(lambda: told(process) > before)  # it goes on
    began = time.monotonic()
    process.signal(signal.SIGTERM)
    assert process.wait(LONGEST_SECONDS) == 128 + signal.SIGTERM
    assert time.monotonic() - began < LONGEST_SECONDS
    stopped = saved_step(root)
    assert stopped > step
    assert f"Stopped by SIGTERM after step {stopped}; run the same command again to resume" in process.text()
    process = launcher.start("train", *words, folder=tmp_path)
    process.until(lambda: told(process) > 0)
    assert int(re.findall(r"step (\d+)/", process.text())[0]) > stopped
    assert process.kill() == -signal.SIGKILL
