"""One small phantom, preprocessed and trained once; and processes that can be killed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.blank_charts import draw_no_charts
from support.commands import PLANNING, run_ok
from support.live_process import Launcher
from support.shared import made_once


@pytest.fixture(autouse=True)
def _trainings_draw_no_chart(monkeypatch) -> None:
    draw_no_charts(monkeypatch.setattr)


@pytest.fixture(scope="session")
def planned_root(raw_root, tmp_path_factory) -> Path:
    """A root with the phantom planned and preprocessed. Nobody changes it."""

    def make(root: Path) -> None:
        shutil.copytree(raw_root, root)
        run_ok("plan_and_preprocess", *PLANNING, "--root", root)

    return made_once(tmp_path_factory, "faults_planned", make)


@pytest.fixture(scope="session")
def trained_root(planned_root, tmp_path_factory) -> Path:
    """A root with fold 0 trained for two steps. Nobody changes it."""

    def make(root: Path) -> None:
        shutil.copytree(planned_root, root)
        run_ok("train", "3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 2, "--no-validate", "--root", root)

    return made_once(tmp_path_factory, "faults_trained", make)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts commands as processes of their own; none is left behind."""
    with Launcher() as started:
        yield started
