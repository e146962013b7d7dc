"""What a person made or corrected is never replaced by a command, unless --overwrite says so."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from support import samhq_commands
from support.commands import run, run_error, run_ok
from support.tiny_model import make_plan, write_image, write_model

from rfmedsam2.pipeline.prediction import postprocessing as rule_module
from rfmedsam2.pipeline.prediction import predictor as predictor_module
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PredictionsRecord


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, make_plan())
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(3):
        write_image(tmp_path / "in" / f"case{number}_0000.nii.gz", number)
    return tmp_path / "in"


def predicting(model: Path, images: Path, out: Path, *words: object) -> tuple[object, ...]:
    return ("predict", "-i", images, "-o", out, "-m", model, "--device", "cpu", *words)


def corrected(path: Path) -> bytes:
    """Change one voxel, as a person does; gives the new content."""
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] = 7
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), path)
    return path.read_bytes()


def test_a_folder_holds_label_maps_of_one_table(model, images, tmp_path) -> None:
    """predictions.json names one set of labels: of another model's, what it had found before took the new names."""
    exchanged = LabelSet.model_validate({"names": {"background": 0, "spleen": 1, "liver": 2}})
    write_model(tmp_path / "other", make_plan(labels=exchanged))
    out = tmp_path / "out"
    first, second = images / "case0_0000.nii.gz", images / "case1_0000.nii.gz"
    run_ok(*predicting(tmp_path / "other", first, out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for words in ((), ("--overwrite",), ("--continue",)):
        told = run_error(*predicting(model, second, out, *words))
        assert "label maps of other cases by a model with other labels" in told
        assert "Expected background 0, liver 1, spleen 2. Found background 0, spleen 1, liver 2 (case0.nii.gz)" in told
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == before
    run_ok(*predicting(model, first, out))  # all of it is replaced
    run_ok(*predicting(model, second, out))
    assert PredictionsRecord.load(out / "predictions.json").labels == {"background": 0, "liver": 1, "spleen": 2}


def test_manual_labels_are_not_replaced(model, images, tmp_path) -> None:
    out = tmp_path / "labels"
    mine = {out / f"case{n}.nii.gz": write_image(out / f"case{n}.nii.gz", 9).read_bytes() for n in (0, 2)}
    told = run_error(*predicting(model, images, out))
    assert "2 file(s) would be replaced" in told
    assert "case0.nii.gz, case2.nii.gz" in told
    assert "--overwrite" in told
    assert "--continue" in told
    assert {p.name for p in out.iterdir()} == {"case0.nii.gz", "case2.nii.gz"}  # refused before anything was predicted
    done = run_ok(*predicting(model, images, out, "--continue"))
    assert {path: path.read_bytes() for path in mine} == mine
    assert "Predicted 1 case(s)" in done.out
    assert "Kept 2 label map(s) that this model did not make or that were changed since: case0" in done.err
    assert set(PredictionsRecord.load(out / "predictions.json").cases) == {"case1"}
    run_ok(*predicting(model, images, out, "--overwrite"))
    assert all(path.read_bytes() != content for path, content in mine.items())
    assert set(PredictionsRecord.load(out / "predictions.json").cases) == {"case0", "case1", "case2"}


def test_corrected_predictions_are_not_replaced(model, images, tmp_path) -> None:
    out = tmp_path / "out"
    run_ok(*predicting(model, images, out))
    first = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    content = corrected(out / "case1.nii.gz")
    told = run_error(*predicting(model, images, out))
    assert "1 file(s) would be replaced" in told
    assert "case1.nii.gz" in told
    assert "case0" not in told
    answer = json.loads(run_ok(*predicting(model, images, out, "--continue", "--json")).out)
    assert [Path(p).name for p in answer["corrected"]] == ["case1.nii.gz"]
    assert [Path(p).name for p in answer["kept"]] == ["case0.nii.gz", "case2.nii.gz"]
    assert answer["written"] == []
    assert (out / "case1.nii.gz").read_bytes() == content
    write_model(tmp_path / "other", make_plan(), fold="1")
    other = json.loads(run_ok(*predicting(tmp_path / "other", images, out, "--continue", "--json")).out)
    assert [Path(p).name for p in other["written"]] == ["case0.nii.gz", "case2.nii.gz"]
    assert (out / "case1.nii.gz").read_bytes() == content
    replaced = json.loads(run_ok(*predicting(model, images, out, "--overwrite", "--continue", "--json")).out)
    assert [Path(p).name for p in replaced["written"]] == ["case0.nii.gz", "case1.nii.gz", "case2.nii.gz"]
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == first
    corrected(out / "case1.nii.gz")  # as in the validation of a training, which scores only what its model predicts
    replaced = json.loads(run_ok(*predicting(model, images, out, "--overwrite", "--continue", "--json")).out)
    assert [Path(p).name for p in replaced["written"]] == ["case1.nii.gz"]
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == first
    run_ok(*predicting(model, images, out))  # unchanged predictions of ours are made again, as always


@pytest.mark.parametrize("command", ["predict", "postprocess"])
@pytest.mark.parametrize("words", [(), ("--overwrite",)], ids=str)
def test_a_label_map_that_is_saved_during_the_run_stays(command, words, model, images, tmp_path, monkeypatch) -> None:
    """A person goes through the predictions of yesterday while they are made again."""
    first = tmp_path / "first"
    run_ok(*predicting(model, images, first))
    module, name = (predictor_module, "predict_prepared") if command == "predict" else (rule_module, "postprocess")
    real, out = getattr(module, name), tmp_path / "out"
    mine = write_image(tmp_path / "mine.nii.gz", 9).read_bytes()

    def meanwhile(*given, **named):
        (out / "case2.nii.gz").write_bytes(mine)
        return real(*given, **named)

    asked = predicting(model, images, out, *words)
    if command == "postprocess":
        rule = {"format": 1, "dataset": "Dataset900_Tiny", "labels": {"background": 0, "liver": 1, "spleen": 2}}
        (tmp_path / "rule.json").write_text(json.dumps(rule | {"steps": []}))
        asked = ("postprocess", "-i", first, "-o", out, "--rule", tmp_path / "rule.json", *words)
    run_ok(*asked)
    monkeypatch.setattr(module, name, meanwhile)
    if "--overwrite" in words:
        run_ok(*asked)
        assert (out / "case2.nii.gz").read_bytes() == (first / "case2.nii.gz").read_bytes()
        return
    told = run_error(*asked)
    assert f"case2: Somebody else saved a label map here while this run was under way: {out / 'case2.nii.gz'}" in told
    assert (out / "case2.nii.gz").read_bytes() == mine
    assert (out / "case0.nii.gz").is_file()


def test_a_touched_prediction_is_no_correction(model, images, tmp_path) -> None:
    out = tmp_path / "out"
    run_ok(*predicting(model, images, out))
    for path in out.glob("*.nii.gz"):
        os.utime(path, (2e9, 2e9))
    shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile)
    assert "kept 3" in run_ok(*predicting(model, images, tmp_path / "copy", "--continue")).out
    run_ok(*predicting(model, images, tmp_path / "copy"))


def test_records_without_digests_go_by_the_time(model, images, tmp_path) -> None:
    out = tmp_path / "out"
    run_ok(*predicting(model, images, out))
    record = json.loads((out / "predictions.json").read_text())
    for case in record["cases"].values():
        del case["sha256"]
    (out / "predictions.json").write_text(json.dumps(record))
    run_ok(*predicting(model, images, out, "--continue"))
    later = (out / "predictions.json").stat().st_mtime + 60
    os.utime(out / "case2.nii.gz", (later, later))
    assert "Found case2.nii.gz" in run_error(*predicting(model, images, out))


def test_a_record_of_another_program_is_not_replaced(model, images, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.json").write_text('{"mine": 1}')
    for words in ((), ("--continue",)):
        assert "predictions.json" in run_error(*predicting(model, images, out, *words))
    assert (out / "predictions.json").read_text() == '{"mine": 1}'
    assert "case0.nii.gz" not in {p.name for p in out.iterdir()}
    run_ok(*predicting(model, images, out, "--overwrite"))


def test_other_probabilities_are_not_replaced(model, images, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "case0.probabilities.b2nd").write_bytes(b"mine")
    assert "case0.probabilities.b2nd" in run_error(*predicting(model, images, out, "--probabilities"))
    run_ok(*predicting(model, images, out))
    assert (out / "case0.probabilities.b2nd").read_bytes() == b"mine"


def test_one_image_becomes_one_file(model, images, tmp_path) -> None:
    run_ok(*predicting(model, images, tmp_path / "folder"))
    expected = (tmp_path / "folder" / "case1.nii.gz").read_bytes()
    for name in ("new/labels.nii.gz", "labels.nii.gz"):
        target = tmp_path / name
        run_ok(*predicting(model, images / "case1_0000.nii.gz", target))
        assert target.is_file()
        assert target.read_bytes() == expected
        assert [p.name for p in target.parent.iterdir() if p.suffix in (".json", ".lock")] == []
    assert "labels.nii.gz" in run_error(*predicting(model, images / "case1_0000.nii.gz", tmp_path / "labels.nii.gz"))
    done = run_ok(*predicting(model, images / "case0_0000.nii.gz", tmp_path / "labels.nii.gz", "--continue"))
    assert "kept 1" in done.out
    assert (tmp_path / "labels.nii.gz").read_bytes() == expected
    run_ok(*predicting(model, images / "case0_0000.nii.gz", tmp_path / "labels.nii.gz", "--overwrite"))
    assert (tmp_path / "labels.nii.gz").read_bytes() == (tmp_path / "folder" / "case0.nii.gz").read_bytes()
    nrrd = tmp_path / "labels.nrrd"
    run_ok(*predicting(model, images / "case0_0000.nii.gz", nrrd, "--probabilities"))
    assert nrrd.is_file()
    assert (tmp_path / "labels.probabilities.b2nd").is_file()
    assert "3 cases" in run_error(*predicting(model, images, tmp_path / "all.nii.gz"))
    assert not (tmp_path / "all.nii.gz").exists()
    for ending in (".dcm", ".nhdr", ".img", ".HDR", ".nii.bz2", ".json"):
        told = run_error(*predicting(model, images / "case0_0000.nii.gz", tmp_path / f"x{ending}"))
        assert f"Label maps cannot be written in this format: {tmp_path / f'x{ending}'}" in told
        assert not (tmp_path / f"x{ending}").exists()


def test_an_image_is_never_its_own_prediction(model, images) -> None:
    image = images / "case1_0000.nii.gz"
    before = image.read_bytes()
    for words in ((), ("--overwrite",), ("--continue",)):
        assert "overwrite an input" in run_error(*predicting(model, image, image, *words))
    assert image.read_bytes() == before


def test_data_files_of_images_and_of_others_are_not_replaced_by_mhd_labels(model, images, tmp_path) -> None:
    """q_0000.mhd keeps its voxels in q.zraw, the name that the data file of the label map q.mhd has too."""
    image = sitk.ReadImage(str(images / "case1_0000.nii.gz"))
    folder = tmp_path / "mhd"
    folder.mkdir()
    sitk.WriteImage(image, str(folder / "q.mhd"), True)
    header = (folder / "q.mhd").rename(folder / "q_0000.mhd")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert sorted(path.name for path in before) == ["q.zraw", "q_0000.mhd"]
    for words in ((), ("--overwrite",), ("--continue",)):
        told = run_error(*predicting(model, header, folder / "q.mhd", *words))
        assert "The prediction would overwrite an input" in told
        assert "q.zraw" in told
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    mine = tmp_path / "others" / "out.zraw"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    told = run_error(*predicting(model, header, mine.with_name("out.mhd")))
    assert "1 file(s) would be replaced" in told
    assert "out.zraw" in told
    assert "--continue" not in told  # there is no label map to keep
    assert [path.read_bytes() for path in mine.parent.iterdir()] == [b"mine"]
    run_ok(*predicting(model, header, mine.with_name("out.mhd"), "--overwrite"))
    assert sitk.ReadImage(str(mine.with_name("out.mhd"))).GetSize() == image.GetSize()


def test_mhd_labels_of_a_folder_are_replaced_like_others(model, images, tmp_path) -> None:
    plan = tmp_path / "model"
    write_model(plan, make_plan(file_ending=".mhd"))
    out = tmp_path / "out"
    run_ok(*predicting(plan, images, out))
    for words in ((), ("--continue",)):
        run_ok(*predicting(plan, images, out, *words))
    (out / "case0.mhd").unlink()  # what is left of it is ours still
    assert "Predicted 1 case(s)" in run_ok(*predicting(plan, images, out, "--continue")).out
    assert sorted(path.name for path in out.glob("case0.*")) == ["case0.mhd", "case0.zraw"]
    (out / "case1.zraw").write_bytes(b"mine")
    assert "case1.mhd" in run_error(*predicting(plan, images, out))
    assert (out / "case1.zraw").read_bytes() == b"mine"


def test_files_that_cannot_be_are_refused_before_anything_is_predicted(model, images, tmp_path) -> None:
    image = images / "case1_0000.nii.gz"
    before = image.read_bytes()
    for place, sentence in (
        (image / "x.nii.gz", "Expected a folder, but a file exists at this path"),
        (image / "new" / "x.nii.gz", "Expected a folder, but a file exists at this path"),
        (tmp_path / ("x" * 300 + ".nii.gz"), "File name too long"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        told = run_error(*predicting(model, image, place))
        assert sentence in told
        assert "cases were not predicted" not in told
    for name in ("link.nii.gz", "to_nowhere.nii.gz"):
        (tmp_path / name).symlink_to(image if name == "link.nii.gz" else tmp_path / "nowhere")
        run_error(*predicting(model, image, tmp_path / name))
        assert (tmp_path / name).is_symlink()
    assert image.read_bytes() == before


def test_a_folder_named_like_a_file_stays_a_folder(model, images, tmp_path) -> None:
    (tmp_path / "out.nii.gz").mkdir()
    run_ok(*predicting(model, images, tmp_path / "out.nii.gz"))
    assert (tmp_path / "out.nii.gz" / "predictions.json").is_file()


# ---------------------------------------------------------------- other commands


def test_an_evaluation_replaces_only_evaluations(raw_root, tmp_path) -> None:
    labels = raw_root / "raw" / "Dataset900_PhantomCT" / "labelsTs"
    words = ("evaluate", "-p", labels, "-g", labels, "-o", tmp_path)
    for name in ("metrics.csv", "metrics.json"):
        (tmp_path / name).write_text("mine")
        assert name in run_error(*words)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    run_ok(*words)
    run_ok(*words)
    (tmp_path / "metrics.json").write_text('{"mine": 1}')
    run_error(*words)
    run_ok(*words, "--overwrite")


def test_a_report_replaces_only_reports(trained_root, tmp_path) -> None:
    (fold,) = trained_root.glob("results/*/*/fold_0")
    page = tmp_path / "page.html"
    words = ("report", "-t", fold, "-o", page)
    run_ok(*words)
    run_ok(*words)
    for content in ("<!DOCTYPE html><title>mine</title>", '{"scores": 1}'):
        page.write_text(content)
        assert "did not make" in run_error(*words)
        assert page.read_text() == content
    run_ok(*words, "--overwrite")


def test_an_exported_model_replaces_only_models(model, tmp_path) -> None:
    target = tmp_path / "model.zip"
    words = ("export_model", "-m", model, "-o", target)
    run_ok(*words)
    run_ok(*words)
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("thesis.txt", "mine")
    before = target.read_bytes()
    assert "did not make" in run_error(*words)
    assert target.read_bytes() == before
    run_ok(*words, "--overwrite")


def test_what_a_command_reads_is_never_its_output(raw_root, tmp_path) -> None:
    checkpoint = write_model(tmp_path / "model", make_plan())
    before = checkpoint.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(checkpoint.parent)
    for target in (checkpoint, link / checkpoint.name):
        told = run_error("export_model", "-m", tmp_path / "model", "-o", target, "--overwrite")
        assert "would overwrite an input" in told
    assert checkpoint.read_bytes() == before
    labels, scores = raw_root / "raw" / "Dataset900_PhantomCT" / "labelsTs", tmp_path / "scores" / "metrics.json"
    run_ok("evaluate", "-p", labels, "-g", labels, "-o", scores.parent)
    before = scores.read_bytes()
    for named in (scores, scores.parent):
        assert "would overwrite an input" in run_error("report", "-e", named, "-o", scores, "--overwrite")
    assert scores.read_bytes() == before
    run_ok("report", "-e", scores, "-o", scores.with_name("page.html"))
    run_ok("report", "-e", scores.parent, "-o", scores.with_name("page.html"))  # its own page beside the scores
    masks = write_image(tmp_path / "in" / "amos_0001.nii.gz")
    before = masks.read_bytes()
    words = ("submit", "amos22", "-i", masks.parent, "--images", masks.parent, "-o", masks, "--overwrite")
    assert "would overwrite an input" in run_error(*words)
    assert masks.read_bytes() == before


def test_images_without_prompts_and_the_prompts_are_never_replaced_by_masks(tmp_path) -> None:
    images = samhq_commands.write_images(tmp_path / "data") / "images"
    inputs = {path: path.read_bytes() for path in images.iterdir()}
    asked = [{"image": "a.png", "box": [5, 5, 9, 9], "name": "b"}]
    words = ("predict", "sam", "-b", "vit_nano", "-i", images, "--overwrite")
    prompts = samhq_commands.written(tmp_path / "prompts.json", asked)
    told = samhq_commands.run_error(*words, "-p", prompts, "-o", images)
    assert "would overwrite images or prompts" in told
    assert "b.png" in told
    mine = samhq_commands.written(tmp_path / "predictions.json", asked)
    assert "predictions.json" in samhq_commands.run_error(*words, "-p", mine, "-o", tmp_path)
    assert {path: path.read_bytes() for path in images.iterdir()} == inputs
    assert json.loads(mine.read_text()) == asked


def test_a_submission_replaces_only_submissions(tmp_path) -> None:
    target = tmp_path / "results.zip"
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("thesis.txt", "mine")
    before = target.read_bytes()
    labels = write_image(tmp_path / "in" / "amos_0001.nii.gz").parent
    words = ("submit", "amos22", "-i", labels, "--images", labels, "-o", target)
    assert "did not make" in run_error(*words)
    assert target.read_bytes() == before
    assert run(*words, "--overwrite").code == 2  # noise is no label map: nothing was written
    assert target.read_bytes() == before


def test_a_training_keeps_another_plan_in_its_folder(tmp_path) -> None:
    data = samhq_commands.write_images(tmp_path / "data")
    out = tmp_path / "run"
    out.mkdir()
    (out / "plan.json").write_text('{"mine": 1}')
    words = ("sam_decoder", "-b", "vit_nano", "--data", data, "-o", out, "--device", "cpu", "--held-out", 0)
    assert "holds another plan" in samhq_commands.run_error("train", *words)
    assert (out / "plan.json").read_text() == '{"mine": 1}'


def test_the_spacing_of_a_stack_and_the_list_of_predictions_are_two_files(tmp_path) -> None:
    """The spacing of predictions.tif belongs into predictions.json."""
    write_model(tmp_path / "model", make_plan(file_ending=".tif"))
    write_image(tmp_path / "in" / "predictions_0000.nii.gz")
    words = predicting(tmp_path / "model", tmp_path / "in", tmp_path / "out")
    told = run_error(*words)
    assert "would be one file, predictions.json" in told
    assert "Rename the case" in told
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "predictions_0000.nii.gz").rename(tmp_path / "in" / "dataset_0000.nii.gz")
    assert "the names of all labels would be one file, dataset.json" in run_error(*words)
    (tmp_path / "in" / "dataset_0000.nii.gz").rename(tmp_path / "in" / "other_0000.nii.gz")
    run_ok(*words)
    assert json.loads((tmp_path / "out" / "other.json").read_text())["spacing"] == pytest.approx([2.0, 0.8, 0.9])
