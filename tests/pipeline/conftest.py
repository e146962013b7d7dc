"""One small phantom, preprocessed and trained once, for all tests of the commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.commands import TINY, run_ok

PHANTOM = "Dataset900_PhantomCT"


@pytest.fixture(scope="session")
def planned_root(raw_root, tmp_path_factory) -> Path:
    """A root with the phantom planned and preprocessed. Nobody changes it."""
    root = tmp_path_factory.mktemp("planned") / "root"
    shutil.copytree(raw_root, root)
    run_ok("plan_and_preprocess", "--preset", "cpu", "-c", "3d_fullres", "2d", "--set", *TINY, "--root", root)
    return root


@pytest.fixture(scope="session")
def trained_root(planned_root, tmp_path_factory) -> Path:
    """A root with fold 0 of 3d_fullres trained for two steps. Nobody changes it."""
    root = tmp_path_factory.mktemp("trained") / "root"
    shutil.copytree(planned_root, root)
    run_ok("train", "3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 2, "--root", root)
    return root
