"""One run at a time in a folder of results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from rfmedsam2.errors import StoreError, UsageError
from rfmedsam2.store.lock import LOCK, exclusive_lock
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
