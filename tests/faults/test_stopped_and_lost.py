"""A training that a scheduler stops and lets go on, and one whose ranks are killed, one after the other."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from support.live_process import Launcher, Process

from rfmedsam2.store.checkpoint_header import read_record_of

pytestmark = pytest.mark.timeout(300)
FOLD = Path("results/Dataset900_PhantomCT/rfmed_cpu__3d_fullres/fold_0")
OFTEN = "3d_fullres.train.checkpoint_minutes=1e-9"
STEPS = 12
PATIENCE_SECONDS = 4.0
TOLD_SECONDS = 20.0
"""From the end of a rank to the end of the other."""


def training(root: Path, *changes: str) -> list[object]:
    words: list[object] = ["3d_fullres", "fold", 0, "--epochs", 2, "--iterations", STEPS // 2, "--no-validate"]
    return [*words, "--device", "cpu", "--set", OFTEN, *changes, "--root", root]


def saved(root: Path, step: int) -> bool:
    latest = root / FOLD / "checkpoint_latest.safetensors"
    return latest.exists() and read_record_of(latest).step >= step


def weights(root: Path) -> str:
    return read_record_of(root / FOLD / "checkpoint_final.safetensors").weights_sha256


def test_stopped_for_longer_than_a_worker_may_take_it_goes_on(
    planned_root, root_of, launcher: Launcher, tmp_path, whole
):
    """SIGSTOP and SIGCONT to the whole job, as schedulers do to suspend it."""
    changes = ("3d_fullres.train.workers=1", f"3d_fullres.train.worker_timeout_seconds={PATIENCE_SECONDS}")
    unbroken = root_of(planned_root).rename(tmp_path / "unbroken")
    launcher.finished("train", *training(unbroken, *changes), folder=tmp_path)
    root = root_of(planned_root)
    process = launcher.start("train", *training(root, *changes), folder=tmp_path)
    for step in (1, 6) if whole else (4,):
        process.until(lambda step=step: saved(root, step))
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(PATIENCE_SECONDS + 0.5)
        os.killpg(process.pid, signal.SIGCONT)
    assert process.wait() == 0, process.text()
    assert weights(root) == weights(unbroken)


def ranks(root: Path, launcher: Launcher, tmp_path: Path) -> list[Process]:
    """Both ranks of a training, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    return [
        launcher.start("train", *training(root), folder=tmp_path, environment={**place, "RANK": n, "LOCAL_RANK": n})
        for n in (0, 1)
    ]


def test_ranks_killed_one_after_the_other_end_all_and_cost_nothing(
    planned_root, root_of, launcher: Launcher, tmp_path, whole
):
    """Short form: the main rank alone; `../pipeline/training/test_ddp.py` kills another one under torchrun."""
    unbroken = root_of(planned_root).rename(tmp_path / "unbroken")
    assert [rank.wait() for rank in ranks(unbroken, launcher, tmp_path)] == [0, 0]
    root = root_of(planned_root)
    for lost, step in ((1, 2), (0, 6)) if whole else ((0, 4),):
        both = ranks(root, launcher, tmp_path)
        both[0].until(lambda step=step: saved(root, step))
        assert both[lost].kill() == -signal.SIGKILL
        other = both[1 - lost]
        assert other.wait(TOLD_SECONDS) == 2, other.text()
        assert "Another process of this training has ended or does not respond" in other.text()
        assert "run the same command again to resume" in other.text()
        assert "Traceback" not in other.text()
        assert not list(root.rglob(".lock")) or lost == 0  # a killed rank leaves the file, but no lock
    both = ranks(root, launcher, tmp_path)
    begun = read_record_of(root / FOLD / "checkpoint_latest.safetensors").step
    both[1].until(lambda: saved(root, begun + 1))
    both[1].signal(signal.SIGTERM)  # to one of them: all save and leave
    assert [rank.wait() for rank in both] == [143, 143], both[0].text()
    assert "Stopped by another process of this training after step" in both[0].text()
    assert "Stopped by SIGTERM after step" in both[1].text()
    both = ranks(root, launcher, tmp_path)
    assert [rank.wait() for rank in both] == [0, 0], both[0].text()
    assert weights(root) == weights(unbroken)
    assert not list(root.rglob(".lock"))
