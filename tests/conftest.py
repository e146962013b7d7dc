"""Shared fixtures: real data where it is at hand, small synthetic datasets everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# as the commands do, before torch is imported: waiting threads sleep
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets: RFMED_TEST_DATA, else shared/data beside the repository."""
    named = os.environ.get("RFMED_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are not here: set RFMED_TEST_DATA to their folder")
    return folder
