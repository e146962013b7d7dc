"""One small phantom, preprocessed and trained once, for all tests of the commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.blank_charts import draw_no_charts
from support.commands import TINY, run_ok
from support.shared import made_once

PHANTOM = "Dataset900_PhantomCT"
WITH_CHARTS = ("test_readme_examples.py", "test_train.py")
"""Files of the tests that end with charts as users get them."""


@pytest.fixture(autouse=True)
def _other_trainings_draw_no_chart(request, monkeypatch) -> None:
    if request.path.name not in WITH_CHARTS:
        draw_no_charts(monkeypatch.setattr)


@pytest.fixture(scope="session")
def planned_root(raw_root, tmp_path_factory) -> Path:
    """A root with the phantom planned and preprocessed. Nobody changes it."""

    def make(root: Path) -> None:
        shutil.copytree(raw_root, root)
        run_ok("plan_and_preprocess", "--preset", "cpu", "-c", "3d_fullres", "2d", "--set", *TINY, "--root", root)

    return made_once(tmp_path_factory, "pipeline_planned", make)


@pytest.fixture(scope="session")
def trained_root(planned_root, tmp_path_factory) -> Path:
    """A root with fold 0 of 3d_fullres trained for two steps. Nobody changes it."""

    def make(root: Path) -> None:
        shutil.copytree(planned_root, root)
        run_ok("train", "3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 2, "--root", root)

    return made_once(tmp_path_factory, "pipeline_trained", make)
