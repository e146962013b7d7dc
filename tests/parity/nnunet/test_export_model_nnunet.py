"""Models of ours that are exported for nnU-Net predict there what they predict here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from support.blobs import NAME, images_of, labels_of, write_blobs
from support.commands import run_error, run_ok, unfinished_files
from support.shared import made_once
from support.small_rfmedsam2 import config
from support.tiny_model import make_plan, write_model

from rfmedsam2 import Predictor
from rfmedsam2.inference.volume import PredictOptions
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.model import Extension, StageExtensions
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.checkpoints import read_weights, write_checkpoint

SMALL = (
    "3d_fullres.model.features=[8,16,16,16]",
    "3d_fullres.train.workers=0",
    "3d_fullres.validation.patches_while_training=1",
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root where rfmed_train has trained fold 0; folds 1 and 2 are fold 0 with other last digits."""

    def make(root: Path) -> None:
        write_blobs(root / "raw" / NAME)
        run_ok(
            *("plan_and_preprocess", "--preset", "nnunet", "-c", "3d_fullres", "--set", *SMALL),
            *("3d_fullres.batch_size=2", "--root", root),
        )
        run_ok("train", "3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 40, "--root", root)
        (model,) = (root / "results" / NAME).iterdir()
        final = model / "fold_0" / "checkpoint_final.safetensors"
        record, weights = read_weights(final)
        draw = torch.Generator().manual_seed(0)
        for fold in ("1", "2"):
            others = {
                f"model/{name}": tensor * (1 + 0.05 * torch.rand(tensor.shape, generator=draw))
                for name, tensor in weights.items()
            }
            other = record.model_copy(update={"fold": fold})
            write_checkpoint(model / f"fold_{fold}" / final.name, other, others, {})

    return made_once(tmp_path_factory, "trained_for_nnunet", make)


def model_in(root: Path) -> Path:
    (model,) = (root / "results" / NAME).iterdir()
    return model


def exported(model: Path, out: Path, *words: object) -> Path:
    shown = run_ok("export_model", "--to", "nnunet", "-m", model, "-o", out, *words)
    assert unfinished_files(out) == []
    (folder,) = out.glob("*/*")
    assert str(folder) in shown.out
    return folder


def nnunets(folder: Path, *, folds: tuple[int, ...] | None = None, mirror: bool = True) -> nnUNetPredictor:
    predictor = nnUNetPredictor(
        use_mirroring=mirror, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


@pytest.mark.parametrize(("folds", "mirror"), [(1, True), (1, False), (3, False)])
def test_nnunet_predicts_the_same(ours: Path, tmp_path: Path, folds: int, *, mirror: bool) -> None:
    chosen = [str(fold) for fold in range(folds)]
    folder = exported(model_in(ours), tmp_path / "results", "-f", *chosen)
    plan = Predictor.load(model_in(ours), folds="0", device="cpu").plan
    assert folder.name == f"nnUNetTrainer__{plan.name}__3d_fullres"
    (image,) = images_of(ours, 1)
    theirs = nnunets(folder, mirror=mirror)
    assert len(theirs.list_of_parameters) == folds
    assert theirs.allowed_mirroring_axes == (0, 1, 2)
    theirs.predict_from_files_sequential([[str(image)]], [str(tmp_path / "out")], save_probabilities=True)
    options = PredictOptions(mirror=mirror)
    mine = Predictor.load(model_in(ours), folds=chosen, device="cpu", options=options)(image, probabilities=True)
    expected = labels_of(tmp_path / "out.nii.gz")
    assert (expected > 0).sum() > 150  # it has learned something
    assert (mine.labels != expected).mean() <= 1e-4
    with np.load(tmp_path / "out.npz") as content:
        apart = np.abs(np.asarray(mine.probabilities, np.float32) - content["probabilities"])
    assert np.quantile(apart, 0.999) < 5e-3


@pytest.mark.parametrize("stage", ["3d_fullres", "2d"])
@pytest.mark.parametrize(("block", "norm"), [("plain", "instance"), ("residual", "instance"), ("plain", "batch")])
def test_nnunet_builds_the_same_network(tmp_path: Path, stage: str, block: str, norm: str) -> None:
    plan = make_plan()
    network = (f"{stage}.model.block={block}", f"{stage}.model.norm={norm}")
    changed = plan.with_overrides(*network, f"{stage}.inference.mirror=false")
    write_model(tmp_path / "model", changed, stage=stage)
    folder = exported(tmp_path / "model", tmp_path / "out")
    assert folder.name == f"nnUNetTrainerNoMirroring__rfmed__{stage}"
    theirs = nnunets(folder, folds=(0,))
    assert theirs.trainer_name == "nnUNetTrainerNoMirroring"
    assert theirs.allowed_mirroring_axes is None
    predictor = Predictor.load(tmp_path / "model", device="cpu")
    patch = torch.rand(1, 1, *changed.stages[stage].patch_size)
    with torch.no_grad():
        assert torch.equal(theirs.network.eval()(patch), predictor.networks[0](patch))
    # each weight once, although the network has it under several names
    weights = sum(tensor.numel() * 4 for tensor in predictor.networks[0].state_dict().values())
    assert (folder / "fold_0" / "checkpoint_final.pth").stat().st_size < weights + 60_000


@pytest.mark.parametrize("stage", ["3d_fullres", "2d"])
def test_its_own_models_come_back_equal(trained: Path, tmp_path: Path, stage: str) -> None:
    theirs = trained / "results" / NAME / f"nnUNetTrainer__nnUNetPlans__{stage}"
    run_ok("import_model", theirs, "--root", tmp_path)
    folder = exported(model_in(tmp_path), tmp_path / "out")
    written = json.loads((folder / "plans.json").read_text())
    original = json.loads((theirs / "plans.json").read_text())
    for key in ("dataset_name", "image_reader_writer", "transpose_forward", "transpose_backward", "label_manager"):
        assert written[key] == original[key]
    statistics = "foreground_intensity_properties_per_channel"
    assert written[statistics] == original[statistics]
    one, two = written["configurations"][stage], original["configurations"][stage]
    names = {key: one[key] for key in ("data_identifier", "median_image_size_in_voxels")}
    assert one == two | names
    assert one["median_image_size_in_voxels"] == pytest.approx(two["median_image_size_in_voxels"], abs=0.5)
    data, before = (json.loads((place / "dataset.json").read_text()) for place in (folder, theirs))
    assert {**before, "numTraining": 0} == data
    fingerprint = "dataset_fingerprint.json"
    assert (folder / fingerprint).read_bytes() == (theirs / fingerprint).read_bytes()
    for fold in sorted(path.name for path in theirs.glob("fold_*")):
        for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
            new, old = (torch.load(place / fold / name, weights_only=False) for place in (folder, theirs))
            assert list(new["network_weights"]) == list(old["network_weights"])
            assert all(torch.equal(old["network_weights"][key], value) for key, value in new["network_weights"].items())
            for key in ("trainer_name", "inference_allowed_mirroring_axes", "current_epoch"):
                assert new[key] == old[key]
            assert new["init_args"]["configuration"] == stage
            assert new["init_args"]["fold"] == old["init_args"]["fold"]
    again, first = Predictor.load(folder, device="cpu"), Predictor.load(theirs, device="cpu")
    assert again.made_by() == first.made_by()


REGIONS = {"names": {"background": 0, "whole": (1, 2), "core": 2}, "regions_class_order": (1, 2), "ignore": 3}
SEPARATE = ("3d_fullres.resampling.anisotropy_threshold=4.5", "3d_fullres.resampling.order_z=1")


@pytest.mark.parametrize(
    "plan",
    [
        make_plan(labels=LabelSet.model_validate(REGIONS)),
        make_plan(reorient="RAS", transpose_forward=(2, 0, 1)),
        make_plan(file_ending=".nii"),
        make_plan().with_overrides(*SEPARATE),
        make_plan().with_overrides("3d_fullres.resampling.anisotropy_threshold=1e6"),
        make_plan().with_overrides("3d_fullres.normalization.0.kind=ct", "3d_fullres.augmentation.mirror_axes=[1]"),
    ],
    ids=["regions", "reoriented", "nii", "threshold", "never separate", "ct"],
)
def test_what_predicting_needs_survives(tmp_path: Path, plan: Plan) -> None:
    write_model(tmp_path / "model", plan)
    folder = exported(tmp_path / "model", tmp_path / "out")
    again, first = Predictor.load(folder, device="cpu"), Predictor.load(tmp_path / "model", device="cpu")
    assert again.made_by() == first.made_by()
    assert nnunets(folder).label_manager.num_segmentation_heads == plan.labels.num_outputs


ODD_VALUES = {"names": {"background": 0, "liver": 1, "spleen": 6}}
FAR_IGNORE = {"names": {"background": 0, "liver": 1}, "ignore": 255}
TASK = StageExtensions(task=Extension(name="mine"))


def changed_stage(**fields: object) -> Plan:
    plan = make_plan()
    return make_plan(stages={"3d_fullres": plan.stages["3d_fullres"].model_copy(update=fields)})


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (make_plan().with_overrides("3d_fullres.model.attention=true"), "3d_fullres.model.attention true"),
        (
            make_plan().with_overrides("3d_fullres.model.input_stride=[1,2,2]"),
            "3d_fullres.model.input_stride [1, 2, 2]",
        ),
        (changed_stage(model=config(), patch_size=(8, 32, 32)), "3d_fullres.model.kind rfmedsam2"),
        (changed_stage(starts_from="3d_lowres"), "3d_fullres.starts_from 3d_lowres"),
        (make_plan(labels=LabelSet.model_validate(ODD_VALUES)), "values 0, 1, 6"),
        (make_plan(labels=LabelSet.model_validate(FAR_IGNORE)), "labels.ignore 255"),
        (make_plan(file_ending=".jpg"), "file_ending .jpg"),
        (make_plan(file_ending=".nrrd", reorient="RAS"), "file_ending .nrrd, reoriented"),
        (changed_stage(extensions=TASK), "3d_fullres.extensions.task mine"),
    ],
)
def test_what_nnunet_cannot_express_is_named(tmp_path: Path, plan: Plan, named: str) -> None:
    write_model(tmp_path / "model", plan)
    told = run_error("export_model", "--to", "nnunet", "-m", tmp_path / "model", "-o", tmp_path / "out")
    assert named in told
    assert "--to zip" in told
    assert not (tmp_path / "out").exists()


def test_other_things_that_cannot_be_exported_are_sentences(tmp_path: Path) -> None:
    write_model(tmp_path / "model", make_plan(), fold="mine")
    told = run_error("export_model", "--to", "nnunet", "-m", tmp_path / "model", "-o", tmp_path / "out")
    assert "no fold of this name" in told
    for fold in ("0", "1"):
        name = "rfmed" if fold == "0" else "other"
        write_model(tmp_path / "two", make_plan(name=name), fold=fold)
    told = run_error("export_model", "--to", "nnunet", "-m", tmp_path / "two", "-o", tmp_path / "out")
    assert "different models" in told
    write_model(tmp_path / "good", make_plan())
    folder = exported(tmp_path / "good", tmp_path / "results")
    told = run_error("export_model", "--to", "nnunet", "-m", folder, "-o", tmp_path / "again")
    assert "nnU-Net's already" in told


def test_only_earlier_exports_are_replaced(tmp_path: Path) -> None:
    write_model(tmp_path / "model", make_plan())
    words = ("export_model", "--to", "nnunet", "-m", tmp_path / "model", "-o", tmp_path / "out")
    run_ok(*words)
    (folder,) = tmp_path.glob("out/*/*")
    (folder / "fold_0" / "checkpoint_final.pth").write_text("older")
    run_ok(*words)
    assert nnunets(folder).list_of_parameters
    plans = json.loads((folder / "plans.json").read_text()) | {"experiment_planner_used": "ExperimentPlanner"}
    for content in (json.dumps(plans), "[]", "mine"):
        (folder / "plans.json").write_text(content)
        assert "did not make" in run_error(*words)
        assert (folder / "plans.json").read_text() == content
    run_ok(*words, "--overwrite")
    assert nnunets(folder).list_of_parameters
    assert unfinished_files(tmp_path / "out") == []
    assert [path.name for path in (tmp_path / "out" / folder.parent.name).iterdir()] == [folder.name]


def test_a_model_of_which_the_best_checkpoint_alone_was_kept_is_exported(tmp_path: Path) -> None:
    write_model(tmp_path / "model", make_plan(), which="best")
    folder = exported(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in (folder / "fold_0").iterdir()] == ["checkpoint_best.pth"]
    predictor = Predictor.load(tmp_path / "model", device="cpu")
    assert Predictor.load(folder, device="cpu").made_by() == predictor.made_by()
    run_ok("export_model", "-m", tmp_path / "model", "-o", tmp_path / "model.zip")
    run_ok("import_model", tmp_path / "model.zip", "--root", tmp_path)
    (imported,) = (tmp_path / "results").glob("*/*")
    again = Predictor.load(imported, device="cpu")
    assert again.models[0].weights_sha256 == predictor.models[0].weights_sha256


def test_other_tiles_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(tmp_path / "model", make_plan().with_overrides("3d_fullres.inference.step_size=0.25"))
    exported(tmp_path / "model", tmp_path / "out")
    assert "-step_size 0.25" in caplog.text


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", make_plan())
    saved = torch.save

    def full(content: object, stream) -> None:
        saved(content, FullDisk(stream))

    monkeypatch.setattr(torch, "save", full)
    words = ("export_model", "--to", "nnunet", "-m", tmp_path / "model", "-o", tmp_path / "out")
    assert "disk is full" in run_error(*words)
    assert not list((tmp_path / "out").rglob("*"))


class FullDisk:
    """A file that has space for a kilobyte."""

    def __init__(self, stream) -> None:
        self.stream, self.free = stream, 1000

    def write(self, content: bytes) -> int:
        self.free -= len(content)
        if self.free < 0:
            raise OSError(28, os.strerror(28))
        return self.stream.write(content)

    def flush(self) -> None:
        self.stream.flush()
