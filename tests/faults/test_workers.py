"""Processes that are killed, or run out of memory, at work: what is said, what goes on, that nobody stays behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from support.commands import PLANNING, unfinished_files
from support.live_process import Launcher, Process

from rfmedsam2.engine.loader import batches
from rfmedsam2.errors import MemoryShortError
from rfmedsam2.store.checkpoints import read_all
from rfmedsam2.store.images import read_label
from rfmedsam2.store.preprocessed import CaseStore

pytestmark = pytest.mark.timeout(200)
DATASET = "Dataset900_PhantomCT"
CASES = Path("preprocessed", DATASET, "rfmed_cpu_3d_fullres")
FOLD = Path("results", DATASET, "rfmed_cpu__3d_fullres", "fold_0")
TOLD_SECONDS = 10.0
GONE_SECONDS = 60.0
"""Generous: with more to do than cores, it takes a while until the workers of a killed command have their turn."""

CROWDED = """
import resource, sys, threading, time
import numpy as np
from rfmedsam2.system.parallel import map_cases
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (700 << 20),) * 2)
def work(n):
    array = np.ones(400 << 20, np.uint8)
    time.sleep(0.3)
    return n + int(array[-1])
print(list(map_cases(work, range(4), workers=int(sys.argv[1]), name="case_{}".format)))
"""


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from rfmedsam2.errors import ImageError
from rfmedsam2.store.images import read_image
np.ones((64, 64)) @ np.ones((64, 64))  # BLAS takes its memory at its first use
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (40 << 20),) * 2)
try:
    read_image(Path(sys.argv[1]))
except ImageError as error:
    print(error)
"""


def training(root: Path, workers: int) -> list[object]:
    figures = (f"3d_fullres.train.workers={workers}", "3d_fullres.train.checkpoint_minutes=1e-9")
    short = ("--epochs", 900, "--iterations", 1, "--no-validate")
    return ["3d_fullres", 0, *short, "--set", *figures, "--root", root]


def workers_of(process: Process) -> list[psutil.Process]:
    """The processes that load data: below the server that they are forked from."""
    return [child for child in process.children() if child.ppid() != process.pid]


def told(process: Process) -> int:
    return len(re.findall(r"step \d+/", process.text()))


def too_much(number: int) -> np.ndarray:
    return np.empty(1 << 60, np.uint8)


def test_a_killed_loader_is_told_and_replaced_once(planned_root, root_of, launcher: Launcher, tmp_path):
    root = root_of(planned_root)
    process = launcher.start("train", *training(root, workers=2), folder=tmp_path)
    process.until(lambda: told(process) > 0)
    workers_of(process)[0].kill()
    process.until(lambda: "Retrying with 1 worker(s)" in process.text(), seconds=TOLD_SECONDS)
    for part in ("Data loading worker", "SIGKILL, probably out of memory", "phantom_", "memory was", "GiB", "free now"):
        assert part in process.text()
    before = told(process)
    process.until(lambda: told(process) > before)
    (worker,) = workers_of(process)
    saved = read_all(root / FOLD / "checkpoint_latest.safetensors")[0].step
    worker.kill()
    assert process.wait(TOLD_SECONDS) == 2, process.text()
    assert "rfmed_train: Data loading worker" in process.text()
    assert "Traceback" not in process.text()
    assert read_all(root / FOLD / "checkpoint_latest.safetensors")[0].step >= saved >= 5  # what was saved is kept


def test_a_loader_without_memory_says_so(caplog):
    with pytest.raises(MemoryShortError, match=r"Memory ran out while making a batch: batch 0 \(case_0\).*GiB"):
        list(batches(too_much, 0, 4, workers=2, seed=0, timeout_seconds=60.0, describe="case_{}".format))
    assert "Retrying with 1 worker(s)" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are Linux's")
def test_cases_that_do_not_fit_at_once_are_done_one_by_one():
    done = subprocess.run([sys.executable, "-c", CROWDED, "2"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[1, 2, 3, 4]\n", done.stderr
    assert "Memory ran out: case_" in done.stderr
    assert "GiB in use by this process" in done.stderr
    assert "Retrying with 1 worker(s)" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are Linux's")
def test_an_image_larger_than_memory_is_not_called_damaged(tmp_path):
    path = tmp_path / "large.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((512, 512, 100), np.int16), np.eye(4)), path)
    done = subprocess.run([sys.executable, "-c", LARGE, path], capture_output=True, text=True, timeout=120)
    assert "There is not enough memory to read the image" in done.stdout, done.stderr
    assert "fewer workers" in done.stdout


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended in time; one that has, and that nobody has asked for its exit code yet, is gone."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    end = time.monotonic() + GONE_SECONDS
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def test_preprocessing_killed_at_random_moments_goes_on(
    raw_root, planned_root, root_of, launcher: Launcher, tmp_path, fault_seed
):
    root = root_of(raw_root)
    words = (*PLANNING, "--workers", 2, "--root", root)
    rng = np.random.default_rng((3, fault_seed))
    store = CaseStore(root / CASES)
    for finished in range(4):
        process = launcher.start("plan_and_preprocess", *words, folder=tmp_path)
        process.until(lambda least=finished: len(store.ids()) >= least)
        time.sleep(float(rng.uniform(0, 0.05)))
        children = process.children()
        if process.kill() == -signal.SIGKILL:
            assert still_running(children) == []
        assert [name for name in store.ids() if not store.looks_complete(name)] == []
    launcher.finished("plan_and_preprocess", *words, folder=tmp_path)
    other = CaseStore(planned_root / CASES)
    for name in other.ids():
        crcs = [{k: f.crc32 for k, f in s.open(name).record.files.items()} for s in (store, other)]
        assert crcs[0] == crcs[1]
    assert unfinished_files(root) == []


def test_nobody_is_left_behind_a_killed_training(planned_root, root_of, launcher: Launcher, tmp_path):
    root = root_of(planned_root)
    process = launcher.start("train", *training(root, workers=2), folder=tmp_path)
    process.until(lambda: told(process) > 0)
    children = process.children()
    assert len(children) >= 3
    process.kill()
    assert still_running(children) == []
    process = launcher.start("train", *training(root, workers=2), folder=tmp_path)
    process.until(lambda: told(process) > 0)
    process.kill()


def test_a_killed_prediction_goes_on(trained_root, root_of, launcher: Launcher, tmp_path):
    root, out = root_of(trained_root), tmp_path / "out"
    images = root / "raw" / DATASET / "imagesTs"
    words = ("-i", images, "-o", out, "--continue", "--root", root)
    process = launcher.start("predict", *words, folder=tmp_path)
    process.until(lambda: (out / ".lock").exists())
    process.until(lambda: len(list(out.iterdir())) > 1)  # it writes
    children = process.children()
    process.kill()
    assert still_running(children) == []
    for path in out.glob("phantom*.nii.gz"):
        read_label(path)
    assert "Predicted" in launcher.finished("predict", *words, folder=tmp_path)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["phantom_006.nii.gz", "phantom_007.nii.gz", "predictions.json"]
