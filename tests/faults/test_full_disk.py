"""A disk that fills up: a sentence, nothing damaged is taken for finished, and work goes on when there is space."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import PLANNING, run_error, run_ok, unfinished_files
from support.live_process import Launcher

from rfmedsam2.store.checkpoints import read_all
from rfmedsam2.store.images import read_label
from rfmedsam2.store.preprocessed import CaseStore

pytestmark = pytest.mark.timeout(200)
DATASET = "Dataset900_PhantomCT"
CASES = Path("preprocessed", DATASET, "rfmed_cpu_3d_fullres")
FOLD = Path("results", DATASET, "rfmed_cpu__3d_fullres", "fold_0")


class Disk:
    """A real disk of a few megabytes, that can be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def leave(self, free_bytes: int) -> None:
        """Fill it until about so much is free."""
        self._filler.write_bytes(b"x" * max(0, shutil.disk_usage(self.folder).free - free_bytes))

    def free(self) -> None:
        """Make space."""
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", folder], check=True)


def checksums(root: Path) -> dict[str, dict[str, int]]:
    store = CaseStore(root / CASES)
    return {name: {k: f.crc32 for k, f in store.open(name).record.files.items()} for name in store.ids()}


@pytest.mark.parametrize("free", [0, 20_000, 150_000, 300_000])
def test_preprocessing(raw_root, planned_root, root_of, disk: Disk, free):
    root = root_of(raw_root)
    (root / "preprocessed").symlink_to(disk.folder)
    words = ("plan_and_preprocess", *PLANNING, "--root", root)
    disk.leave(free)
    assert "The disk is full" in run_error(*words)
    assert unfinished_files(disk.folder) == []
    store = CaseStore(root / CASES)
    finished = store.ids()
    assert all(store.looks_complete(name) for name in finished)
    disk.free()
    said = run_ok(*words).out
    assert f"{len(finished)} finished before" in said
    assert checksums(root) == checksums(planned_root)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_training(trained_root, root_of, disk: Disk, share):
    """With room for such a part of a checkpoint."""
    root = root_of(trained_root)
    shutil.move(root / "results", disk.folder / "results")
    (root / "results").symlink_to(disk.folder / "results")
    latest = root / FOLD / "checkpoint_latest.safetensors"
    before = latest.read_bytes()
    words = ("train", "3d_fullres", 0, "--epochs", 3, "--iterations", 2, "--no-validate", "--root", root)
    disk.leave(int(share * len(before)))
    assert "The disk is full" in run_error(*words)
    assert unfinished_files(disk.folder) == []
    assert read_all(latest)[0].step == 2
    disk.free()
    assert "Trained 6 steps" in run_ok(*words).out
    for name in ("latest", "final", "best"):
        read_all(latest.with_name(f"checkpoint_{name}.safetensors"))


def test_prediction(trained_root, disk: Disk):
    images = trained_root / "raw" / DATASET / "imagesTs"
    words = ("predict", "-i", images, "-o", disk.folder / "out", "--continue", "--root", trained_root)
    run_ok(*words)
    sizes = [path.stat().st_size for path in sorted((disk.folder / "out").glob("*.nii.gz"))]
    shutil.rmtree(disk.folder / "out")
    # room for one label map and its entry (a page each, and one for writing beside), not for two
    for room in (0, sizes[0] + 3 * 4096):
        disk.leave(room)
        sentence = run_error(*words)
        assert "The disk is full" in sentence
        assert "were not predicted" in sentence or room == 0
        assert unfinished_files(disk.folder) == []
        for path in (disk.folder / "out").glob("*.nii.gz"):
            read_label(path)
        disk.free()
    run_ok(*words)
    assert len(list((disk.folder / "out").glob("*.nii.gz"))) == len(sizes)


def test_files_that_may_not_grow(raw_root, trained_root, root_of, launcher: Launcher, tmp_path):
    """Where nobody may mount: the system refuses bytes beyond a limit, as it does on a full disk."""
    root = root_of(trained_root)
    (tmp_path / "other").mkdir()
    shutil.copytree(raw_root, tmp_path / "other" / "root")
    raw = root / "raw" / DATASET
    commands = (
        ("plan_and_preprocess", *PLANNING, "--root", tmp_path / "other" / "root"),
        ("train", "3d_fullres", 0, "--epochs", 3, "--iterations", 2, "--no-validate", "--root", root),
        ("predict", "-i", raw / "imagesTs", "-o", tmp_path / "out", "--root", root),
    )
    for name, *words in commands:
        limit = 1_500 if name == "predict" else 5_000  # what it says goes to a file too
        process = launcher.start(name, *words, folder=tmp_path, file_bytes=limit)
        assert process.wait() == 2, process.text()
        assert f"rfmed_{name}: " in process.text()
        assert "cannot be written (File too large)" in process.text()
        assert "Traceback" not in process.text()
        assert unfinished_files(tmp_path) == []
    assert read_all(root / FOLD / "checkpoint_latest.safetensors")[0].step == 2
    for name, *words in commands:
        launcher.finished(name, *words, folder=tmp_path)
