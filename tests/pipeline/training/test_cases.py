"""What a training does when splits, cases, raw files or settings are not what they were."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from support.changed_labels import relabel
from support.commands import PLANNING, run_error, run_ok

from rfmedsam2.errors import StoreError, UsageError
from rfmedsam2.pipeline.prediction.model_archive import export_model
from rfmedsam2.pipeline.preprocessing.preprocess import preprocess
from rfmedsam2.pipeline.training import train as pipeline
from rfmedsam2.pipeline.training.train import TrainOptions, train
from rfmedsam2.records.plan import Plan
from rfmedsam2.store import lock
from rfmedsam2.store.archive import unpack_archive
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.raw import open_dataset
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.progress import OnStep

DATASET = "Dataset900_PhantomCT"
FOLD = Path("results", DATASET, "rfmed_cpu__3d_fullres", "fold_0")
CASES = Path("preprocessed", DATASET, "rfmed_cpu_3d_fullres")
RESULTS = ("checkpoint_latest.safetensors", "report.html", "metrics.jsonl", "validation/metrics.json")


@pytest.fixture
def root(trained_root, root_of) -> Path:
    """The phantom with fold 0 trained and validated, to be changed."""
    return root_of(trained_root)


def training(root: Path, *more: object, fold: object = 0, epochs: int = 1) -> tuple[object, ...]:
    return ("train", "3d_fullres", "fold", fold, "--epochs", epochs, "--iterations", 2, *more, "--root", root)


def results(root: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name in RESULTS if (path := root / FOLD / name).exists()}


def splits_of(root: Path) -> list[dict[str, list[str]]]:
    return json.loads((root / "preprocessed" / DATASET / "splits_final.json").read_text())


def exchange(root: Path) -> tuple[str, str]:
    """Let the validation case of fold 0 and one of its training cases change places; gives both."""
    splits = splits_of(root)
    val, train = splits[0]["val"], splits[0]["train"]
    val[0], train[0] = train[0], val[0]
    (root / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(splits))
    return train[0], val[0]


def test_a_checkpoint_knows_its_cases(root):
    cases = read_record_of(root / FOLD / "checkpoint_final.safetensors").cases
    assert {"train": sorted(cases.train), "val": sorted(cases.val)} == {
        side: sorted(names) for side, names in splits_of(root)[0].items()
    }


@pytest.mark.parametrize("lost", [(), ("checkpoint_latest.safetensors",)])
def test_a_finished_fold_is_not_validated_on_other_cases(root, lost):
    for name in lost:
        (root / FOLD / name).unlink()
    before = results(root)
    was_val, was_train = exchange(root)
    sentence = run_error(*training(root))
    assert "This training was begun with other cases" in sentence
    assert f"{was_val} was in validation, is in training" in sentence
    assert f"{was_train} was in training, is in validation" in sentence
    assert "--restart" in sentence
    assert results(root) == before
    run_ok(*training(root, "--restart", "--no-validate"))
    assert was_val in read_record_of(root / FOLD / "checkpoint_final.safetensors").cases.train


def test_a_training_does_not_go_on_with_other_cases(root):
    before = results(root)
    was_val, was_train = exchange(root)
    sentence = run_error(*training(root, epochs=2))
    assert f"{was_val} was in validation, is in training; {was_train} was in training, is in validation" in sentence
    assert results(root) == before


def test_a_case_that_leaves_the_fold_is_named(root):
    splits = splits_of(root)
    gone = splits[0]["train"].pop()
    (root / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(splits))
    assert f"{gone} was in training, is in neither part" in run_error(*training(root))


def test_folds_of_the_user_that_were_changed_are_noticed(root):
    """splits_final.json in the raw folder is what folds are made from; the copy is what a training reads."""
    folds = splits_of(root)
    path = root / "raw" / DATASET / "splits_final.json"
    path.write_text(json.dumps(folds))
    run_ok(*training(root, "--no-validate"))
    path.write_text(json.dumps(folds[::-1]))
    assert "Two splits files disagree" in run_error(*training(root))


def test_patients_on_both_sides_are_named(root, caplog):
    path = root / "raw" / DATASET / "dataset.json"
    described = json.loads(path.read_text())
    val, train = splits_of(root)[0]["val"][0], splits_of(root)[0]["train"][0]
    path.write_text(json.dumps(described | {"groups": {val: "Ann", train: "Ann"}}))
    run_ok(*training(root, "--no-validate"))
    assert "Split 0 has 1 patient(s) in training and validation: Ann." in caplog.messages


def test_a_changed_label_is_noticed_before_training_and_after_preprocessing(root):
    before = results(root)
    relabel(root / "raw" / DATASET, "phantom_002")
    sentence = run_error(*training(root))
    assert "The files of 1 of 5 cases have changed since they were preprocessed" in sentence
    assert "phantom_002 (phantom_002.nii.gz)" in sentence
    assert "Run rfmed_plan_and_preprocess -d Dataset900_PhantomCT -c 3d_fullres" in sentence
    again = run_ok("plan_and_preprocess", *PLANNING, "--root", root)
    assert "1 rebuilt" in again.out or "5 rebuilt" in again.out  # all, if the intensities of the plan changed
    sentence = run_error(*training(root))  # a trained one does not go on with it
    assert "phantom_002 was preprocessed again from other files or by another plan" in sentence
    assert results(root) == before
    run_ok(*training(root, "--no-validate", fold=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_cases_rebuilt_under_a_training_without_locks_stop_it(root, monkeypatch, workers):
    """On a file system without locks only the cases themselves can tell; with another spacing, shapes differ."""

    def flock(handle, flags):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    layout = Layout.under(root)
    plan = read_record(layout.plan_file(DATASET, "rfmed_cpu"), Plan).with_overrides(
        "3d_fullres.train.epochs=1", "3d_fullres.train.iterations_per_epoch=500", f"3d_fullres.train.workers={workers}"
    )
    other = plan.with_overrides("3d_fullres.spacing_mm=[5,5,5]")

    def rebuild(report):
        if report.step == 1:
            preprocess(open_dataset(root / "raw" / DATASET), other, ["3d_fullres"], layout)

    options = TrainOptions(device="cpu", validate=False, progress=OnStep(rebuild))
    with pytest.raises(StoreError, match=r"rebuilt while it was being read: .*phantom_00\d") as told:
        train(layout, plan, "3d_fullres", fold="1", options=options)
    assert "not while rfmed_plan_and_preprocess works on these cases" in str(told.value)
    with pytest.raises(UsageError, match="were preprocessed with other settings than the plan's"):
        train(layout, plan, "3d_fullres", fold="1", options=options)


def test_labels_that_change_during_a_training_are_not_scored(root, monkeypatch):
    real = pipeline.fit

    def fit(*arguments, **named):
        progress = real(*arguments, **named)
        relabel(root / "raw" / DATASET, splits_of(root)[1]["val"][0])
        return progress

    monkeypatch.setattr(pipeline, "fit", fit)
    sentence = run_error(*training(root, fold=1))
    assert "have changed since they were preprocessed" in sentence
    folder = root / FOLD.parent / "fold_1"
    assert (folder / "checkpoint_final.safetensors").is_file()
    assert not (folder / "validation").exists()
    assert not (folder / "report.html").exists()


def test_touched_files_are_the_same_files(root, caplog):
    before = results(root)
    for path in (*(root / "raw").rglob("*.*"), *(root / CASES).iterdir()):
        os.utime(path, (1, 1))
    outcome = run_ok(*training(root, "--no-validate"))
    assert "Already trained for 2 steps" in outcome.out
    assert "0 rebuilt, 5 finished before" in run_ok("plan_and_preprocess", *PLANNING, "--root", root).out
    assert not list((root / "preprocessed").rglob("*.older*"))
    assert "Trained 4 steps" in run_ok(*training(root, "--no-validate", epochs=2)).out
    told = [record.message for record in caplog.records]
    assert told == ["Epochs changed from 1 to 2: the learning rate now follows the new schedule"]
    assert results(root)["validation/metrics.json"] == before["validation/metrics.json"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": "swapped"}, "labels.names.liver was 6, is 1"),
        ({"channel_names": {"0": "MR"}}, "channels was ['CT'], is ['MR']"),
        ({"overwrite_image_reader_writer": "NibabelIOWithReorient"}, "reorient was None, is 'RAS'"),
    ],
)
def test_a_changed_dataset_json_is_noticed(root, change, told):
    path = root / "raw" / DATASET / "dataset.json"
    described = json.loads(path.read_text())
    if change.get("labels") == "swapped":
        labels = described["labels"]
        one = next(name for name, value in labels.items() if value == 1)
        change = {"labels": labels | {one: labels["liver"], "liver": 1}}
    path.write_text(json.dumps(described | change))
    sentence = run_error(*training(root))
    assert "dataset.json was changed after plan rfmed_cpu was made" in sentence
    assert told in sentence
    assert "restore dataset.json" in sentence
    path.write_text(json.dumps(described | {"description": "no matter", "numTraining": 5}))
    run_ok(*training(root, "--no-validate"))


def test_a_plan_that_was_changed_after_preprocessing_is_noticed(root):
    run_ok("plan_and_preprocess", *PLANNING, "3d_fullres.spacing_mm=[5,5,5]", "--no-preprocess", "--root", root)
    sentence = run_error(*training(root, fold=1))
    assert "5 of 5 cases were preprocessed with other settings than the plan's" in sentence


def test_new_cases_are_told_and_lost_ones_refused(root, caplog):
    raw = root / "raw" / DATASET
    shutil.copy(raw / "imagesTr" / "phantom_001_0000.nii.gz", raw / "imagesTr" / "new_0000.nii.gz")
    shutil.copy(raw / "labelsTr" / "phantom_001.nii.gz", raw / "labelsTr" / "new.nii.gz")
    run_ok(*training(root, "--no-validate"))
    assert "1 case(s) were added to the raw dataset after it was planned and are in no fold (new)" in caplog.text
    assert "not preprocessed" in run_error(*training(root, fold="all"))
    for path in (*raw.rglob("new*"), *raw.rglob("phantom_003*")):
        path.unlink()
    assert "phantom_003" in run_error(*training(root))


def test_cases_left_out_stay_left_out(raw_root, root_of, caplog):
    root = root_of(raw_root)
    (root / "raw" / DATASET / "labelsTr" / "phantom_004.nii.gz").unlink()
    sentence = run_error("plan_and_preprocess", *PLANNING, "--root", root)
    assert "phantom_004: Image without label" in sentence
    outcome = run_ok("plan_and_preprocess", *PLANNING, "--skip-faulty", "--root", root)
    assert "Note: Case phantom_004 was left out (Image without label)." in outcome.out
    assert "Preprocessed: 4 new" in outcome.out
    run_ok(*training(root, "--no-validate", fold="all"))
    assert "phantom_004" not in caplog.text
    folder = root / FOLD.parent / "fold_all"
    assert sorted(read_record_of(folder / "checkpoint_final.safetensors").cases.train) == [
        f"phantom_00{n}" for n in (1, 2, 3, 5)
    ]


def test_an_exported_model_names_no_cases(root, tmp_path):
    export_model((root / FOLD).parent, tmp_path / "model.zip")
    (tmp_path / "unpacked").mkdir()
    unpack_archive(tmp_path / "model.zip", tmp_path / "unpacked")
    [checkpoint] = (tmp_path / "unpacked").rglob("*.safetensors")
    assert read_record_of(checkpoint).cases is None
    assert b"phantom_00" not in checkpoint.read_bytes()
