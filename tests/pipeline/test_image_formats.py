"""Datasets in formats beside NIfTI volumes, from the raw folder to labels; inputs that are refused before they cost."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from PIL import Image
from support.commands import PLANNING, run_error, run_ok
from support.toy_task import make_plan

from rfmedsam2.errors import GeometryError, RfMedSamError
from rfmedsam2.pipeline.prediction.predict import predict_files
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.case_files import Case

LABELS = {"background": 0, "disc": 1, "ring": 2}


def raw_dataset(root: Path, ending: str, channels: int = 1) -> Path:
    folder = root / "raw" / "Dataset060_Disc"
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    content = {
        "channel_names": {str(n): f"stain {n}" for n in range(channels)},
        "labels": LABELS,
        "numTraining": 4,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def disc(seed: int, shape: tuple[int, ...] = (20, 40, 48)) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels: a bright disc in a darker ring."""
    rng = np.random.default_rng(seed)
    center = [n / 2 + rng.uniform(-2, 2) for n in shape]
    away = np.sqrt(
        sum(
            (np.arange(n).reshape([-1 if i == a else 1 for i in range(len(shape))]) - c) ** 2
            for a, (n, c) in enumerate(zip(shape, center, strict=True))
        )
    )
    labels = np.where(away < 5, 1, np.where(away < 9, 2, 0)).astype(np.uint8)
    image = np.clip(rng.normal(60, 10, shape) + 120 * (labels == 1) + 60 * (labels == 2), 0, 255).astype(np.uint8)
    return image, labels


def write_stack(path: Path, array: np.ndarray, spacing: tuple[float, ...]) -> None:
    planes = [Image.fromarray(plane) for plane in array]
    planes[0].save(path, save_all=True, append_images=planes[1:])
    beside = path.with_name(path.stem.removesuffix("_0000") + ".json")
    beside.write_text(json.dumps({"spacing": spacing}))


def test_a_dataset_of_tiff_stacks_goes_from_the_plan_to_scores(tmp_path: Path) -> None:
    folder, spacing = raw_dataset(tmp_path, ".tif"), (2.0, 0.8, 0.8)
    for number in range(5):
        image, labels = disc(number)
        part = "Tr" if number < 4 else "Ts"
        write_stack(folder / f"images{part}" / f"c{number}_0000.tif", image, spacing)
        if part == "Tr":
            write_stack(folder / "labelsTr" / f"c{number}.tif", labels, spacing)
    root = ("--root", tmp_path)
    assert "0 error(s), 0 warning(s)" in run_ok("verify", "-d", 60, *root).out
    run_ok("plan_and_preprocess", "-d", 60, *PLANNING, *root)
    plan = Plan.load(next((tmp_path / "preprocessed").rglob("rfmed_cpu.json")))
    assert plan.stages["3d_fullres"].spacing_mm == pytest.approx(spacing)
    run_ok("train", "3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 2, *root)
    out = tmp_path / "out"
    run_ok("predict", "-i", folder / "imagesTs", "-o", out, *root)
    assert sorted(file.name for file in out.iterdir()) == ["c4.json", "c4.tif", "predictions.json"]
    assert json.loads((out / "c4.json").read_text())["spacing"] == list(spacing)
    assert sitk.ReadImage(str(out / "c4.tif")).GetSize() == (48, 40, 20)
    write_stack(tmp_path / "c4.tif", disc(4)[1], spacing)
    run_ok("evaluate", "-p", out / "c4.tif", "-g", tmp_path / "c4.tif", "-o", tmp_path / "scores", "-d", 60, *root)
    assert (tmp_path / "scores" / "metrics.json").is_file()


def color_files(folder: Path) -> None:
    """Images c0_0000.png with three channels, as nnU-Net's reader of natural images wants them; palettes as labels."""
    for number in range(4):
        image, labels = disc(number, (64, 80))
        Image.fromarray(np.dstack([image, image // 2, 255 - image])).save(folder / "imagesTr" / f"c{number}_0000.png")
        palette = Image.fromarray(labels, "P")
        palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [7] * 759)
        palette.save(folder / "labelsTr" / f"c{number}.png")


def flat_nifti_files(folder: Path) -> None:
    """NIfTI with two axes: images by nibabel, labels by ITK."""
    for number in range(4):
        image, labels = disc(number, (64, 80))
        nib.save(nib.Nifti1Image(image.T, np.diag([-1.0, -1, 1, 1])), folder / "imagesTr" / f"c{number}_0000.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(folder / "labelsTr" / f"c{number}.nii.gz"))


@pytest.mark.parametrize(("write", "ending", "channels"), [(color_files, ".png", 3), (flat_nifti_files, ".nii.gz", 1)])
def test_datasets_of_flat_images_are_planned_and_preprocessed(tmp_path: Path, write, ending, channels) -> None:
    write(raw_dataset(tmp_path, ending, channels))
    run_ok("plan_and_preprocess", "-d", 60, "--preset", "cpu", "--root", tmp_path)
    plan = Plan.load(next((tmp_path / "preprocessed").rglob("rfmed_cpu.json")))
    assert list(plan.stages) == ["2d"]
    assert plan.stages["2d"].spacing_mm[1:] == (1, 1)
    assert len(plan.channels) == channels
    assert len(list((tmp_path / "preprocessed").rglob("c*.b2nd"))) >= 4


@pytest.mark.parametrize(
    ("unit", "factor", "predicted"),
    [
        ("mm", 1, ("mm", 1)),
        ("micron", 1000, ("mm", 1)),
        ("meter", 0.001, ("mm", 1)),
        ("unknown", 1000, ("micron", 1000)),
    ],
)
def test_scores_are_in_mm_whatever_the_unit_of_the_files(
    tmp_path: Path, unit: str, factor: float, predicted: tuple[str, float]
) -> None:
    """A cube of 7 x 7 x 7 voxels of 1 x 1 x 2 mm, predicted one voxel further along x."""
    cube = np.zeros((20, 22, 24), np.uint8)
    cube[5:12, 6:13, 7:14] = 1
    for part, array, scale, name in (("p", np.roll(cube, 1, 0), predicted[1], predicted[0]), ("g", cube, factor, unit)):
        image = nib.Nifti1Image(array, np.diag([scale, scale, 2 * scale, 1]))
        image.header.set_xyzt_units(name)
        (tmp_path / part).mkdir()
        nib.save(image, tmp_path / part / "a.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "cube": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "g" / "dataset.json").write_text(json.dumps(content))
    run_ok("evaluate", "-p", tmp_path / "p", "-g", tmp_path / "g", "-o", tmp_path / "s")
    (case,) = json.loads((tmp_path / "s" / "metrics.json").read_text())["cases"]
    assert case["classes"]["cube"]["hd95_mm"] == pytest.approx(1)
    assert case["classes"]["cube"]["reference_ml"] == pytest.approx(0.686)


def write_model(folder: Path, plan: Plan) -> Predictor:
    from rfmedsam2 import models
    from rfmedsam2.records.checkpoint import CheckpointRecord
    from rfmedsam2.store.checkpoints import write_checkpoint

    torch.manual_seed(0)
    stage = next(iter(plan.stages))
    weights = models.build_stage(plan, plan.stages[stage]).state_dict()
    record = CheckpointRecord(
        plan=plan, stage=stage, fold="0", step=1, weights_sha256="", code_version="0", torch_version="2", created="2026"
    )
    path = folder / "fold_0" / "checkpoint_final.safetensors"
    path.parent.mkdir(parents=True)
    write_checkpoint(path, record, {f"model/{name}": value for name, value in weights.items()}, {})
    return Predictor.load(folder, device="cpu")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    return write_model(tmp_path_factory.mktemp("model"), make_plan())


def test_a_changed_data_file_of_a_header_is_predicted_again(predictor, tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(disc(0)[0])
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    cases = [Case(id="a", images=(tmp_path / "a.mhd",))]
    predict_files(predictor, cases, tmp_path / "out")
    assert len(predict_files(predictor, cases, tmp_path / "out", continue_=True).kept) == 1
    raw = bytearray((tmp_path / "a.raw").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a.raw").write_bytes(raw)
    assert len(predict_files(predictor, cases, tmp_path / "out", continue_=True).written) == 1


def test_an_image_that_two_programs_place_differently_is_predicted_with_a_warning(predictor, tmp_path, caplog) -> None:
    image = nib.Nifti1Image(disc(0)[0].T, None)
    nib.save(image, tmp_path / "a.nii.gz")
    with caplog.at_level(logging.WARNING):
        predict_files(predictor, [Case(id="a", images=(tmp_path / "a.nii.gz",))], tmp_path / "out")
    assert "a: ITK and nibabel place this image differently" in caplog.text


@pytest.mark.parametrize("spacing", [(500, 500, 500), (1, 9000, 9000), (1.5, 700, 700), (20000, 1, 1)])
def test_a_spacing_beyond_reason_is_refused_before_it_is_resampled(predictor, spacing) -> None:
    with pytest.raises(GeometryError, match=r"too large when it is resampled.*4 x 4 x 4 voxels.*Check the spacing"):
        predictor.predict_array(np.random.default_rng(0).random((4, 4, 4)), spacing_zyx_mm=spacing)


def test_a_sparse_file_is_refused_by_its_header(predictor, tmp_path: Path) -> None:
    """Hashing its 8 TB would take hours."""
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[42:48] = np.array([20000, 20000, 20000], "<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    os.truncate(tmp_path / "a.nii", 352 + 20000**3)
    with pytest.raises(RfMedSamError, match=r"a: There is not enough memory.*7450\.6 GiB of voxels"):
        predict_files(predictor, [Case(id="a", images=(tmp_path / "a.nii",))], tmp_path / "out")


def test_a_training_case_with_a_spacing_beyond_reason_is_named(tmp_path: Path) -> None:
    folder = raw_dataset(tmp_path, ".nii.gz")
    for number in range(5):
        image, labels = disc(number)
        affine = np.diag([500.0, 500, 500, 1]) if number == 4 else np.eye(4)
        nib.save(nib.Nifti1Image(image.T, affine), folder / "imagesTr" / f"c{number}_0000.nii.gz")
        nib.save(nib.Nifti1Image(labels.T, affine), folder / "labelsTr" / f"c{number}.nii.gz")
    error = run_error("plan_and_preprocess", "-d", 60, *PLANNING, "--root", tmp_path)
    assert "c4" in error
    assert "too large when it is resampled" in error
