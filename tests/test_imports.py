"""What importing costs and drags in, each in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TRAINING_CODE = ("rfmedsam2.engine", "rfmedsam2.tasks", "rfmedsam2.losses", "rfmedsam2.transforms.augment")
AUGMENTERS = ("batchgenerators", "batchgeneratorsv2")


def loaded_by(statement: str) -> set[str]:
    """Names of all modules that are loaded after a statement."""
    code = f"{statement}\nimport sys, json\nsys.stdout.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module",
    [
        "rfmedsam2",
        "rfmedsam2.errors",
        "rfmedsam2.geometry",
        "rfmedsam2.records.plan",
        "rfmedsam2.records.checkpoint",
        "rfmedsam2.store.layout",
        "rfmedsam2.system.parallel",
        "rfmedsam2.cli",
    ],
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    heavy = {"torch", "scipy", "SimpleITK", "nibabel", "pandas", "matplotlib", "numba"}
    assert not loaded_by(f"import {module}") & heavy


def test_importing_the_package_does_nothing() -> None:
    assert {m for m in loaded_by("import rfmedsam2") if m.startswith("rfmedsam2")} == {"rfmedsam2"}


def test_predicting_loads_no_training_code() -> None:
    modules = loaded_by("import rfmedsam2.pipeline.prediction.predict")
    assert "torch" in modules
    assert not [m for m in modules if m.startswith(TRAINING_CODE)]
    assert not modules & set(AUGMENTERS)


@pytest.mark.parametrize(
    "module", ["preprocessing.plan_and_preprocess", "datasets.verify", "evaluation.evaluate", "evaluation.report"]
)
def test_work_without_networks_loads_no_torch(module: str) -> None:
    assert "torch" not in loaded_by(f"import rfmedsam2.pipeline.{module}")


def test_training_starts_without_what_few_trainings_use() -> None:
    assert not loaded_by("import rfmedsam2.pipeline.training.train") & {"torchvision", "torch._dynamo", "monai", "timm"}


def test_counting_and_loading_networks_needs_no_compiler() -> None:
    code = """
from pathlib import Path
from rfmedsam2.pipeline.training.model_summary import summary
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.atomic import read_record
for name in ("btcv", "btcv_unet"):
    summary(read_record(Path("plans") / f"{name}.json", Plan), "3d_fullres")
"""
    assert "torch._dynamo" not in loaded_by(code)


def test_public_names_are_found_where_they_are_promised() -> None:
    code = "import rfmedsam2\nfor name in rfmedsam2.__all__: getattr(rfmedsam2, name)"
    assert "rfmedsam2.pipeline.prediction.predict" in loaded_by(code)
