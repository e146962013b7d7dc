"""Models that nnU-Net trained predict here what nnU-Net predicts with them."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.blobs import NAME, images_of, labels_of
from support.commands import run_error, run_ok

from rfmedsam2 import Predictor
from rfmedsam2.inference.volume import PredictOptions
from rfmedsam2.pipeline.prediction.nnunet_import import import_nnunet_models
from rfmedsam2.store.checkpoints import read_weights

MODELS = "nnUNetTrainer__nnUNetPlans__"


def model_of(trained: Path, stage: str) -> Path:
    return trained / "results" / NAME / (MODELS + stage)


@pytest.mark.parametrize("stage", ["3d_fullres", "2d"])
@pytest.mark.parametrize("folds", ["all", "one"])
def test_its_models_predict_the_same(trained: Path, stage: str, folds: str) -> None:
    one = folds == "one"
    theirs = trained / (f"{stage}_one_fold" if one else stage)
    options = PredictOptions(mirror=not one)
    predictor = Predictor.load(model_of(trained, stage), folds=["0"] if one else None, device="cpu", options=options)
    assert len(predictor.networks) == (1 if one or stage == "2d" else 3)
    assert predictor.config.augmentation.mirror_axes == ((0, 1) if stage == "2d" else (0, 1, 2))
    differing = total = found = 0
    for case, image in enumerate(images_of(trained)):
        mine = predictor(image, probabilities=True)
        expected = labels_of(theirs / f"blob_{case}.nii.gz")
        differing, total = differing + int((mine.labels != expected).sum()), total + expected.size
        found += int((expected > 0).sum())
        with np.load(theirs / f"blob_{case}.npz") as content:
            apart = np.abs(np.asarray(mine.probabilities, np.float32) - content["probabilities"])
        # nnU-Net sums up tiles in half precision, whose logits beyond 16 are 0.016 apart
        assert np.quantile(apart, 0.999) < 5e-3
        assert apart.max() < 0.016
    assert found > 300  # it has learned something
    assert differing <= 1e-4 * total


def test_the_command_takes_its_folder(trained: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(images_of(trained)[0], images)
    model = model_of(trained, "3d_fullres")
    run_ok(
        "predict", "-i", images, "-o", tmp_path / "out", "-m", model, "-f", "0", "--mirror", "off", "--device", "cpu"
    )
    mine, theirs = labels_of(tmp_path / "out/blob_0.nii.gz"), labels_of(trained / "3d_fullres_one_fold/blob_0.nii.gz")
    assert (mine != theirs).mean() <= 1e-4
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert "checkpoint_final.pth" in json.dumps(record)


@pytest.mark.parametrize("source", ["results", "model", "zip"])
def test_a_folder_or_an_archive_is_imported(trained: Path, tmp_path: Path, source: str) -> None:
    given = {"results": trained / "results", "model": model_of(trained, "2d"), "zip": trained / "model.zip"}[source]
    shown = run_ok("import_model", given, "--root", tmp_path)
    home = tmp_path / "results" / NAME
    stages = {
        "model": ("2d",),
        "zip": ("2d", "3d_fullres"),
        "results": ("2d", "3d_cascade_fullres", "3d_fullres", "3d_lowres"),
    }[source]
    assert sorted(path.name for path in home.iterdir()) == [f"rfmed_nnUNetPlans__{stage}" for stage in stages]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [NAME]
    assert shown.out.count("Imported:") == len(stages)
    imported = Predictor.load(home / "rfmed_nnUNetPlans__2d", folds=["0"], device="cpu")
    direct = Predictor.load(model_of(trained, "2d"), folds=["0"], device="cpu")
    assert imported.records[0].weights_sha256 == direct.records[0].weights_sha256
    assert np.array_equal(imported.predict_file(images_of(trained)[0]), direct.predict_file(images_of(trained)[0]))
    weights = sum(tensor.numel() * 4 for tensor in direct.networks[0].state_dict().values())
    final = home / "rfmed_nnUNetPlans__2d" / "fold_0" / "checkpoint_final.safetensors"
    assert weights < final.stat().st_size < weights + 200_000
    if source == "results":
        assert "already exists" in run_error("import_model", given, "--root", tmp_path)
        assert (home / "rfmed_nnUNetPlans__3d_fullres" / "fold_2" / "checkpoint_best.safetensors").is_file()


def test_its_model_is_fine_tuned_by_its_own_plan(trained: Path, tmp_path: Path) -> None:
    model = model_of(trained, "2d")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / NAME).symlink_to(trained / "raw" / NAME)
    run_ok("plan_and_preprocess", "--plan-of", model, "-c", "2d", "-p", "tuned", "--root", tmp_path)
    words = ("2d", 0, "--epochs", 1, "--iterations", 1, "--lr", 1e-12, "--no-validate", "--root", tmp_path)
    few = ("--set", "2d.train.workers=0", "2d.validation.patches_while_training=1")
    run_ok("train", *words, "--weights", model, *few)
    record, own = read_weights(tmp_path / "results" / NAME / "tuned__2d" / "fold_0" / "checkpoint_final.safetensors")
    theirs = Predictor.load(model, folds=["0"], device="cpu")
    assert record.started_from == theirs.records[0].weights_sha256
    assert record.plan.stages["2d"].patch_size == theirs.config.patch_size
    assert record.plan.intensities == theirs.plan.intensities
    given = theirs.networks[0].state_dict()
    assert own.keys() == given.keys()
    assert all(torch.allclose(own[name], given[name], atol=1e-6) for name in own)


def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_of(trained, "2d"), tmp_path / "model"))


def rewritten(path: Path, change) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_another_network_is_named_with_its_tensors(trained: Path, tmp_path: Path) -> None:
    model = copied(trained, tmp_path)
    checkpoint = model / "fold_0" / "checkpoint_final.pth"

    def change(content: dict) -> None:
        weights = content["network_weights"]
        weights["head.extra.weight"] = torch.ones(3)
        del weights["decoder.seg_layers.0.weight"]
        content["trainer_name"] = "nnUNetTrainerOfMine"

    rewritten(checkpoint, change)
    found = run_error("import_model", model, "--root", tmp_path / "root")
    for word in ("head.extra.weight", "decoder.seg_layers.0.weight", "nnUNetTrainerOfMine", "1 missing"):
        assert word in found
    assert list((tmp_path / "root" / "results").iterdir()) == []


class Harmful:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(trained: Path, tmp_path: Path) -> None:
    model, trace = copied(trained, tmp_path), tmp_path / "executed"
    rewritten(model / "fold_0" / "checkpoint_final.pth", lambda content: content.update(logging=Harmful(trace)))
    found = run_error("import_model", model, "--root", tmp_path / "root")
    assert "could execute code" in found
    assert not trace.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_checkpoint_is_a_sentence(trained: Path, tmp_path: Path, damage: str) -> None:
    model = copied(trained, tmp_path)
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    content = checkpoint.read_bytes()
    if damage == "other":
        torch.save({"state_dict": {"a": torch.ones(1)}}, checkpoint)
    else:
        checkpoint.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    found = run_error("import_model", model, "--root", tmp_path / "root")
    assert "checkpoint_final.pth" in found
    assert list((tmp_path / "root" / "results").iterdir()) == []


def test_an_archive_may_not_leave_its_folder(trained: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.write(model_of(trained, "2d") / "fold_0" / "checkpoint_final.pth", "../fold_0/checkpoint_final.pth")
    found = run_error("import_model", archive, "--root", tmp_path / "root")
    assert "name is not allowed" in found
    assert not (tmp_path / "root" / "fold_0").exists()


def test_what_holds_no_model_is_said(tmp_path: Path) -> None:
    assert "Found no trained model" in run_error("import_model", tmp_path, "--root", tmp_path)
    assert "does not exist" in run_error("import_model", tmp_path / "none.zip", "--root", tmp_path)


def test_folds_of_different_trainings_are_not_one_model(trained: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_of(trained, "3d_fullres"), tmp_path / "model"))
    rewritten(
        model / "fold_1" / "checkpoint_final.pth", lambda content: content.update(inference_allowed_mirroring_axes=(0,))
    )
    assert "different trainings" in run_error("import_model", model, "--root", tmp_path / "root")
    with pytest.raises(Exception, match="mirror"):
        Predictor.load(model, device="cpu")


def test_a_wrapped_network_has_the_same_names(trained: Path, tmp_path: Path) -> None:
    model = copied(trained, tmp_path)

    def change(content: dict) -> None:
        content["network_weights"] = {f"module.{name}": value for name, value in content["network_weights"].items()}

    rewritten(model / "fold_0" / "checkpoint_final.pth", change)
    (imported,) = import_nnunet_models(model, tmp_path / "results")
    assert imported.folds == ("0",)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_copied_or_halved_weights_have_the_same_names(trained: Path, tmp_path: Path, precision: torch.dtype) -> None:
    """Tensors that nnU-Net has under several names no longer share their memory then."""
    model = copied(trained, tmp_path)
    checkpoint = model / "fold_0" / "checkpoint_final.pth"

    def change(content: dict) -> None:
        weights = content["network_weights"]
        content["network_weights"] = {name: value.to(precision, copy=True) for name, value in weights.items()}

    rewritten(checkpoint, change)
    expected = torch.load(checkpoint, weights_only=False)["network_weights"]
    (network,) = Predictor.load(model, device="cpu").networks
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].float())


def test_tensors_without_storage_are_refused(trained: Path, tmp_path: Path) -> None:
    model = copied(trained, tmp_path)
    weights = {"a": torch.ones(2).to_sparse()}
    rewritten(model / "fold_0" / "checkpoint_final.pth", lambda content: content["network_weights"].update(weights))
    assert "entries of other kinds" in run_error("import_model", model, "--root", tmp_path / "root")


@pytest.mark.parametrize("kind", ["preprocessor", "training"])
def test_what_cannot_be_imported_is_left_out_beside_others(
    trained: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "top" / "nnUNet_results" / NAME
    for name in ("good", "left"):
        shutil.copytree(model_of(trained, "2d"), home / name)
    if kind == "preprocessor":
        plans = json.loads((home / "left" / "plans.json").read_text())
        plans["configurations"]["2d"]["preprocessor_name"] = "Mine"
        (home / "left" / "plans.json").write_text(json.dumps(plans))
    else:
        (home / "left/fold_0/checkpoint_final.pth").rename(home / "left/fold_0/checkpoint_latest.pth")
        (home / "left/fold_0/checkpoint_best.pth").unlink()
    shown = run_ok("import_model", tmp_path / "top", "--root", tmp_path)
    assert "Left out" in caplog.text
    assert str(home / "left") in caplog.text
    assert shown.out.count("Imported:") == 1
    assert [path.name for path in (tmp_path / "results").iterdir()] == [NAME]


def test_an_archive_with_two_files_of_a_name_is_refused(trained: Path, tmp_path: Path) -> None:
    archive = tmp_path / "twice.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for name in ("D/plans.json", "d/plans.json", "D/fold_0/checkpoint_final.pth"):
            out.writestr(name, b"{}")
    assert "two files of the same name" in run_error("import_model", archive, "--root", tmp_path / "root")


def test_a_model_without_its_plans_is_said(trained: Path, tmp_path: Path) -> None:
    model = copied(trained, tmp_path)
    (model / "plans.json").unlink()
    assert "plans.json" in run_error("predict", "-i", tmp_path, "-o", tmp_path / "out", "-m", model)
