"""Every command on real scans: abdominal CT, 4-channel and 3-channel MR, regions, grouped splits, other file formats.

Trainings last two steps: what is tested is that real files go through whole, not how well they are segmented.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from support.commands import run_error, run_ok

from rfmedsam2 import Predictor
from rfmedsam2.inference.volume import PredictOptions
from rfmedsam2.store.images import read_header, read_image, read_label

pytestmark = pytest.mark.data

DATASETS = {
    "ct-organs-totalsegmentator/Dataset110_TSAbdomenCT": 1,
    "ivadomed-samples/Dataset113_SpinalCord3ch": 3,
    "brats-like-4ch/Dataset114_BraTSlike4ch": 4,
    "mr-organs-totalsegmentator/Dataset119_TSAbdomenMR": 1,
}
REGIONS = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [1, 3], "enhancing": 3}
QUICK = ("3d_fullres.train.workers=0", "3d_fullres.validation.patches_while_training=1")
TWICE = {f"oasis_{first}": f"oasis_{first + 20}" for first in (1003, 1004, 1005, 1018, 1019)}
"""Scans of the same subject."""


def link(source: Path, root: Path, *, changes: dict | None = None) -> Path:
    """A raw dataset in `root` whose images and labels are those of `source`."""
    target = root / "raw" / source.name
    target.mkdir(parents=True)
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).symlink_to(source / folder)
    content = json.loads((source / "dataset.json").read_text()) | (changes or {})
    (target / "dataset.json").write_text(json.dumps(content))
    return target


def through(raw: Path, root: Path) -> Path:
    """Verify, plan, preprocess, train two steps, predict the training images, evaluate, report; gives predictions."""
    assert json.loads(run_ok("verify", "-d", raw.name, "--json", "--root", root).out)["faults"] is not None
    run_ok("plan_and_preprocess", "-d", raw.name, "--preset", "cpu", "--set", *QUICK, "--root", root)
    run_ok("train", "3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 2, "--no-validate", "--root", root)
    predicted = root / "predictions"
    run_ok("predict", "-i", raw / "imagesTr", "-o", predicted, "--step-size", 1, "--root", root)
    run_ok("evaluate", "-p", predicted, "-g", raw / "labelsTr", "-o", root / "scores", "--root", root)
    run_ok("report", "-e", root / "scores" / "metrics.json", "-i", raw / "imagesTr", "-o", root / "page.html")
    assert (root / "page.html").read_text().startswith("<!")
    return predicted


@pytest.mark.parametrize("folder", DATASETS)
def test_a_real_dataset_goes_through_every_command(folder, data_root, tmp_path):
    raw = link(data_root / folder, tmp_path)
    predicted = through(raw, tmp_path)
    values = set(json.loads((raw / "dataset.json").read_text())["labels"].values())
    for label in (raw / "labelsTr").iterdir():
        labels, header = read_label(predicted / label.name)
        assert header.grid.mismatch(read_header(label).grid) is None
        assert set(np.unique(labels.array).tolist()) <= values


def test_regions_of_real_tumors_go_through_every_command(data_root, tmp_path):
    changes = {"labels": REGIONS, "regions_class_order": [2, 1, 3]}
    raw = link(data_root / "brats-like-4ch/Dataset114_BraTSlike4ch", tmp_path, changes=changes)
    through(raw, tmp_path)
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert set(scores["classes"]) == {"whole_tumor", "tumor_core", "enhancing"}


def test_subjects_that_were_scanned_twice_stay_on_one_side(data_root, tmp_path):
    groups = {case: first for first, second in TWICE.items() for case in (first, second)}
    source = data_root / "oasis-subcortical/Dataset115_OASISSubcortical"
    raw = link(source, tmp_path, changes={"groups": groups})
    run_ok("plan_and_preprocess", "-d", raw.name, "--no-preprocess", "--root", tmp_path)
    splits = json.loads((tmp_path / "preprocessed" / raw.name / "splits_final.json").read_text())
    assert len(splits) == 5
    assert sorted(case for fold in splits for case in fold["val"]) == sorted(
        p.name.removesuffix(".nii.gz") for p in (raw / "labelsTr").iterdir()
    )
    for fold in splits:
        for first, second in TWICE.items():
            assert (first in fold["val"]) == (second in fold["val"])


@pytest.fixture(scope="module")
def mr_root(data_root, tmp_path_factory) -> Path:
    """A root with a one-channel MR model."""
    root = tmp_path_factory.mktemp("mr")
    raw = link(data_root / "mr-organs-totalsegmentator/Dataset119_TSAbdomenMR", root)
    run_ok("plan_and_preprocess", "-d", raw.name, "--preset", "cpu", "--set", *QUICK, "--root", root)
    run_ok("train", "3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 2, "--no-validate", "--root", root)
    return root


@pytest.mark.parametrize(
    "sample",
    [
        "dicom_hippocampus_crop",
        "dicom_ct_totalseg20",
        "dicom_ct3slice",  # two series, one of them a segmentation: the only image series is taken
        "mgz/wm.mgz",
        "mha/10000_1000000_adc.mha",
        "nifti/FLAIR.nii.gz",
        "nrrd/brain1_image.nrrd",
    ],
)
def test_predictions_have_the_geometry_of_any_format(sample, mr_root, data_root, tmp_path):
    source = data_root / "format-samples" / sample
    run_ok("predict", "-i", source, "-o", tmp_path, "--step-size", 1, "--root", mr_root)
    (written,) = [p for p in tmp_path.iterdir() if p.name != "predictions.json"]
    header = read_label(written)[1]
    image, theirs = read_image(source)
    assert header.grid.mismatch(theirs.grid) is None
    assert header.grid.shape_zyx == image.array.shape[1:]


def test_a_folder_with_two_scans_is_refused_with_both_named(mr_root, data_root, tmp_path):
    folder = tmp_path / "two series"
    folder.mkdir()
    for series in ("dicom_hippocampus_crop", "dicom_ct_totalseg20"):
        for file in (data_root / "format-samples" / series).iterdir():
            (folder / f"{series}_{file.name}").symlink_to(file)
    sentence = run_error("predict", "-i", folder, "-o", tmp_path / "out", "--root", mr_root)
    assert "2 DICOM image series" in sentence
    assert "32 slices" in sentence
    assert "20 slices" in sentence
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_scripts_get_the_labels_of_the_command(mr_root, data_root, tmp_path):
    source = data_root / "mr-organs-totalsegmentator/Dataset119_TSAbdomenMR/imagesTr/ts_mr_0000.nii.gz"
    run_ok("predict", "-i", source, "-o", tmp_path, "--step-size", 1, "--root", mr_root)
    expected = np.asarray(nib.Nifti1Image.from_filename(tmp_path / "ts_mr.nii.gz").dataobj)
    assert expected.any()
    (model,) = (mr_root / "results").glob("*/*__3d_fullres")
    options = PredictOptions(step_size=1.0)
    predictor = Predictor.load(str(model), device="cpu", options=options)
    image = nib.Nifti1Image.from_filename(source)
    found = predictor.predict_nibabel(image)
    np.testing.assert_array_equal(np.asarray(found.dataobj), expected)
    np.testing.assert_allclose(np.asarray(found.affine), np.asarray(image.affine))
    itk = predictor.predict_sitk(sitk.ReadImage(str(source)))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).T, expected)
    single = Predictor.load(str(model / "fold_0" / "checkpoint_final.safetensors"), device="cpu", options=options)
    assert single.made_by() == predictor.made_by()


def test_nnunets_own_files_in_shared_folders_stay_untouched(data_root, tmp_path):
    raw = link(data_root / "mr-organs-totalsegmentator/Dataset119_TSAbdomenMR", tmp_path)
    shared = tmp_path / "preprocessed" / raw.name
    shared.mkdir(parents=True)
    theirs = shared / "nnUNetPlans.json"
    theirs.write_text('{"plans_name": "nnUNetPlans", "configurations": {}}')
    before = theirs.read_bytes()
    where = {
        "nnUNet_raw": tmp_path / "raw",
        "nnUNet_preprocessed": tmp_path / "preprocessed",
        "nnUNet_results": tmp_path / "results",
    }
    words = ("-d", 119, "--no-preprocess", "--preset", "cpu")
    assert "-p" in run_error("plan_and_preprocess", *words, "-p", "nnUNetPlans", environment=where)
    run_ok("plan_and_preprocess", *words, environment=where)
    assert theirs.read_bytes() == before
    assert (shared / "dataset.json").read_bytes() == (raw / "dataset.json").read_bytes()
