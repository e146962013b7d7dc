"""A copy of the kept files as they were when they were written: weights unpacked, raw files of their time."""

from __future__ import annotations

import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

MODIFIED = 1_700_000_000
"""Time of the raw files, which stored cases are known by; see format_1/make.py."""


@pytest.fixture(scope="session")
def format_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What version 0.1 wrote: medical/ by rfmedsam2, natural/ by segment_anything_hq. Nobody changes it."""
    home = tmp_path_factory.mktemp("golden") / "format_1"
    shutil.copytree(Path(__file__).parent / "format_1", home)
    for path in home.rglob("*.xz"):
        path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
        path.unlink()
    for path in (home / "medical" / "root" / "raw").rglob("*.*"):
        os.utime(path, (MODIFIED, MODIFIED))
    return home


@pytest.fixture
def copy_of(format_1: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy a folder of it with the times of its files, to change the copy."""
    return lambda name: shutil.copytree(format_1 / name, tmp_path / name)
