"""Commands in processes of their own whose output cannot be written: the work is done all the same."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rfmedsam2.store.checkpoint_header import read_record_of

PHANTOM = "from rfmedsam2.cli.data_and_models import make_phantom_command as run"
TRAIN = "from rfmedsam2.cli.pipeline import train_command as run"
SLOW = """
import os, time
from pathlib import Path
from rfmedsam2.cli.command import command
def slow() -> None:
    '''Work for a while, with progress.'''
    from rfmedsam2.cli.progress import bars
    for _ in bars(range(100), "x" * 500, 100):
        time.sleep(0.01)
    Path(os.environ["MADE"]).touch()
run = command(slow)
"""


def start(code: str, *words: object, env: dict[str, str] | None = None, **streams) -> subprocess.Popen:
    program = f"{code}\nimport sys\nsys.argv[0] = 'rfmed_test'\nrun()"
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.Popen(command, env={**os.environ, **(env or {})}, **streams)


def phantom(folder: Path) -> tuple[object, ...]:
    return ("--cases", 1, "--test-cases", 1, "--shape", 12, 32, 32, "-o", folder)


def test_a_reader_that_leaves_early_ends_nothing(tmp_path: Path) -> None:
    process = start(PHANTOM, *phantom(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 4


def test_a_training_goes_on_when_its_reader_leaves_after_the_first_line(root_of, planned_root) -> None:
    root = root_of(planned_root)
    words = ("3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 3, "--no-validate", "--root", root)
    process = start(TRAIN, *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"Data: ")
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    (checkpoint,) = root.glob("results/*/*/fold_0/checkpoint_final.safetensors")
    assert read_record_of(checkpoint).step == 3


@pytest.mark.skipif(os.name == "nt", reason="descriptors are closed by a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_descriptors_end_nothing(closed: str, tmp_path: Path) -> None:
    program = f"{PHANTOM}\nimport sys\nsys.argv[0] = 'rfmed_make_phantom'\nrun()"
    words = " ".join(map(str, phantom(tmp_path)))
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {words} {closed}', sys.executable, program],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 4
    assert all(path.stat().st_size for path in tmp_path.rglob("*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_below_the_answer_is_a_sentence_after_the_work(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(PHANTOM, *phantom(tmp_path), stdout=full, stderr=subprocess.PIPE)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert b"The answer cannot be written" in told
    assert b"Traceback" not in told
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 4


def test_a_full_disk_below_the_progress_is_no_fault(tmp_path: Path) -> None:
    with Path(os.devnull).open("w") as nothing, Path("/dev/full").open("w") as full:
        assert start(PHANTOM, *phantom(tmp_path), stdout=nothing, stderr=full).wait(timeout=120) == 0


def test_an_encoding_without_the_letters_ends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "漢 [b]\x1b[31m"
    env = {"PYTHONIOENCODING": "ascii:strict"}
    process = start(PHANTOM, *phantom(folder), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert rb"\u6f22 [b]\x1b[31m" in out


def test_a_pipe_that_nobody_reads_delays_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    process = start(SLOW, env={"MADE": str(made)}, stdout=subprocess.DEVNULL, stderr=writer)
    try:
        for _ in range(300):
            if made.exists():
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
        assert made.exists()
    finally:
        os.close(reader)
        os.close(writer)
        process.wait(timeout=60)
