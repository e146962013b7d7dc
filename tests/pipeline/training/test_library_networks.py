"""Networks of libraries by name: planned, trained for two steps, resumed, predicted, summarized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support.commands import run_ok

from rfmedsam2.records.plan import Plan
from rfmedsam2.store.checkpoint_header import FINAL, read_record_of

DATASET = "Dataset900_PhantomCT"
SMALL = {
    "segresnet": ("model.features=8", "model.encoder_blocks=[1,1]", "patch_size=[16,16,16]"),
    "swinunetr": ("model.features=12", "model.depths=[1,1,1,1]", "patch_size=[32,32,64]"),
    "primus_s": ("patch_size=[16,16,16]",),
}
SHORT = ("validation.patches_while_training=1", "train.workers=0", "inference.step_size=1")


@pytest.fixture
def root(planned_root, tmp_path) -> Path:
    return Path(shutil.copytree(planned_root, tmp_path / "root"))


@pytest.mark.parametrize("model", SMALL)
def test_a_network_is_planned_trained_resumed_predicted_and_summarized(root, model):
    small = [f"3d_fullres.{field}" for field in (*SMALL[model], *SHORT)]
    preset = ("--preset", "cpu", "--set", "3d_fullres.spacing_mm=[8,8,8]")
    said = run_ok("plan_and_preprocess", "--model", model, *preset, *small, "-c", "3d_fullres", "--root", root)
    name = f"rfmed_cpu_{model}"
    assert f"{name}.json" in said.out
    plan = Plan.load(root / f"preprocessed/{DATASET}/{name}.json")
    assert not plan.stages["3d_fullres"].loss.deep_supervision

    run_ok("train", "3d_fullres", 0, "-p", name, "--epochs", 1, "--iterations", 2, "--no-validate", "--root", root)
    run_ok("train", "3d_fullres", 0, "-p", name, "--epochs", 2, "--iterations", 2, "--root", root)
    folder = root / f"results/{DATASET}/{name}__3d_fullres"
    assert read_record_of(folder / "fold_0" / FINAL).step == 4
    assert "report.html" in {path.name for path in (folder / "fold_0").iterdir()}

    images = sorted((root / f"raw/{DATASET}/imagesTs").iterdir())[:1]
    run_ok("predict", "-i", images[0], "-m", folder, "-o", root / "out.nii.gz")
    predicted, image = nib.load(root / "out.nii.gz"), nib.load(images[0])
    assert predicted.shape == image.shape
    np.testing.assert_allclose(predicted.affine, image.affine, atol=1e-5)

    described = json.loads(run_ok("summary", name, "-c", "3d_fullres", "--json", "--root", root).out)
    assert described["parameters"] == described["trained"] > 0
    assert min(described["memory_gib"], described["memory_half_gib"]) > 0
    kind = plan.stages["3d_fullres"].model.kind
    assert any(term["name"] == kind for term in described["memory"])
