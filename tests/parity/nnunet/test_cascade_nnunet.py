"""Cascades that nnU-Net trained: the second stage is given what nnU-Net gives it, and predicts the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from support.blobs import NAME, images_of, labels_of
from support.commands import run_error, run_ok

from rfmedsam2 import Predictor
from rfmedsam2.inference.volume import preprocess_case
from rfmedsam2.pipeline.nnunet.plans import import_nnunet_plans
from rfmedsam2.store.images import read_label
from rfmedsam2.store.raw import read_dataset_json
from rfmedsam2.volume import Volume

FIRST, SECOND = "3d_lowres", "3d_cascade_fullres"


def model_of(trained: Path, stage: str = SECOND) -> Path:
    return trained / "results" / NAME / f"nnUNetTrainer__nnUNetPlans__{stage}"


def differing(found: np.ndarray, expected: np.ndarray) -> float:
    assert (expected > 0).sum() > 300
    return float((found != expected).mean())


def images(trained: Path, folder: Path, cases: int = 1) -> Path:
    folder.mkdir()
    for path in images_of(trained)[:cases]:
        shutil.copy(path, folder)
    return folder


def test_both_stages_are_predicted_in_one_command(trained: Path, tmp_path: Path) -> None:
    given = images(trained, tmp_path / "images", cases=2)
    run_ok("predict", "-i", given, "-o", tmp_path / "out", "-m", model_of(trained), "--device", "cpu")
    for case in range(2):
        name = f"blob_{case}.nii.gz"
        assert differing(labels_of(tmp_path / "out" / name), labels_of(trained / SECOND / name)) <= 1e-4
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert record["options"]["previous_stage"] == Predictor.load(model_of(trained, FIRST), device="cpu").made_by()


def test_label_maps_of_the_first_stage_may_be_given(trained: Path, tmp_path: Path) -> None:
    home = tmp_path / "alone"
    shutil.copytree(model_of(trained), home)
    given, maps = images(trained, tmp_path / "images"), tmp_path / "maps"
    words = ("predict", "-i", given, "-o", tmp_path / "out", "-m", home, "--device", "cpu")
    found = run_error(*words)
    assert "needs the labels of the first, 3d_lowres" in found
    assert "--previous-stage" in found
    assert "does not exist" in run_error(*words, "--previous-stage", maps)
    maps.mkdir()
    assert "1 of 1 cases have no label map" in run_error(*words, "--previous-stage", maps)
    shutil.copy(trained / FIRST / "blob_0.nii.gz", maps)
    table = json.loads((home / "dataset.json").read_text())
    swapped = dict(zip(table["labels"], [0, *list(table["labels"].values())[:0:-1]], strict=True))
    (maps / "dataset.json").write_text(json.dumps(table | {"labels": swapped}))
    assert "other labels than the model" in run_error(*words, "--previous-stage", maps)
    (maps / "dataset.json").write_text(json.dumps(table))
    run_ok(*words, "--previous-stage", maps)
    expected = labels_of(trained / SECOND / "blob_0.nii.gz")
    assert differing(labels_of(tmp_path / "out" / "blob_0.nii.gz"), expected) <= 1e-4
    # an empty map of the first stage leads to other labels, and is not taken for the same input
    low = nib.load(maps / "blob_0.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(low.shape, np.uint8), low.affine, low.header), maps / "blob_0.nii.gz")
    run_ok(*words, "--previous-stage", maps, "--continue")
    assert differing(labels_of(tmp_path / "out" / "blob_0.nii.gz"), expected) > 5e-4
    nib.save(nib.Nifti1Image(np.full(low.shape, 7, np.uint8), low.affine, low.header), maps / "blob_0.nii.gz")
    assert "values that the model does not know" in run_error(*words, "--previous-stage", maps, "--continue")
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), low.affine), maps / "blob_0.nii.gz")
    assert "not on the grid" in run_error(*words, "--previous-stage", maps, "--continue")


def test_label_maps_are_for_second_stages_only(trained: Path, tmp_path: Path) -> None:
    given = images(trained, tmp_path / "images")
    words = ("predict", "-i", given, "-o", tmp_path / "out", "-m", model_of(trained, "2d"), "--device", "cpu")
    assert "not the second stage of a cascade" in run_error(*words, "--previous-stage", trained / FIRST)


def test_a_model_that_is_not_its_first_stage_is_refused(trained: Path, tmp_path: Path) -> None:
    second, first = (tmp_path / model_of(trained, stage).name for stage in (SECOND, FIRST))
    shutil.copytree(model_of(trained), second)
    shutil.copytree(model_of(trained, FIRST), first)
    description = json.loads((first / "dataset.json").read_text())
    description["labels"] = {"background": 0, "box": 1, "ball": 2}
    (first / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(Exception, match=r"not the first stage of this cascade.*other labels"):
        Predictor.load(second, device="cpu")


def test_an_imported_cascade_predicts_the_same_and_goes_back(trained: Path, tmp_path: Path) -> None:
    for stage in (FIRST, SECOND):
        run_ok("import_model", model_of(trained, stage), "--root", tmp_path)
    home = tmp_path / "results" / NAME
    predictor = Predictor.load(home / f"rfmed_nnUNetPlans__{SECOND}", device="cpu")
    expected = labels_of(trained / SECOND / "blob_1.nii.gz")
    assert differing(predictor.predict_file(images_of(trained)[1]), expected) <= 1e-4
    given = predictor(images_of(trained)[1], previous=labels_of(trained / FIRST / "blob_1.nii.gz"))
    assert differing(given.labels, expected) <= 1e-4
    words = ("-d", NAME, "-c", SECOND, "--root", tmp_path)
    run_ok("export_model", *words, "--to", "nnunet", "-o", tmp_path / "theirs")
    written = tmp_path / "theirs" / NAME / f"nnUNetTrainer__rfmed_nnUNetPlans__{SECOND}"
    theirs = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    theirs.initialize_from_trained_model_folder(str(written), (0,), "checkpoint_final.pth")
    assert theirs.configuration_manager.previous_stage_name == FIRST
    assert Predictor.load(written, device="cpu").records[0].weights_sha256 == predictor.records[0].weights_sha256


@pytest.mark.parametrize("masked", [False, True])
def test_the_second_stage_is_given_what_nnunet_gives_it(trained: Path, tmp_path: Path, masked: bool) -> None:
    """Transposed, cropped, resampled as labels, one-hot; the mask of z-scores includes what the first stage labels."""
    content = json.loads((model_of(trained) / "plans.json").read_text())
    full = content["configurations"]["3d_fullres"]
    full |= {"spacing": [1.3, 1.7, 0.8], "use_mask_for_norm": [masked]}
    content |= {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}
    plans = tmp_path / "plans.json"
    plans.write_text(json.dumps(content))
    described = model_of(trained) / "dataset.json"
    image = nib.load(images_of(trained)[0])
    voxels = np.array(image.dataobj)
    voxels[:3], voxels[10:20, 10:20, 5:9] = 0, 0
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), tmp_path / "image.nii.gz")
    low = trained / FIRST / "blob_0.nii.gz"

    manager = PlansManager(content)
    configuration = manager.get_configuration(SECOND)
    dataset_json = json.loads(described.read_text())
    data, seg, _ = configuration.preprocessor_class(verbose=False).run_case(
        [str(tmp_path / "image.nii.gz")], str(low), manager, configuration, dataset_json
    )
    labels = manager.get_label_manager(dataset_json).foreground_labels
    expected = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels, data.dtype)))

    plan = import_nnunet_plans(plans, read_dataset_json(described))
    volume = Volume.from_nibabel(nib.load(tmp_path / "image.nii.gz"))
    found = preprocess_case(volume, plan, SECOND, previous=read_label(low)[0].array[0]).prepared
    assert plan.inputs_of(plan.stages[SECOND]) == determine_num_input_channels(manager, configuration, dataset_json)
    assert found.label is None
    assert found.image.shape == expected.shape
    assert expected[1:].sum() > 300
    assert np.array_equal(found.image[1:], expected[1:])
    assert np.allclose(found.image[:1], expected[:1], atol=2e-3)
