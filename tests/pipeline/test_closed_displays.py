"""Commands in processes of their own whose output cannot be written, or whose terminal goes: no work is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.samhq_commands import write_images

from rfmedsam2.store.checkpoint_header import read_header, read_record_of
from segment_anything_hq.records import RefinerRecord

PHANTOM = "from rfmedsam2.cli.data_and_models import make_phantom_command as run"
TRAIN = "from rfmedsam2.cli.pipeline import train_command as run"
TRAIN_IMAGES = "from segment_anything_hq.cli.training import train_command as run"
WORKERS = ("--set", "3d_fullres.train.workers=1", "3d_fullres.train.checkpoint_minutes=100")
SLOW = """
import logging, os, time
from pathlib import Path
from rfmedsam2.cli.command import command
def slow() -> None:
    '''Work for a while, with progress and a warning.'''
    from rfmedsam2.cli.progress import bars
    for _ in bars(range(100), "x" * 500, 100):
        time.sleep(0.01)
    logging.getLogger("work").warning("something")
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


@pytest.mark.skipif(os.name == "nt", reason="descriptors are closed by a POSIX shell")
def test_help_that_nobody_can_see_ends_well() -> None:
    program = f"{PHANTOM}\nimport sys\nsys.argv[0] = 'rfmed_make_phantom'\nrun()"
    words = ["/bin/sh", "-c", 'exec "$0" -c "$1" --help >&-', sys.executable, program]
    done = subprocess.run(words, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


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


# ---------------------------------------------------------------- trainings


def volumes(root: Path, *, epochs: int = 900) -> tuple[object, ...]:
    return ("3d_fullres", "fold", 0, "--epochs", epochs, "--iterations", 2, "--no-validate", *WORKERS, "--root", root)


def images(folder: Path, *, epochs: int = 900) -> tuple[object, ...]:
    data = write_images(folder / "data")
    figures = ("batch_size=1", f"train.epochs={epochs}", "train.iterations_per_epoch=2", "train.workers=1")
    words = ("sam_decoder", "-b", "vit_nano", "--frame-size", 64, "--device", "cpu", "--data", data, "--held-out", 0)
    return (*words, "-o", folder / "run", "--set", *figures, "train.checkpoint_minutes=100")


def wait_for(happened: Callable[[], object], process: subprocess.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.returncode
        assert time.monotonic() < end
        time.sleep(0.02)


def steps(folder: Path) -> int:
    """Steps that metrics.jsonl below a folder tells of, over all trainings."""
    return sum(path.read_bytes().count(b'"event": "step"') for path in folder.rglob("metrics.jsonl"))


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
@pytest.mark.parametrize("wing", ["volumes", pytest.param("images", marks=pytest.mark.whole)])
def test_a_training_whose_terminal_closes_saves_and_ends_with_129(wing, root_of, planned_root, tmp_path) -> None:
    """The terminal's end sends SIGHUP to the command, its workers and their server at once."""
    root = root_of(planned_root) if wing == "volumes" else tmp_path
    code, words = (TRAIN, volumes(root)) if wing == "volumes" else (TRAIN_IMAGES, images(root))
    terminal, side = os.openpty()
    process = start(code, *words, stdin=side, stdout=side, stderr=side, start_new_session=True, preexec_fn=controlled)
    os.close(side)
    shown = b""
    while b"step " not in shown:
        shown += os.read(terminal, 4096)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.close(terminal)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    (latest,) = root.rglob("checkpoint_latest.safetensors")
    record = read_record_of(latest) if wing == "volumes" else read_header(latest, RefinerRecord).record
    assert record.step == steps(root) > 0
    assert not psutil.wait_procs(children, timeout=120)[1]


def controlled() -> None:
    """Make the terminal on descriptor 0 the controlling one of this session."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.whole
def test_a_training_of_images_goes_on_when_its_reader_leaves(tmp_path) -> None:
    process = start(TRAIN_IMAGES, *images(tmp_path, epochs=2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert read_header(tmp_path / "run" / "checkpoint_final.safetensors", RefinerRecord).record.step == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_training_into_a_full_log_is_finished(root_of, planned_root) -> None:
    root = root_of(planned_root)
    with Path("/dev/full").open("w") as full:
        assert start(TRAIN, *volumes(root, epochs=1), stdout=full, stderr=full).wait(timeout=300) == 2
    (checkpoint,) = root.rglob("checkpoint_final.safetensors")
    assert read_record_of(checkpoint).step == 2


@pytest.mark.whole
@pytest.mark.parametrize("how", ["closed pipe", "SIGHUP"])
def test_ranks_under_torchrun(how, root_of, planned_root) -> None:
    """The launcher's output goes where the ranks' goes; a hang-up reaches launcher, ranks and workers."""
    root = root_of(planned_root)
    script = root / "rank.py"
    script.write_text(f"{TRAIN}\nif __name__ == '__main__':\n    run()")
    epochs = 1 if how == "closed pipe" else 900
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    words = [*launcher, "--rdzv-endpoint", "localhost:0", script, *volumes(root, epochs=epochs), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    if how == "closed pipe":
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=300) == 0
        (final,) = root.rglob("checkpoint_final.safetensors")
        assert read_record_of(final).step == 2
        return
    for line in process.stdout:
        if line.startswith(b"step "):
            break
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode != 0
    (latest,) = root.rglob("checkpoint_latest.safetensors")
    assert read_record_of(latest).step == steps(root) > 0
