"""One small phantom, preprocessed and trained once, for all tests of the commands."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from PIL import Image
from support.commands import TINY, run_ok
from support.shared import made_once

from rfmedsam2.pipeline.evaluation import report
from rfmedsam2.reporting import training_curves

PHANTOM = "Dataset900_PhantomCT"
WITH_CHARTS = ("test_readme_examples.py", "test_train.py")
"""Files of the tests that end with charts as users get them; tests/unit/pipeline/test_report.py looks at each."""


@pytest.fixture(autouse=True)
def _other_trainings_draw_no_chart(request, monkeypatch) -> None:
    """Three charts take longer than a training of two steps, and there are hundreds of these."""
    if request.path.name in WITH_CHARTS:
        return
    blank = io.BytesIO()
    Image.new("RGB", (4, 4)).save(blank, "PNG")
    for module in (training_curves, report):
        monkeypatch.setattr(module, "training_png", lambda training, *, theme="light": blank.getvalue())


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
