"""Ensembles of different models: the mean of their probabilities, one archive of all, and models that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
from support.commands import run_error, run_ok, unfinished_files
from support.tiny_model import NAME, make_plan, write_image, write_model

from rfmedsam2.errors import PlanError
from rfmedsam2.inference.averaging import mean_labels
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import EnsembleRecord, PostprocessingRule, PostprocessingStep
from rfmedsam2.store.images import read_label

STAGES = ("3d_fullres", "2d")
REGIONS = {
    "names": {"background": 0, "organ": (1, 2), "tumor": (2,)},
    "regions_class_order": (1, 2),
}


def write_models(home: Path, **changes) -> list[Path]:
    """A 3D model of two folds and a 2D model of one, with other planned axes."""
    folders = []
    for stage in STAGES:
        changed = changes | ({"transpose_forward": (2, 0, 1)} if stage == "2d" else {})
        plan = make_plan(**changed)
        folders.append(home / f"rfmed__{stage}")
        for fold in ("0", "1") if stage == "3d_fullres" else ("2",):
            write_model(folders[-1], plan, fold=fold, stage=stage)
    return folders


@pytest.fixture
def home(tmp_path) -> Path:
    write_models(tmp_path / "results" / NAME)
    write_image(tmp_path / "images" / "a_0000.nii.gz")
    write_image(tmp_path / "images" / "b_0000.nii.gz", seed=1)
    return tmp_path


def maps_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(blosc2.open(str(path))[:]) for path in sorted(folder.glob("*.probabilities.b2nd"))]


def labels_in(folder: Path) -> list[np.ndarray]:
    return [read_label(path)[0].array[0] for path in sorted(folder.glob("*.nii.gz"))]


def predict(home: Path, out: str, *models: Path, more: tuple[str, ...] = ()) -> Path:
    run_ok("predict", "-i", home / "images", "-o", home / out, "-m", *models, *more, "--device", "cpu")
    return home / out


@pytest.mark.parametrize("changes", [{}, {"labels": LabelSet.model_validate(REGIONS)}], ids=["classes", "regions"])
def test_several_models_predict_the_mean_of_their_probabilities(changes, tmp_path) -> None:
    models = write_models(tmp_path / "results" / NAME, **changes)
    write_image(tmp_path / "images" / "a_0000.nii.gz")
    parts = [maps_of(predict(tmp_path, f"part{i}", m, more=("--probabilities",)))[0] for i, m in enumerate(models)]
    both = predict(tmp_path, "both", *models, more=("--probabilities",))
    mean = np.mean(parts, axis=0, dtype=np.float32)
    np.testing.assert_allclose(maps_of(both)[0], mean, atol=1e-3)
    painted = np.where(mean[1] > 0.5, 2, np.where(mean[0] > 0.5, 1, 0))
    expected = painted if changes else mean.argmax(0)
    (labels,) = labels_in(both)
    np.testing.assert_array_equal(labels, expected)
    assert any((labels != other).any() for folder in ("part0", "part1") for other in labels_in(tmp_path / folder))
    record = json.loads((both / "predictions.json").read_text())
    assert (record["plan"], record["stage"]) == ("ensemble", "rfmed__3d_fullres+rfmed__2d")
    assert [model["fold"] for model in record["models"]] == ["0", "1", "2"]
    assert not unfinished_files(tmp_path)


def test_an_ensemble_in_memory_is_the_same(home) -> None:
    models = [home / "results" / NAME / f"rfmed__{stage}" for stage in STAGES]
    files = labels_in(predict(home, "out", *models))
    predictor = Predictor.load(models, device="cpu")
    found = predictor(home / "images" / "a_0000.nii.gz", probabilities=True)
    np.testing.assert_array_equal(found.labels, files[0])
    assert found.probabilities is not None
    assert (found.probabilities.argmax(0) == found.labels).mean() > 0.995, "but for ties in half precision"
    assert "ensemble, rfmed__3d_fullres+rfmed__2d" in repr(predictor)


def test_label_maps_of_an_ensemble_are_kept_until_a_model_changes(home) -> None:
    models = [home / "results" / NAME / f"rfmed__{stage}" for stage in STAGES]
    words = ("predict", "-i", home / "images", "-o", home / "out", "--device", "cpu", "--continue", "--json", "-m")
    assert len(json.loads(run_ok(*words, *models).out)["written"]) == 2
    assert len(json.loads(run_ok(*words, *reversed(models)).out)["kept"]) == 2, "the order is free"
    assert len(json.loads(run_ok(*words, models[0]).out)["written"]) == 2
    assert len(json.loads(run_ok(*words, *models).out)["written"]) == 2


def write_ensemble(home: Path, *, folds: tuple[str, ...] = ()) -> Path:
    folder = home / "results" / NAME / "ensemble__both"
    members = tuple(f"rfmed__{stage}" for stage in STAGES)
    EnsembleRecord(dataset=NAME, members=members, folds=folds).save(folder / "ensemble.json")
    rule = PostprocessingRule(
        dataset=NAME, labels=dict(make_plan().labels.names), steps=(PostprocessingStep(action="keep_largest"),)
    )
    rule.save(folder / "postprocessing.json")
    return folder


def test_an_ensemble_travels_as_one_archive_with_its_rule(home) -> None:
    folder = write_ensemble(home)
    expected = labels_in(predict(home, "here", folder))
    without = labels_in(predict(home, "without", folder, more=("--no-postprocessing",)))
    assert any((one != other).any() for one, other in zip(expected, without, strict=True))
    archive = home / "best.zip"
    run_ok("export_model", "-d", NAME, "-p", "ensemble", "--root", home, "-o", archive)
    again = home / "again.zip"
    run_ok("export_model", "-m", folder, "-o", again)
    assert archive.read_bytes() == again.read_bytes()
    shutil.rmtree(home / "results")
    for one, other in zip(labels_in(predict(home, "packed", archive)), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert "rfmed__3d_fullres+rfmed__2d" in run_ok("import_model", archive, "--root", home).out
    assert "The model already exists" in run_error("import_model", archive, "--root", home)
    out = home / "imported"
    run_ok("predict", "-i", home / "images", "-o", out, "--root", home, "--device", "cpu")
    for one, other in zip(labels_in(out), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not unfinished_files(home)


def test_several_models_are_packed_without_an_ensemble(home) -> None:
    models = [home / "results" / NAME / f"rfmed__{stage}" for stage in STAGES]
    run_ok("export_model", "-m", *models, "-o", home / "best.zip")
    expected = labels_in(predict(home, "here", *models))
    for one, other in zip(labels_in(predict(home, "packed", home / "best.zip")), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_single_model_in_an_archive_is_predicted_with(home) -> None:
    model = home / "results" / NAME / "rfmed__3d_fullres"
    run_ok("export_model", "-m", model, "-o", home / "one.zip")
    for one, other in zip(
        labels_in(predict(home, "packed", home / "one.zip")), labels_in(predict(home, "here", model)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_the_list_of_models_names_ensembles(home) -> None:
    write_ensemble(home)
    told = run_error("predict", "-i", home / "images", "-o", home / "out", "--root", home)
    assert f"-d {NAME} -p ensemble -c both" in told
    assert f"-d {NAME} -p rfmed -c 2d (folds 2)" in told


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"labels": LabelSet.model_validate({"names": {"background": 0, "spleen": 1, "liver": 2}})},
            "different labels",
        ),
        ({"labels": LabelSet.model_validate(REGIONS)}, "different labels"),
        ({"channels": ("MR",)}, "different channels"),
    ],
    ids=["names", "regions", "channels"],
)
def test_models_that_do_not_fit_are_a_sentence(changes, sentence, home) -> None:
    good = home / "results" / NAME / "rfmed__3d_fullres"
    other = home / "other__3d_fullres"
    write_model(other, make_plan(**changes))
    told = run_error("predict", "-i", home / "images", "-o", home / "out", "-m", good, other)
    assert f"The models have {sentence} and cannot be averaged" in told
    assert str(other) in told
    assert sentence in run_error("export_model", "-m", good, other, "-o", home / "x.zip")
    assert not (home / "out").exists()
    assert not (home / "x.zip").exists()


def test_what_an_ensemble_cannot_do_is_a_sentence(home) -> None:
    folder = write_ensemble(home)
    words = ("predict", "-i", home / "images", "-o", home / "out", "-m")
    assert "takes no label maps of a first stage" in run_error(*words, folder, "--previous-stage", home)
    assert "does not accept boxes" in run_error(*words, folder, "--boxes", home)
    file = home / "results" / NAME / "rfmed__2d" / "fold_2" / "checkpoint_final.safetensors"
    assert "cannot be averaged with each other" in run_error(*words, folder, file)
    shutil.rmtree(home / "results" / NAME / "rfmed__2d")
    assert "no rfmed__2d" in run_error(*words, folder)
    (folder / "ensemble.json").write_text("{}")
    assert "fault(s)" in run_error(*words, folder)


def test_a_model_that_is_named_twice_is_a_sentence(home) -> None:
    a, b = (home / "results" / NAME / f"rfmed__{stage}" for stage in STAGES)
    words = ("predict", "-i", home / "images", "-o", home / "out", "--root", home, "-m")
    assert "The mean of a model with itself is the model" in run_error(*words, a, b, a.parent / "." / a.name)
    for flag, value in (("-c", "2d"), ("-p", "rfmed"), ("-d", NAME)):
        assert f"A model is named twice. Found -m and {flag}." in run_error(*words, a, flag, value)
    assert not (home / "out").exists()


def test_folds_of_an_ensemble_are_those_of_its_record(home) -> None:
    for fold in ("0", "1"):
        write_model(home / "results" / NAME / "rfmed__2d", make_plan(), fold=fold, stage="2d")
    folder = write_ensemble(home, folds=("0",))
    assert [model.fold for model in Predictor.load(folder, device="cpu").models] == ["0", "0"]
    assert [model.fold for model in Predictor.load(folder, folds=["1"], device="cpu").models] == ["1", "1"]


def test_probabilities_of_other_shapes_do_not_match() -> None:
    labels = make_plan().labels
    with pytest.raises(PlanError, match="do not match"):
        mean_labels([np.zeros((3, 4, 5, 6)), np.zeros((3, 4, 5, 7))], labels)
    with pytest.raises(PlanError, match="do not match"):
        mean_labels([np.zeros((4, 4, 5, 6))], labels)
