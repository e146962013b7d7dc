"""Predicting by OpenVINO as a user does it: labels and probabilities are torch's, and records say what ran."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import run_error, run_ok
from support.tiny_model import NAME, make_plan, write_image, write_model

from rfmedsam2 import Predictor
from rfmedsam2.inference.backends import choice
from rfmedsam2.inference.volume import PredictOptions
from rfmedsam2.pipeline.prediction.identity import what_predicting_needs
from rfmedsam2.records.base import renamed
from rfmedsam2.records.prediction import PredictionsRecord
from rfmedsam2.system.atomic import read_record


def options_(record: Path) -> dict[str, object]:
    return dict(read_record(record, PredictionsRecord).options)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results") / NAME / "rfmed__3d_fullres"
    for fold in ("0", "1"):
        write_model(folder, make_plan(), fold=fold)
    return folder


def test_folds_and_flips_are_averaged_as_by_torch(model, tmp_path) -> None:
    pytest.importorskip("openvino")
    image = write_image(tmp_path / "a_0000.nii.gz")
    by_torch = Predictor.load(model, device="cpu", options=PredictOptions(backend="torch", mirror=True))
    expected = by_torch(image, probabilities=True)
    predictor = by_torch.using(PredictOptions(backend="openvino", mirror=True, cache_folder=tmp_path / "cache"))
    found = predictor(image, probabilities=True)
    assert predictor.settings()["backend"] == "openvino"
    assert predictor.made_by() != by_torch.made_by()
    assert found.probabilities is not None
    assert expected.probabilities is not None
    difference = np.abs(found.probabilities.astype(np.float32) - expected.probabilities.astype(np.float32))
    assert float(difference.max()) < 1e-3
    assert (found.labels != expected.labels).mean() < 1e-4


def test_label_maps_of_torch_keep_the_digest_that_they_had_before_there_was_a_choice(model) -> None:
    predictor = Predictor.load(model, device="cpu", options=PredictOptions(backend="torch"))
    settings = predictor.settings()
    assert settings.pop("backend") == "torch"
    needs = renamed(what_predicting_needs(predictor.records[0]), {"normalization": "normalisation"})
    before = [sorted(record.weights_sha256 for record in predictor.records), needs, settings]
    assert predictor.made_by() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()


def test_the_command_says_and_records_the_backend(model, tmp_path) -> None:
    pytest.importorskip("openvino")
    write_image(tmp_path / "in" / "a_0000.nii.gz")
    words = ("-i", tmp_path / "in", "-m", model, "--device", "cpu")
    home = {"XDG_CACHE_HOME": tmp_path / "cache"}
    done = run_ok("predict", *words, "-o", tmp_path / "openvino", "--backend", "openvino", environment=home)
    assert "on cpu, by openvino" in done.err
    assert options_(tmp_path / "openvino" / "predictions.json")["backend"] == "openvino"
    assert len(list((tmp_path / "cache" / "rfmedsam2" / "openvino").glob("*/network.bin"))) == 2
    run_ok("predict", *words, "-o", tmp_path / "torch", "--backend", "torch", environment=home)
    assert options_(tmp_path / "torch" / "predictions.json")["backend"] == "torch"
    # label maps of the other backend are not taken for those of this one
    again = ("-o", tmp_path / "torch", "--continue", "--json", "--backend", "openvino")
    assert len(json.loads(run_ok("predict", *words, *again, environment=home).out)["written"]) == 1


def test_what_is_not_installed_is_a_sentence_and_nothing_is_written(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    choice.load_openvino.cache_clear()
    try:
        write_image(tmp_path / "in" / "a_0000.nii.gz")
        words = ("-i", tmp_path / "in", "-m", model, "--device", "cpu", "-o", tmp_path / "out")
        message = run_error("predict", *words, "--backend", "openvino")
        assert "pip install 'rfmedsam2[openvino]'" in message
        assert not (tmp_path / "out").exists()
        run_ok("predict", *words)
        assert options_(tmp_path / "out" / "predictions.json")["backend"] == "torch"
    finally:
        choice.load_openvino.cache_clear()


@pytest.mark.data
@pytest.mark.slow
def test_labels_of_a_model_trained_on_real_scans_are_torchs(data_root, tmp_path) -> None:
    pytest.importorskip("openvino")
    (source,) = sorted((data_root / "hippocampus").glob("Dataset*"))
    raw = tmp_path / "root" / "raw" / source.name
    raw.parent.mkdir(parents=True)
    raw.symlink_to(source)
    changes = ("3d_fullres.model.features=[8,16,32,64]", "3d_fullres.train.workers=0")
    root = ("--root", tmp_path / "root")
    run_ok("plan_and_preprocess", "-d", source.name, "--preset", "cpu", "-c", "3d_fullres", "--set", *changes, *root)
    run_ok("train", "3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 60, "--no-validate", *root)
    (model,) = (tmp_path / "root" / "results").glob("*/*")
    by_torch = Predictor.load(model, device="cpu", options=PredictOptions(backend="torch"))
    by_openvino = by_torch.using(PredictOptions(backend="openvino", cache_folder=tmp_path / "cache"))
    voxels = different = 0
    for image in sorted((source / "imagesTr").iterdir())[:3]:
        expected, found = by_torch(image, probabilities=True), by_openvino(image, probabilities=True)
        assert len(np.unique(expected.labels)) > 1
        assert found.probabilities is not None
        assert expected.probabilities is not None
        difference = np.abs(found.probabilities.astype(np.float32) - expected.probabilities.astype(np.float32))
        assert float(difference.max()) < 1e-3
        voxels += found.labels.size
        different += int((found.labels != expected.labels).sum())
    assert different <= voxels * 1e-5
