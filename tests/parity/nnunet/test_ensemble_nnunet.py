"""Ensembles against nnUNetv2_ensemble: of two models that nnU-Net trained, and of the same probabilities."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.ensembling.ensemble import ensemble_folders
from support.blobs import NAME, images_of
from support.commands import run_ok

from rfmedsam2.inference.averaging import mean_labels
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.store.images import read_label
from rfmedsam2.system.atomic import read_record

STAGES = ("3d_fullres", "2d")
CASES = ("blob_0", "blob_1")


@pytest.fixture(scope="module")
def theirs(trained: Path, tmp_path_factory) -> Path:
    """Label maps of nnUNetv2_ensemble."""
    out = tmp_path_factory.mktemp("theirs")
    contexts = multiprocessing.get_context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda _=None: contexts("fork"))
        home = trained / "results" / NAME / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        files = {f"{name}_json_file_or_dict": str(home / f"{name}.json") for name in ("dataset", "plans")}
        ensemble_folders([str(trained / stage) for stage in STAGES], str(out), num_processes=1, **files)
    return out


def labels_of(folder: Path, case: str) -> np.ndarray:
    return read_label(folder / f"{case}.nii.gz")[0].array[0]


def test_the_mean_of_the_same_probabilities_has_the_same_labels(trained, theirs) -> None:
    labels = read_record(trained / "raw" / NAME / "dataset.json", DatasetJson).label_set
    for case in CASES:
        maps = [np.load(trained / stage / f"{case}.npz")["probabilities"] for stage in STAGES]
        np.testing.assert_array_equal(mean_labels(maps, labels), labels_of(theirs, case))


def test_two_of_its_models_predict_as_its_ensemble_does(trained, theirs, tmp_path) -> None:
    models = [trained / "results" / NAME / f"nnUNetTrainer__nnUNetPlans__{stage}" for stage in STAGES]
    run_ok("predict", "-i", *images_of(trained), "-o", tmp_path / "out", "-m", *models, "--device", "cpu")
    found = [(labels_of(tmp_path / "out", case), labels_of(theirs, case)) for case in CASES]
    differing = sum(int((ours != other).sum()) for ours, other in found)
    assert differing <= 1e-4 * sum(ours.size for ours, _ in found)
    single = sum(int((labels_of(trained / "3d_fullres", case) != labels_of(theirs, case)).sum()) for case in CASES)
    assert single > 0, "the second model counts"
