"""Predicting end to end with a tiny model: files, folders, arrays; continuing; faults; no training code."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from support.tiny_model import NAME, make_plan, write_image, write_model

from rfmedsam2.errors import CheckpointError, GeometryError, ImageError, PlanError, RfMedSamError, UsageError
from rfmedsam2.inference.volume import PredictOptions, preprocess_case, require_finite
from rfmedsam2.pipeline.evaluation.evaluate import evaluate
from rfmedsam2.pipeline.prediction.checkpoints import find_models
from rfmedsam2.pipeline.prediction.predict import predict_files
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.records.checkpoint import TrainedCases
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Normalization
from rfmedsam2.store.case_files import Case
from rfmedsam2.volume import Volume


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results") / NAME / "rfmed__3d_fullres"
    for fold in ("0", "1"):
        write_model(folder, make_plan(), fold=fold)
    return folder


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor.load(model, device="cpu", options=PredictOptions(step_size=0.75, threads=1))


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return [Case(id=f"case{i}", images=(write_image(tmp_path / "in" / f"case{i}_0000.nii.gz", i),)) for i in range(3)]


def test_files_become_label_maps_with_the_geometry_of_their_images(predictor, cases, tmp_path) -> None:
    out = tmp_path / "out"
    summary = predict_files(predictor, cases, out)
    assert [path.name for path in summary.written] == ["case0.nii.gz", "case1.nii.gz", "case2.nii.gz"]
    for case in cases:
        image, labels = nib.load(case.images[0]), nib.load(out / f"{case.id}.nii.gz")
        assert labels.shape == image.shape
        np.testing.assert_array_equal(labels.affine, image.affine)
        assert (labels.header["sform_code"], labels.header["qform_code"]) == (2, 1)
        assert labels.get_data_dtype() == np.uint8
        assert set(np.unique(labels.dataobj)) <= {0, 1, 2}


def test_the_sidecar_says_what_made_the_files(predictor, cases, tmp_path) -> None:
    predict_files(predictor, cases[:1], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert record["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert [m["weights_sha256"] for m in record["models"]] == [r.weights_sha256 for r in predictor.records]
    assert record["options"]["step_size"] == 0.75
    entry = record["cases"]["case0"]
    assert entry["file"] == "case0.nii.gz"
    assert set(entry["seconds"]) == {"read", "prepare", "network", "export", "write"}


def test_every_way_in_gives_the_same_labels(predictor, cases, tmp_path) -> None:
    path = cases[0].images[0]
    predict_files(predictor, cases[:1], tmp_path / "out")
    expected = np.asarray(nib.load(tmp_path / "out" / "case0.nii.gz").dataobj)
    assert len(np.unique(expected)) > 1
    image = nib.load(path)
    by_nibabel = predictor.predict_nibabel(image)
    np.testing.assert_array_equal(np.asarray(by_nibabel.dataobj), expected)
    np.testing.assert_array_equal(by_nibabel.affine, image.affine)
    by_sitk = predictor.predict_sitk(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(by_sitk).T, expected)
    assert by_sitk.GetOrigin() == sitk.ReadImage(str(path)).GetOrigin()
    array = np.asarray(image.dataobj).T
    np.testing.assert_array_equal(predictor.predict_array(array, spacing_zyx_mm=(2.0, 0.8, 0.9)).T, expected)
    np.testing.assert_array_equal(predictor.predict_array(array[None], spacing_zyx_mm=(2.0, 0.8, 0.9)).T, expected)
    np.testing.assert_array_equal(predictor.predict_file(path, tmp_path / "one.nrrd").T, expected)
    assert (tmp_path / "one.nrrd").is_file()


def test_a_file_that_is_read_is_not_the_output(predictor, cases, tmp_path) -> None:
    image = Path(shutil.copy(cases[0].images[0], tmp_path / "a.nii.gz"))
    (tmp_path / "link.nii.gz").symlink_to(image)
    before = image.read_bytes()
    for paths, out in ((image, image), ([str(image)], tmp_path / "link.nii.gz"), (tmp_path / "link.nii.gz", image)):
        with pytest.raises(UsageError, match="would overwrite an image that is read"):
            predictor.predict_file(paths, out)
    assert image.read_bytes() == before


def test_a_prediction_knows_its_geometry_volumes_and_probabilities(predictor, cases, tmp_path) -> None:
    path = cases[0].images[0]
    image = nib.load(path)
    prediction = predictor(path, probabilities=True)
    assert prediction.labels.shape == image.shape[::-1]
    np.testing.assert_array_equal(prediction.to_nibabel().affine, image.affine)
    assert prediction.to_sitk().GetOrigin() == pytest.approx(sitk.ReadImage(str(path)).GetOrigin())
    voxel_ml = 0.9 * 0.8 * 2.0 / 1000
    assert prediction.volumes_ml == {
        "liver": pytest.approx((prediction.labels == 1).sum() * voxel_ml, rel=1e-6),
        "spleen": pytest.approx((prediction.labels == 2).sum() * voxel_ml, rel=1e-6),
    }
    assert set(prediction.seconds) == {"prepare", "network", "export"}
    assert prediction.probabilities.shape == (3, *prediction.labels.shape)
    np.testing.assert_allclose(prediction.probabilities.astype(np.float32).sum(0), 1, atol=5e-3)
    best = np.take_along_axis(prediction.probabilities, prediction.labels[None].astype(int), axis=0)[0]
    assert (best >= prediction.probabilities.max(0) - np.float16(1e-3)).all()
    assert predictor(path).probabilities is None
    prediction.save(tmp_path / "labels.nii.gz")
    saved = nib.load(tmp_path / "labels.nii.gz")
    assert (saved.header["sform_code"], saved.header["qform_code"]) == (2, 1)
    np.testing.assert_array_equal(np.asarray(saved.dataobj).T, prediction.labels)
    predictor(Volume.from_nibabel(image)).save(tmp_path / "of_memory.mha")
    of_memory = sitk.ReadImage(str(tmp_path / "of_memory.mha"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(of_memory), prediction.labels)
    assert of_memory.GetDirection() == pytest.approx(sitk.ReadImage(str(path)).GetDirection())


def test_probabilities_in_memory_are_those_of_the_file(cases, tmp_path) -> None:
    import blosc2

    write_model(tmp_path / "m", make_plan(reorient="RAS", transpose_forward=(2, 0, 1)))
    predictor = Predictor.load(tmp_path / "m", device="cpu")
    predict_files(predictor, cases[:1], tmp_path / "out", probabilities=True)
    stored = blosc2.open(str(tmp_path / "out" / "case0.probabilities.b2nd"), mode="r")[:]
    np.testing.assert_array_equal(predictor(cases[0].images[0], probabilities=True).probabilities, stored)


def test_several_channels_come_from_several_files(tmp_path) -> None:
    plan = make_plan()
    stage = plan.stages["3d_fullres"].model_copy(update={"normalization": (Normalization(kind="zscore"),) * 2})
    two = make_plan(channels=("CT", "PET"), intensities=plan.intensities * 2, stages={"3d_fullres": stage})
    write_model(tmp_path / "m", two)
    predictor = Predictor.load(str(tmp_path / "m"), device="cpu")
    files = [write_image(tmp_path / f"{i}.nii.gz", i) for i in range(2)]
    array = np.stack([np.asarray(nib.load(file).dataobj).T for file in files])
    by_files = predictor([str(file) for file in files]).labels
    np.testing.assert_array_equal(predictor(array, spacing_zyx_mm=(2.0, 0.8, 0.9)).labels, by_files)
    with pytest.raises(PlanError, match="channels"):
        predictor(files[0])


@pytest.mark.parametrize("thing", [[], 3, None, {"image": 1}, [None], [["a"]], [Path("x"), 3]])
def test_what_is_no_image_is_a_sentence(predictor, thing) -> None:
    with pytest.raises(UsageError, match=r"is not supported.*Found"):
        predictor(thing)


def test_the_spacing_belongs_to_arrays(predictor, cases) -> None:
    array = np.zeros((8, 9, 10))
    with pytest.raises(UsageError, match="no voxel spacing"):
        predictor(array)
    with pytest.raises(UsageError, match="only for arrays"):
        predictor(cases[0].images[0], spacing_zyx_mm=(1, 1, 1))
    for wrong in ((1, 1), (1, 1, 1, 1), (0, 1, 1), (1, -1, 1), (1, np.nan, 1), "abc", 1.0):
        with pytest.raises(GeometryError, match="spacing"):
            predictor(array, spacing_zyx_mm=wrong)
    with pytest.raises(TypeError):
        predictor.predict_array(array, (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "array", [np.zeros((8, 9)), np.zeros((8, 9, 10), complex), np.full((2, 2, 2), "a"), np.zeros((0, 9, 9))]
)
def test_arrays_that_are_no_volumes_are_sentences(predictor, array) -> None:
    with pytest.raises(ImageError, match="not a volume"):
        predictor(array, spacing_zyx_mm=(1, 1, 1))


def test_a_file_that_is_not_there_and_a_skewed_image_are_sentences(predictor, tmp_path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        predictor(str(tmp_path / "nothing.nii.gz"))
    skewed = np.eye(4)
    skewed[0, 1] = 0.5
    with pytest.raises(GeometryError, match="not perpendicular"):
        predictor(nib.Nifti1Image(np.zeros((8, 9, 10), np.int16), skewed))


def test_whole_numbers_that_32_bit_floats_do_not_tell_apart_are_refused(predictor) -> None:
    array = np.random.default_rng(0).integers(0, 99, (8, 9, 10))
    expected = predictor.predict_array(array.astype(np.float32), spacing_zyx_mm=(2, 1, 1))
    for kind in (np.uint64, np.int64, np.uint16):
        np.testing.assert_array_equal(predictor.predict_array(array.astype(kind), spacing_zyx_mm=(2, 1, 1)), expected)
    for wrong in (array.astype(np.uint64) + np.uint64(1 << 60), np.where(array > 97, -(1 << 62), array)):
        with pytest.raises(ImageError, match=r"too large.*within 2\^53.*voxel\(s\) beyond"):
            predictor.predict_array(wrong, spacing_zyx_mm=(2, 1, 1))


def test_tensors_and_nested_lists_are_arrays(predictor) -> None:
    array = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)
    expected = predictor.predict_array(array, spacing_zyx_mm=(2.0, 1.0, 1.0))
    tensor = torch.from_numpy(array).requires_grad_()
    for same in (tensor, tensor[None], array.tolist(), tuple(array.tolist()), [array], [tensor], list(array)):
        np.testing.assert_array_equal(predictor.predict_array(same, spacing_zyx_mm=[2, 1, 1]), expected)
        np.testing.assert_array_equal(predictor(same, spacing_zyx_mm=torch.tensor([2, 1, 1])).labels, expected)
    with pytest.raises(UsageError, match=r"not an array of numbers.*bfloat16.*Give tensor\.to_dense\(\)\.float"):
        predictor(tensor.bfloat16(), spacing_zyx_mm=(2, 1, 1))
    with pytest.raises(UsageError, match=r"Give lists, or arrays, of equal lengths"):
        predictor([[[1.0, 2.0], [3.0]]], spacing_zyx_mm=(2, 1, 1))
    with pytest.raises(ImageError, match=r"not a volume.*array\[None\]"):
        predictor(array[0], spacing_zyx_mm=(1, 1))


def test_a_2d_stage_predicts_slice_by_slice(tmp_path) -> None:
    write_model(tmp_path / "m", make_plan(), stage="2d")
    labels = Predictor.load(tmp_path / "m", device="cpu").predict_array(
        np.random.default_rng(0).random((5, 30, 20)), spacing_zyx_mm=(3.0, 1.0, 1.0)
    )
    assert labels.shape == (5, 30, 20)


def test_turned_plans_give_labels_and_probabilities_in_the_axes_of_the_file(cases, tmp_path) -> None:
    import blosc2

    write_model(tmp_path / "m", make_plan(reorient="RAS", transpose_forward=(2, 0, 1)))
    predictor = Predictor.load(tmp_path / "m", device="cpu")
    predict_files(predictor, cases[:1], tmp_path / "out", probabilities=True)
    labels = np.asarray(nib.load(tmp_path / "out" / "case0.nii.gz").dataobj).T
    stored = blosc2.open(str(tmp_path / "out" / "case0.probabilities.b2nd"), mode="r")[:].astype(np.float32)
    assert stored.shape == (3, *labels.shape)
    np.testing.assert_allclose(stored.sum(0), 1, atol=5e-3)
    best = np.take_along_axis(stored, labels[None].astype(int), axis=0)[0]
    assert (best >= stored.max(0) - 1e-3).all()


def test_continue_keeps_valid_files_of_the_same_model_only(predictor, model, cases, tmp_path) -> None:
    out = tmp_path / "out"
    predict_files(predictor, cases, out)
    again = predict_files(predictor, cases, out, continue_=True)
    assert (len(again.written), len(again.kept)) == (0, 3)
    (out / "case0.nii.gz").write_bytes((out / "case0.nii.gz").read_bytes()[:100])  # truncated
    write_image(cases[1].images[0], seed=77)  # another input under the same name
    mended = predict_files(predictor, cases, out, continue_=True)
    assert [p.name for p in mended.written] == ["case0.nii.gz", "case1.nii.gz"]
    one_fold = Predictor.load(model, folds=["0"], device="cpu", options=predictor.options)
    assert len(predict_files(one_fold, cases, out, continue_=True).written) == 3
    other_step = one_fold.using(PredictOptions(step_size=1.0))
    assert len(predict_files(other_step, cases, out, continue_=True).written) == 3


def test_without_continue_everything_is_made_anew(predictor, cases, tmp_path) -> None:
    predict_files(predictor, cases[:1], tmp_path / "out")
    assert len(predict_files(predictor, cases[:1], tmp_path / "out").written) == 1


def test_faulty_cases_are_all_named_and_the_others_written(predictor, cases, tmp_path) -> None:
    cases[0].images[0].write_bytes(cases[0].images[0].read_bytes()[:200])
    two = write_image(tmp_path / "in" / "two.nii.gz")
    broken = Case(id="two_channels", images=(two, two))
    with pytest.raises(RfMedSamError) as caught:
        predict_files(predictor, [*cases, broken], tmp_path / "out")
    assert "2 of 4 cases" in str(caught.value)
    assert "case0" in str(caught.value)
    assert "two_channels" in str(caught.value)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"case1.nii.gz", "case2.nii.gz", "predictions.json"}


def test_a_voxel_that_is_no_number_is_a_fault(predictor) -> None:
    array = np.ones((8, 9, 10), np.float32)
    array[3, 3, 3] = np.nan
    with pytest.raises(ImageError, match="not finite"):
        predictor.predict_array(array, spacing_zyx_mm=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["zscore", "ct", "none"])
def test_voxels_that_are_not_finite_are_counted_before_resampling_and_clipping(kind, value, tmp_path) -> None:
    plan = make_plan()
    stage = plan.stages["3d_fullres"].model_copy(update={"normalization": (Normalization(kind=kind),)})
    path = write_model(tmp_path, plan.model_copy(update={"stages": {"3d_fullres": stage}}))
    predictor = Predictor.load(path, device="cpu")
    array = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)
    array[3, 3, 3] = value
    for image in (array, array.astype(np.float64), array[::-1]):
        with pytest.raises(ImageError, match=r"Found 1 voxel\(s\) of NaN or infinity\."):
            predictor.predict_array(image, spacing_zyx_mm=(3.0, 2.0, 2.0))  # resampled: a NaN would spread
    file = tmp_path / "in" / "x.nii.gz"
    file.parent.mkdir()
    nib.save(nib.Nifti1Image(array.T, np.diag([2.0, 2.0, 3.0, 1.0])), file)
    with pytest.raises(RfMedSamError, match=r"x: The image contains voxels.*Found 1 voxel"):
        predict_files(predictor, [Case(id="x", images=(file,))], tmp_path / "out")
    with pytest.raises(ImageError, match=r"1 voxel.* in channel 1"):
        require_finite(Volume.from_numpy(np.stack([np.ones_like(array), array]), spacing_zyx_mm=(1, 1, 1)))


def test_values_that_overflow_are_refused(predictor) -> None:
    array = np.random.default_rng(0).random((8, 9, 10))
    array[2, 2, 2:4] = 1e300
    with pytest.raises(ImageError, match=r"32-bit floats\. Found 2 voxel"):
        predictor.predict_array(array, spacing_zyx_mm=(1.0, 1.0, 1.0))
    plan = make_plan()
    stage = plan.stages["3d_fullres"].model_copy(update={"normalization": (Normalization(kind="rescale_0_1"),)})
    wide = np.linspace(-3e38, 3e38, 720, dtype=np.float64).astype(np.float32).reshape(8, 9, 10)
    volume = Volume.from_numpy(wide, spacing_zyx_mm=(1, 1, 1))
    with np.errstate(all="ignore"), pytest.raises(ImageError, match=r"Preprocessing makes voxels.*-3e\+38 to 3e\+38"):
        preprocess_case(volume, plan.model_copy(update={"stages": {"3d_fullres": stage}}), "3d_fullres")


def test_a_masked_array_is_refused_unless_nothing_is_masked(predictor) -> None:
    array = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)
    hidden = np.ma.masked_greater(array, 1.0)
    with pytest.raises(ImageError, match=rf"masked array.*{int((array > 1).sum())} masked elements.*filled"):
        predictor.predict_array(hidden, spacing_zyx_mm=(1.0, 1.0, 1.0))
    rows = [[*plane] for plane in hidden]
    for lists in ([*hidden], rows):  # NumPy's own functions drop the masks
        with pytest.raises(ImageError, match=r"masked array.*masked elements.*filled"):
            predictor.predict_array(lists, spacing_zyx_mm=(1.0, 1.0, 1.0))
    plain = predictor.predict_array(array, spacing_zyx_mm=(1.0, 1.0, 1.0))
    whole = predictor.predict_array(np.ma.array(array), spacing_zyx_mm=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(whole, plain)


def test_cases_of_the_training_are_named(cases, tmp_path, caplog) -> None:
    path = write_model(
        tmp_path, make_plan(), cases=TrainedCases(train={"case2": "x", "case0": "y"}, val={"case1": "z"})
    )
    predictor = Predictor.load(path, device="cpu")
    predict_files(predictor, cases, tmp_path / "out")
    assert "The model was trained on 2 of these 3 ids (case0, case2)" in caplog.text
    for case in cases:
        labels = nib.load(tmp_path / "out" / f"{case.id}.nii.gz")
        nib.save(labels, write_image(tmp_path / "references" / f"{case.id}.nii.gz"))
    found = "The model was trained on 2 of these 3 ids (case0, case2). If they are the same cases"
    assert found in " ".join(evaluate(tmp_path / "out", tmp_path / "references", workers=0).warnings)
    both = evaluate(tmp_path / "out", tmp_path / "references", cases="case1", workers=0)
    assert "trained" not in " ".join(both.warnings)
    caplog.clear()
    predict_files(predictor, cases[1:2], tmp_path / "other")
    assert "trained" not in caplog.text


def test_parts_are_predicted_into_one_folder_and_one_list(cases, predictor, tmp_path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    predict_files(predictor, cases, whole)
    written = [predict_files(predictor, cases[::-1], out, part=f"{number}/2").written for number in (1, 2)]
    assert [sorted(path.name for path in paths) for paths in written] == [
        ["case0.nii.gz", "case2.nii.gz"],
        ["case1.nii.gz"],
    ]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    together, alone = (json.loads((folder / "predictions.json").read_text()) for folder in (out, whole))
    for record in (together, alone):
        for entry in record["cases"].values():
            del entry["seconds"]
    assert together == alone
    assert len(predict_files(predictor, cases, out, continue_=True, part="1/2").kept) == 2
    assert predict_files(predictor, cases[:1], out, part="2/2").written == ()  # of one case there is no second part
    with pytest.raises(UsageError, match="One file cannot hold the label maps of a part"):
        predict_files(predictor, cases[:1], tmp_path / "one.nii.gz", part="1/2")


def test_an_image_of_another_kind_is_predicted_with_a_warning_that_is_kept(predictor, tmp_path, caplog) -> None:
    image = nib.load(write_image(tmp_path / "in" / "mr.nii.gz"))
    other = np.abs(np.asarray(image.dataobj)) + np.int16(5)
    nib.save(nib.Nifti1Image(other, image.affine), tmp_path / "in" / "mr.nii.gz")
    cases = [Case(id=name, images=(tmp_path / "in" / f"{name}.nii.gz",)) for name in ("ct", "mr")]
    write_image(cases[0].images[0])
    predict_files(predictor, cases, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert record["cases"]["ct"]["warnings"] == []
    [warning] = record["cases"]["mr"]["warnings"]
    assert "no voxel is below 0, but the training foreground reaches -3 HU" in warning
    assert caplog.messages.count(f"mr: {warning}") == 1
    caplog.clear()
    predictor(cases[1].images[0])
    assert caplog.messages == [warning]


def test_what_a_header_says_in_vain_is_a_warning_that_is_kept(predictor, tmp_path, caplog) -> None:
    source = sitk.ReadImage(str(write_image(tmp_path / "in" / "a.nii.gz")))
    path = tmp_path / "in" / "b.mha"
    sitk.WriteImage(source, str(path))
    said = b"DistanceUnits = cm\nElementToIntensityFunctionSlope = 2\nElementType"
    path.write_bytes(path.read_bytes().replace(b"ElementType", said))
    predict_files(predictor, [Case(id="b", images=(path,))], tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"]["b"]["warnings"]
    assert [text.split(",")[0] for text in kept[:1]] == ["The unit of length in the header"]
    assert kept[1] == "The intensity function in the header (slope 2, offset 0) is not applied to the voxels"
    assert [f"b: {text}" for text in kept] == caplog.messages
    caplog.clear()
    predictor(path)
    assert caplog.messages == kept


def test_another_number_of_channels_is_an_error(predictor) -> None:
    with pytest.raises(PlanError, match="channels"):
        predictor.predict_array(np.ones((2, 8, 8, 8)), spacing_zyx_mm=(1.0, 1.0, 1.0))


def test_inputs_are_not_overwritten(predictor, tmp_path) -> None:
    case = Case(id="case", images=(write_image(tmp_path / "case.nii.gz"),))
    with pytest.raises(UsageError, match="overwrite"):
        predict_files(predictor, [case], tmp_path)


def test_no_cases_and_equal_names_are_errors(predictor, cases, tmp_path) -> None:
    with pytest.raises(UsageError, match="no case"):
        predict_files(predictor, [], tmp_path)
    with pytest.raises(UsageError, match="same case name"):
        predict_files(predictor, [cases[0], cases[0]], tmp_path)


def test_another_input_format_keeps_the_plans_ending(predictor, tmp_path) -> None:
    image = sitk.ReadImage(str(write_image(tmp_path / "a.nii.gz")))
    sitk.WriteImage(image, str(tmp_path / "in.nrrd"))
    predict_files(predictor, [Case(id="in", images=(tmp_path / "in.nrrd",))], tmp_path / "out")
    written = sitk.ReadImage(str(tmp_path / "out" / "in.nii.gz"))
    np.testing.assert_allclose(written.GetDirection(), image.GetDirection(), atol=1e-5)


def test_checkpoints_of_other_plans_are_not_averaged(model, tmp_path) -> None:
    other = make_plan(labels=LabelSet.model_validate({"names": {"background": 0, "x": 1, "y": 2}}))
    path = write_model(tmp_path, other)
    with pytest.raises(CheckpointError, match="different plans"):
        Predictor.load([model / "fold_0" / "checkpoint_final.safetensors", path], device="cpu")


def test_a_coarse_network_predicts_on_the_images_grid(tmp_path) -> None:
    coarse = make_plan().with_overrides("3d_fullres.model.input_stride=[1,2,2]")
    write_model(tmp_path / "coarse", coarse)  # the weights of the same seed
    write_model(tmp_path / "fine", make_plan())
    found, fine = (Predictor.load(tmp_path / name, device="cpu") for name in ("coarse", "fine"))
    around = replace(fine, running=replace(fine.running, networks=(InBlocks(fine.networks[0]),)))
    image = nib.load(write_image(tmp_path / "a.nii.gz"))
    given, wanted, by_fine = (p(image, probabilities=True).probabilities for p in (found, around, fine))
    assert given.shape == (3, 14, 25, 22)
    np.testing.assert_allclose(given, wanted, atol=2e-3)
    assert np.abs(given - by_fine).max() > 0.02


class InBlocks(torch.nn.Module):
    """A network on means of 1 x 2 x 2 voxels, its logits interpolated: written out."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.network(x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).mean((4, 6)))
        return torch.nn.functional.interpolate(logits, x.shape[2:], mode="trilinear", align_corners=False)


def test_coarse_and_fine_folds_are_not_averaged(model, tmp_path) -> None:
    coarse = make_plan().with_overrides("3d_fullres.model.input_stride=[2,2,2]")  # its tensors have the same shapes
    path = write_model(tmp_path, coarse, fold="1")
    with pytest.raises(CheckpointError, match="different plans"):
        Predictor.load([model / "fold_0" / "checkpoint_final.safetensors", path], device="cpu")


def test_a_pickle_dressed_as_a_checkpoint_is_refused(tmp_path) -> None:
    path = tmp_path / "fold_0" / "checkpoint_final.safetensors"
    path.parent.mkdir()
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="never opened"):
        Predictor.load(tmp_path, device="cpu")


def test_missing_folds_checkpoints_and_devices_are_sentences(model, tmp_path) -> None:
    with pytest.raises(UsageError, match="fold has not been trained"):
        Predictor.load(model, folds=["7"], device="cpu")
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        Predictor.load(model, checkpoint="best", device="cpu")
    with pytest.raises(UsageError, match="no trained model"):
        Predictor.load(tmp_path, device="cpu")
    with pytest.raises(UsageError, match="Unknown device"):
        Predictor.load(model, device="abacus")


def test_an_unfinished_training_predicts_with_its_latest_checkpoint(tmp_path) -> None:
    write_model(tmp_path, make_plan(), which="latest")
    assert Predictor.load(tmp_path, device="cpu").checkpoints[0].name == "checkpoint_latest.safetensors"


def test_models_are_found(model, tmp_path) -> None:
    results = model.parents[1]
    (results / NAME / "rfmed__2d" / "fold_0").mkdir(parents=True, exist_ok=True)  # nothing trained yet
    (found,) = find_models(results)
    assert (found.dataset, found.plan, found.stage, found.folds) == (NAME, "rfmed", "3d_fullres", ("0", "1"))
    assert find_models(results, "Dataset001_Other") == []
    assert find_models(tmp_path / "nothing") == []
