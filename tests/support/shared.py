"""Folders that are made once, whichever worker of pytest-xdist asks first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this run's temporary folder, filled by the first who asks; the others wait. Nobody changes it.

    Args:
        factory: pytest's.
        name: of the folder, unique within the run.
        make: fills the folder, which does not exist yet; a failure is tried again by whoever asks next.
    """
    base = factory.getbasetemp()
    home = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = home / name / "made", home / name / "done"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(home / name / "lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.write_text("\n".join(files_of(folder)), encoding="utf-8")
    return folder


def files_of(folder: Path) -> list[str]:
    """Names of all files and folders in it, without locks, which come and go."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.endswith("lock"))


def files_as_made(folder: Path) -> list[str]:
    """What a folder of `made_once` held when it was made."""
    return (folder.parent / "done").read_text(encoding="utf-8").split("\n")
