"""Two runs started on the same folder: the second is told so, the first is not disturbed, and no lock outlives it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import PLANNING
from support.live_process import Launcher

pytestmark = pytest.mark.timeout(200)
FOLD = Path("results/Dataset900_PhantomCT/rfmed_cpu__3d_fullres/fold_0")

Words = tuple[object, ...]


def training(root: Path) -> tuple[Path, Words]:
    short = ("--epochs", 1, "--iterations", 2, "--no-validate")
    return root / FOLD, ("train", "3d_fullres", 0, *short, "--root", root)


def preprocessing(root: Path) -> tuple[Path, Words]:
    return root / "preprocessed" / "Dataset900_PhantomCT", ("plan_and_preprocess", *PLANNING, "--root", root)


def prediction(root: Path) -> tuple[Path, Words]:
    images = root / "raw" / "Dataset900_PhantomCT" / "imagesTs"
    return root / "out", ("predict", "-i", images, "-o", root / "out", "--root", root)


RUNS = {"raw": preprocessing, "planned": training, "trained": prediction}


@pytest.mark.parametrize("start", RUNS)
def test_the_second_run_is_told_so(request, root_of, launcher: Launcher, tmp_path, start):
    root = root_of(request.getfixturevalue(f"{start}_root"))
    make: Callable[[Path], tuple[Path, Words]] = RUNS[start]
    folder, words = make(root)
    lock = folder / ".lock"
    name, *rest = words
    first = launcher.start(str(name), *rest, folder=tmp_path)
    first.until(lambda: lock.exists() and lock.stat().st_size)
    first.signal(signal.SIGSTOP)
    try:
        told = launcher.finished(str(name), *rest, folder=tmp_path, code=2)
    finally:
        first.signal(signal.SIGCONT)
    assert f"rfmed_{name}: Another run is working in this folder: {folder}. Found process {first.pid} on " in told
    assert "Traceback" not in told
    assert first.wait() == 0, first.text()
    assert not lock.exists()
    launcher.finished(str(name), *rest, folder=tmp_path)
