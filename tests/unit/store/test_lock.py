"""One run that writes to a folder, or several that read it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rfmedsam2.errors import StoreError, UsageError
from rfmedsam2.pipeline.prediction.checkpoints import find_models
from rfmedsam2.store import lock
from rfmedsam2.store.checkpoint_header import FINAL
from rfmedsam2.store.lock import (
    LOCK,
    InUseError,
    exclusive_lock,
    move_into_place,
    placing,
    shared_lock,
    workplace,
)
from rfmedsam2.system.atomic import PARTIAL

HOLD = """
import sys, time
from pathlib import Path
from rfmedsam2.store.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_who_works_there(tmp_path):
    process = holder(tmp_path / "out")
    try:
        told = pytest.raises(UsageError, match=f"Another run .*out.*process {process.pid} on ")
        with told, exclusive_lock(tmp_path / "out"):
            pass
        assert (tmp_path / "out" / LOCK).exists()
    finally:
        process.kill()
        process.communicate()


def test_a_killed_run_holds_nothing_and_its_half_files_go(tmp_path):
    process = holder(tmp_path)
    (tmp_path / f"{PARTIAL}abc-scan.nii.gz").write_bytes(b"half")
    (tmp_path / "scan.nii.gz").write_bytes(b"whole")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with exclusive_lock(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK, "scan.nii.gz"]
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    with pytest.raises(KeyError), exclusive_lock(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_a_sentence(tmp_path):
    (tmp_path / "out").write_text("I am a file")
    with pytest.raises(StoreError, match="Expected a folder, but a file exists"), exclusive_lock(tmp_path / "out"):
        pass


def test_many_may_read_and_nobody_writes_meanwhile(tmp_path):
    (tmp_path / "case").touch()
    with shared_lock(tmp_path):
        with shared_lock(tmp_path):
            told = pytest.raises(InUseError, match=f"Another run .*process {os.getpid()} on ")
            with told, exclusive_lock(tmp_path):
                pass
        with pytest.raises(InUseError), exclusive_lock(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["case"]
    with exclusive_lock(tmp_path), pytest.raises(InUseError), shared_lock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["case"]


def test_a_reader_makes_no_folder(tmp_path):
    with shared_lock(tmp_path / "none"):
        assert not (tmp_path / "none").exists()


def test_a_run_that_has_ended_is_not_named(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with shared_lock(tmp_path):
        with (tmp_path / LOCK).open("a") as stream:
            stream.write(f"process {ended.pid} on {socket.gethostname()}, since then\nprocess 1 on elsewhere, since\n")
        with pytest.raises(InUseError) as told, exclusive_lock(tmp_path):
            pass
    assert f"process {os.getpid()} on " in str(told.value)
    assert "process 1 on elsewhere" in str(told.value)
    assert f"process {ended.pid} on" not in str(told.value)


def test_whoever_waits_comes_next(tmp_path):
    order = []

    def later():
        with exclusive_lock(tmp_path, wait_seconds=30.0):
            order.append("second")

    thread = threading.Thread(target=later)
    with exclusive_lock(tmp_path):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    with exclusive_lock(tmp_path), pytest.raises(InUseError), exclusive_lock(tmp_path, wait_seconds=0.1):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog, number):
    """Another run may be at work: its partial files stay."""

    def flock(handle, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    (tmp_path / f"{PARTIAL}of-another").touch()
    with exclusive_lock(tmp_path), shared_lock(tmp_path):
        (tmp_path / "result").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{PARTIAL}of-another", "result"]
    assert f"{tmp_path} cannot be locked ({os.strerror(number)}): do not start a second run in it" in caplog.text


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_folders_that_killed_runs_left_are_removed_and_those_of_others_stay(tmp_path, monkeypatch, locks):
    left = tmp_path / ".import-left" / "model"
    left.mkdir(parents=True)
    with workplace(tmp_path, ".import-") as first:
        assert not left.exists()
        left.mkdir(parents=True)
        if not locks:
            monkeypatch.setattr(lock, "fcntl", None)
        with workplace(tmp_path, ".import-") as second:
            assert first.is_dir()
            assert second != first
            assert left.exists() is not locks
    assert not first.exists()
    assert not second.exists()


REPLACE = """
import os, signal, sys
from pathlib import Path
from rfmedsam2.store.lock import move_into_place, placing, workplace
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
rename, left = Path.rename, int(sys.argv[2])
def killing(path, target):
    global left
    if left == 0:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    left -= 1
    return rename(path, target)
Path.rename = killing
with workplace(Path(sys.argv[1]), ".import-") as work:
    (work / "model").mkdir()
    (work / "model" / "new").touch()
    with placing(Path(sys.argv[1]) / "home" / "model"):
        move_into_place(work / "model", Path(sys.argv[1]) / "home" / "model")
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("renames", [0, 1])
def test_what_is_replaced_is_not_lost_whenever_it_ends(tmp_path: Path, renames: int, number: str) -> None:
    model = tmp_path / "home" / "model"
    model.mkdir(parents=True)
    (model / "old").touch()
    process = subprocess.run([sys.executable, "-c", REPLACE, tmp_path, str(renames), number], capture_output=True)
    assert process.returncode != 0
    assert model.exists() is (renames == 0)
    with placing(model):
        assert [path.name for path in model.iterdir()] == ["old"]
    with workplace(tmp_path, ".import-") as work, placing(model):
        (work / "model").mkdir()
        move_into_place(work / "model", model)
    assert list(model.iterdir()) == []
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["home", "model"]


def test_a_folder_moved_aside_is_no_model(tmp_path: Path) -> None:
    for name in ("plan__3d_fullres", ".replaced-plan__3d_fullres"):
        fold = tmp_path / "Dataset001_A" / name / "fold_0"
        fold.mkdir(parents=True)
        (fold / FINAL).touch()
    assert [model.folder.name for model in find_models(tmp_path)] == ["plan__3d_fullres"]
