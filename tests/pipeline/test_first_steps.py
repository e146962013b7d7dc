"""What somebody who meets the package for the first time gives it: the wrong folder, a name instead of an object."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.commands import run_error, run_ok

from rfmedsam2 import (
    BoxPrompt,
    Layout,
    PatchDataset,
    Plan,
    PlanOptions,
    Predictor,
    TrainConfig,
    evaluate,
    open_dataset,
    plan_and_preprocess,
    train,
)
from rfmedsam2.errors import RecordError, UsageError

PHANTOM = "Dataset900_PhantomCT"


def raw_of(root: Path) -> Path:
    return root / "raw" / PHANTOM


def model_of(root: Path) -> Path:
    return root / "results" / PHANTOM / "rfmed_cpu__3d_fullres"


def plan_of(root: Path) -> Plan:
    return Plan.load(Layout.under(root).plan_file(PHANTOM, "rfmed_cpu"))


def test_label_maps_are_not_written_among_the_images(trained_root, tmp_path):
    """Beside CASE_0000.nii.gz, a CASE.nii.gz would be a second file of the same image for the next command."""
    images = shutil.copytree(raw_of(trained_root) / "imagesTs", tmp_path / "images")
    before = sorted(p.name for p in images.iterdir())
    sentence = run_error("predict", "-i", images, "-o", images, "-m", model_of(trained_root), "--device", "cpu")
    assert (
        f"The label maps would lie among the images, where they would be taken for images of the same cases: {images}"
        in sentence
    )
    assert "Choose another output folder with -o" in sentence
    assert sorted(p.name for p in images.iterdir()) == before
    one = images / "phantom_006_0000.nii.gz"
    run_ok("predict", "-i", one, "-o", images / "seg.nii.gz", "-m", model_of(trained_root), "--device", "cpu")
    assert (images / "seg.nii.gz").is_file()  # a file that the user names may lie anywhere


def test_some_of_the_cases_are_scored_by_name(raw_root, tmp_path, caplog):
    labels, some = raw_of(raw_root) / "labelsTr", tmp_path / "some"
    some.mkdir()
    shutil.copy(labels / "phantom_002.nii.gz", some)
    words = ("-p", some, "-g", labels, "-o", tmp_path / "scores", "--root", raw_root)
    sentence = run_error("evaluate", *words)
    assert f"phantom_001: no prediction in {some}\n" in sentence
    assert (
        f"phantom_005: no prediction in {some}\nCorrect these files, or name the cases to score (--cases)" in sentence
    )
    run_ok("evaluate", *words, "--cases", "phantom_002")
    found = json.loads((tmp_path / "scores" / "metrics.json").read_text(encoding="utf-8"))
    assert [case["id"] for case in found["cases"]] == ["phantom_002"]
    assert found["mean"]["dsc"]["mean"] == 1.0
    page = tmp_path / "page.html"
    run_ok("report", "-e", tmp_path / "scores", "-o", page)  # the folder, as rfmed_evaluate was told
    assert "phantom_002" in page.read_text(encoding="utf-8")
    others, own = labels.parent / "imagesTs", labels.parent / "imagesTr"
    run_ok("report", "-e", tmp_path / "scores", "-i", others, "-o", page)
    assert f"No image of these cases is in {others}: the overlays show contours alone" in caplog.messages
    caplog.clear()
    run_ok("report", "-e", tmp_path / "scores", "-i", own, "-o", page)
    assert not [message for message in caplog.messages if "No image" in message]
    assert "phantom_009: no reference in" in run_error("evaluate", *words, "--cases", "phantom_009")


def test_the_folder_above_the_images_is_answered_with_those_of_images(trained_root, tmp_path):
    sentence = run_error("predict", "-i", raw_of(trained_root), "-o", tmp_path / "o", "-m", model_of(trained_root))
    assert sentence.rstrip().endswith("Name the subfolder that holds the images: imagesTr, imagesTs.")


def test_a_flag_out_of_range_is_a_value_to_correct_not_a_file(trained_root, tmp_path):
    sentence = run_error("train", "3d_fullres", "0", "--epochs", 0, "--root", trained_root)
    assert "epochs: Input should be greater than or equal to 1, found 0" in sentence
    assert sentence.rstrip().endswith("Correct the values that were set.")
    images = raw_of(trained_root) / "imagesTs"
    words = ("-i", images, "-o", tmp_path / "o", "-m", model_of(trained_root), "--step-size", 2)
    sentence = run_error("predict", *words)
    assert "step_size: Input should be less than or equal to 1, found 2.0" in sentence
    assert sentence.rstrip().endswith("Correct these options.")


def test_a_plan_that_does_not_exist_is_answered_without_a_flag_that_is_not_there(planned_root):
    sentence = run_error("summary", "rfmed_cup", "--root", planned_root)
    assert sentence.rstrip().endswith("Expected one of rfmed_cpu.")


def test_models_that_are_none(trained_root):
    model = model_of(trained_root)
    with pytest.raises(
        UsageError, match=r"This is the folder of one fold, not of a model: .*fold_0\. .*Name the folder"
    ):
        Predictor.load(model / "fold_0")
    with pytest.raises(UsageError, match=r"This is not a model\. .*Found builtins\.NoneType"):
        Predictor.load(None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Unknown checkpoint: checkpoint_best\. Expected one of final, best, latest"):
        Predictor.load(model, checkpoint="checkpoint_best")  # type: ignore[arg-type]


def test_a_predictor_says_which_model_it_is(trained_root):
    found = repr(Predictor.load(model_of(trained_root), device="cpu"))
    assert found == f"Predictor({PHANTOM}, rfmed_cpu, 3d_fullres, folds 0, cpu)"


def test_names_instead_of_objects(planned_root):
    layout, plan = Layout.under(planned_root), plan_of(planned_root)
    cases = layout.cases_folder(PHANTOM, "rfmed_cpu", "3d_fullres")
    labels = raw_of(planned_root) / "labelsTr"
    dataset = open_dataset(raw_of(planned_root))
    calls = {
        r"layout is not a Layout\. Found builtins\.str\. Make one with Layout\.under": (
            lambda: train(str(planned_root), plan, "3d_fullres"),  # type: ignore[arg-type]
            lambda: plan_and_preprocess(dataset, str(planned_root), PlanOptions()),  # type: ignore[arg-type]
        ),
        r"plan is not a Plan\. Found builtins\.str\. Load it with Plan\.load": (
            lambda: train(layout, "rfmed_cpu", "3d_fullres"),  # type: ignore[arg-type]
            lambda: PatchDataset(cases, "rfmed_cpu", "3d_fullres"),  # type: ignore[arg-type]
        ),
        r"dataset is not a RawDataset\. Found builtins\.str\. Open it with open_dataset": (
            lambda: plan_and_preprocess(PHANTOM, layout, PlanOptions()),  # type: ignore[arg-type]
        ),
        r"labels is not a LabelSet\. Found builtins\.str\. .*out=": (
            lambda: evaluate(labels, labels, "scores"),  # type: ignore[arg-type]
        ),
    }
    for sentence, wrong in calls.items():
        for call in wrong:
            with pytest.raises(UsageError, match=sentence):
                call()


def test_faulty_arguments_of_records_are_errors_of_this_package():
    with pytest.raises(
        RecordError, match=r"The box prompt has 1 fault\(s\) .*the box \[25\.0, 8\.0, 12\.0, 19\.0\] ends before"
    ):
        BoxPrompt(label="spleen", slice=7, box=(25, 8, 12, 19))
    with pytest.raises(RecordError, match=r"epochs: Input should be .*found 0\)\. Correct these arguments"):
        TrainConfig(epochs=0)
    with pytest.raises(RecordError, match=r"The box prompt has 2 fault\(s\).*slice.*box\.3"):
        BoxPrompt(label="spleen", slice=-1, box=(1, 2, 3))  # type: ignore[arg-type]
