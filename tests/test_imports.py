"""What importing costs and drags in, each in a fresh interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.fresh_interpreters import run_each

pytestmark = pytest.mark.slow

TRAINING_CODE = ("rfmedsam2.engine", "rfmedsam2.tasks", "rfmedsam2.losses", "rfmedsam2.transforms.augment")
AUGMENTERS = ("batchgenerators", "batchgeneratorsv2")


LIGHT = (
    "rfmedsam2",
    "rfmedsam2.errors",
    "rfmedsam2.geometry",
    "rfmedsam2.records.plan",
    "rfmedsam2.records.checkpoint",
    "rfmedsam2.store.layout",
    "rfmedsam2.system.parallel",
    "rfmedsam2.cli",
)
WITHOUT_NETWORKS = (
    "rfmedsam2.pipeline.preprocessing.plan_and_preprocess",
    "rfmedsam2.pipeline.datasets.verify",
    "rfmedsam2.pipeline.evaluation.evaluate",
    "rfmedsam2.pipeline.evaluation.report",
)
PREDICTING = "import rfmedsam2.pipeline.prediction.predict"
TRAINING = "import rfmedsam2.pipeline.training.train"
COUNTING = """
from pathlib import Path
from rfmedsam2.pipeline.training.model_summary import summary
from rfmedsam2.records.plan import Plan
from rfmedsam2.system.atomic import read_record
for name in ("btcv", "btcv_unet"):
    summary(read_record(Path("plans") / f"{name}.json", Plan), "3d_fullres")
"""
PUBLIC = """
import rfmedsam2
for name in rfmedsam2.__all__: getattr(rfmedsam2, name)
"""
LoadedBy = Callable[[str], set[str]]


@pytest.fixture(scope="module")
def loaded_by() -> LoadedBy:
    """Names of all modules that are loaded after a statement, in a fresh interpreter."""
    found = run_each({f"import {name}": f"import {name}" for name in (*LIGHT, *WITHOUT_NETWORKS)})
    found |= run_each({code: code for code in (PREDICTING, TRAINING, COUNTING, PUBLIC)}, preload="import torch")
    return lambda statement: found[statement][1]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str, loaded_by: LoadedBy) -> None:
    heavy = {"torch", "scipy", "SimpleITK", "nibabel", "pandas", "matplotlib", "numba"}
    assert not loaded_by(f"import {module}") & heavy


def test_importing_the_package_does_nothing(loaded_by: LoadedBy) -> None:
    assert {m for m in loaded_by("import rfmedsam2") if m.startswith("rfmedsam2")} == {"rfmedsam2", "rfmedsam2.version"}


def test_predicting_loads_no_training_code(loaded_by: LoadedBy) -> None:
    modules = loaded_by(PREDICTING)
    assert "torch" in modules
    assert not [m for m in modules if m.startswith(TRAINING_CODE)]
    assert not modules & set(AUGMENTERS)


@pytest.mark.parametrize("module", WITHOUT_NETWORKS)
def test_work_without_networks_loads_no_torch(module: str, loaded_by: LoadedBy) -> None:
    assert "torch" not in loaded_by(f"import {module}")


def test_nifti_files_are_prepared_without_simpleitk(loaded_by: LoadedBy) -> None:
    assert not loaded_by(f"import {WITHOUT_NETWORKS[0]}") & {"SimpleITK", "pandas", "matplotlib"}


def test_training_starts_without_what_few_trainings_use(loaded_by: LoadedBy) -> None:
    assert not loaded_by(TRAINING) & {"torchvision", "torch._dynamo", "monai", "timm"}


def test_counting_and_loading_networks_needs_no_compiler(loaded_by: LoadedBy) -> None:
    assert "torch._dynamo" not in loaded_by(COUNTING)


def test_public_names_are_found_where_they_are_promised(loaded_by: LoadedBy) -> None:
    assert {"rfmedsam2.pipeline.prediction.predictor", "rfmedsam2.metrics"} <= loaded_by(PUBLIC)
