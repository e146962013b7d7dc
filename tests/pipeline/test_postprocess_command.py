"""rfmed_postprocess: a rule on a folder of label maps; whose files are replaced; rules of other datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support.commands import run_error, run_ok, unfinished_files
from support.tiny_model import NAME, make_plan, write_image, write_model

from rfmedsam2.pipeline.prediction.predictor import Predictor

LABELS = {"background": 0, "liver": 1, "spleen": 2}
STEPS = [{"action": "keep_largest", "of": "liver"}, {"action": "drop_small", "smallest_ml": 0.03}]


def write_rule(path: Path, **changes) -> Path:
    path.write_text(json.dumps({"format": 1, "dataset": NAME, "labels": LABELS, "steps": STEPS, **changes}))
    return path


def write_labels(path: Path) -> Path:
    """Voxels of 1x1x2 mm on an oblique grid: liver of 8 and 1 voxels, spleen of 20 and 10 (0.02 ml)."""
    array = np.zeros((12, 10, 8), np.uint8)
    array[0:2, 0:2, 0:2] = 1
    array[11, 9, 7] = 1
    array[5:9, 0:5, 0] = 2
    array[5:10, 8:10, 5] = 2
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def counts(path: Path) -> list[int]:
    return np.bincount(np.asarray(nib.load(path).dataobj).ravel(), minlength=3)[1:].tolist()


@pytest.fixture
def predictions(tmp_path) -> Path:
    for name in ("a", "b"):
        write_labels(tmp_path / "in" / f"{name}.nii.gz")
    return tmp_path / "in"


def test_a_rule_is_applied_in_world_volumes_and_the_input_stays(predictions, tmp_path) -> None:
    before = {path.name: path.read_bytes() for path in predictions.iterdir()}
    rule = write_rule(tmp_path / "rule.json")
    done = run_ok("postprocess", "-i", predictions, "-o", tmp_path / "out", "--rule", rule)
    assert "Processed 2 label map(s), of which 2 changed" in done.out
    assert "drop components of the foreground below 0.03 ml" in done.out
    for name in ("a", "b"):
        assert counts(tmp_path / "out" / f"{name}.nii.gz") == [0, 20]
        written, given = (nib.load(folder / f"{name}.nii.gz") for folder in (tmp_path / "out", predictions))
        np.testing.assert_array_equal(written.affine, given.affine)
    assert {path.name: path.read_bytes() for path in predictions.iterdir()} == before
    assert not unfinished_files(tmp_path)
    found = json.loads(run_ok("postprocess", "-i", predictions, "-o", tmp_path / "b", "--rule", rule, "--json").out)
    assert found["changed_voxels"] == {"a.nii.gz": 19, "b.nii.gz": 19}


def test_nothing_of_somebody_else_is_replaced_unasked(predictions, tmp_path) -> None:
    rule = write_rule(tmp_path / "rule.json")
    words = ("postprocess", "-i", predictions, "--rule", rule, "-o")
    assert "overwrite an input" in run_error(*words, predictions, "--overwrite")
    other = write_labels(tmp_path / "out" / "a.nii.gz")
    before = other.read_bytes()
    sentence = run_error(*words, tmp_path / "out")
    assert "--overwrite" in sentence
    assert "--continue" not in sentence  # that is rfmed_predict's
    assert other.read_bytes() == before
    run_ok(*words, tmp_path / "out", "--overwrite")
    assert counts(other) == [0, 20]


def test_rules_and_label_maps_of_another_dataset_are_refused(predictions, tmp_path) -> None:
    words = ("postprocess", "-i", predictions, "-o", tmp_path / "out", "--rule")
    few = write_rule(tmp_path / "few.json", labels={"background": 0, "liver": 1})
    assert "a: it holds values that the rule's labels do not name (2)" in run_error(*words, few)
    (predictions / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"})
    )
    swapped = write_rule(tmp_path / "swapped.json", labels={"background": 0, "liver": 2, "spleen": 1})
    sentence = run_error(*words, swapped)
    assert "a postprocessing rule of another dataset" in sentence
    assert "Expected liver 1, spleen 2. Found liver 2, spleen 1" in sentence
    assert not (tmp_path / "out").exists()
    wrong = write_rule(tmp_path / "wrong.json", steps=[{"action": "keep_largest", "of": "kidney"}])
    assert "kidney" in run_error(*words, wrong)
    assert "does not exist" in run_error(*words, tmp_path / "none.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no label maps" in run_error("postprocess", "-i", empty, "-o", tmp_path / "o", "--rule", few)


def test_a_smallest_volume_without_end_is_refused(predictions, tmp_path) -> None:
    rule = write_rule(tmp_path / "rule.json", steps=[{"action": "drop_small", "smallest_ml": 1e999}])
    told = run_error("postprocess", "-i", predictions, "-o", tmp_path / "out", "--rule", rule)
    assert "smallest_ml" in told
    assert not (tmp_path / "out").exists()


def test_the_record_of_predictions_goes_along(tmp_path) -> None:
    folder = tmp_path / NAME / "rfmed__3d_fullres"
    for fold in ("0", "1"):
        write_model(folder, make_plan(), fold=fold)
    write_image(tmp_path / "images" / "a_0000.nii.gz")
    run_ok("predict", "-i", tmp_path / "images", "-o", tmp_path / "in", "-m", folder)
    rule = write_rule(tmp_path / "rule.json", steps=[{"action": "drop_small", "smallest_ml": 1000}])
    words = ("postprocess", "-i", tmp_path / "in", "-o", tmp_path / "out", "--rule", rule)
    run_ok(*words)
    before, after = (json.loads((tmp_path / d / "predictions.json").read_text()) for d in ("in", "out"))
    assert len(after["options"]["postprocessing"]) == 64
    assert after["made_by"] != before["made_by"]
    assert after["cases"]["a"]["sha256"] != before["cases"]["a"]["sha256"]
    run_ok(*words)  # its own files are replaced
    (tmp_path / "out" / "a.nii.gz").write_bytes((tmp_path / "in" / "a.nii.gz").read_bytes())
    assert "changed" in run_error(*words)


@pytest.fixture(scope="module")
def model_and_images(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("ruled")
    folder = root / NAME / "rfmed__3d_fullres"
    for fold in ("0", "1"):
        write_model(folder, make_plan(), fold=fold)
    for seed in (0, 1):
        write_image(root / "images" / f"case{seed}_0000.nii.gz", seed)
    return folder, root / "images"


@pytest.fixture
def ruled(model_and_images, tmp_path) -> Path:
    folder = tmp_path / "results" / NAME / "rfmed__3d_fullres"
    shutil.copytree(model_and_images[0], folder)
    write_rule(
        folder / "postprocessing.json", steps=[{"action": "keep_largest"}, {"action": "keep_largest", "of": "liver"}]
    )
    return folder


def test_a_model_applies_its_rule_and_says_so(model_and_images, ruled, tmp_path) -> None:
    plain, images = model_and_images
    run_ok("predict", "-i", images, "-o", tmp_path / "plain", "-m", plain)
    run_ok("predict", "-i", images, "-o", tmp_path / "without", "-m", ruled, "--no-postprocessing")
    run_ok("predict", "-i", images, "-o", tmp_path / "ruled", "-m", ruled)
    rule = ruled / "postprocessing.json"
    run_ok("postprocess", "-i", tmp_path / "plain", "-o", tmp_path / "later", "--rule", rule)
    records = {
        name: json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("plain", "without", "ruled")
    }
    assert records["plain"]["made_by"] == records["without"]["made_by"] != records["ruled"]["made_by"]
    assert "postprocessing" not in records["plain"]["options"]
    assert len(records["ruled"]["options"]["postprocessing"]) == 64
    assert set(records["ruled"]["cases"]["case0"]["seconds"]) >= {"network", "postprocess"}
    changed = 0
    for name in ("case0.nii.gz", "case1.nii.gz"):
        maps = {
            folder: np.asarray(nib.load(tmp_path / folder / name).dataobj)
            for folder in ("plain", "without", "ruled", "later")
        }
        np.testing.assert_array_equal(maps["plain"], maps["without"])
        np.testing.assert_array_equal(maps["ruled"], maps["later"])
        changed += int((maps["ruled"] != maps["plain"]).sum())
        image = nib.load(images / name.replace(".nii", "_0000.nii"))
        predictor = Predictor.load(ruled, device="cpu")
        np.testing.assert_array_equal(predictor.predict_nibabel(image).get_fdata(), maps["ruled"])
        assert Predictor.load(ruled, device="cpu", postprocessing=False).rule is None
    assert changed


def test_continuing_does_not_mix_rules(model_and_images, ruled, tmp_path) -> None:
    words = ("predict", "-i", model_and_images[1], "-o", tmp_path / "out", "-m", ruled, "--continue")
    run_ok(*words, "--no-postprocessing")
    assert "Predicted 2 case(s)" in run_ok(*words).out
    assert "Predicted 0 case(s)" in run_ok(*words).out
    write_rule(ruled / "postprocessing.json", steps=[{"action": "fill_holes"}])
    assert "Predicted 2 case(s)" in run_ok(*words).out


def test_an_archive_carries_the_rule(ruled, tmp_path, caplog) -> None:
    archive, root = tmp_path / "model.zip", tmp_path / "other"
    run_ok("export_model", "-m", ruled, "-o", archive)
    run_ok("import_model", archive, "--root", root)
    there = root / "results" / NAME / "rfmed__3d_fullres" / "postprocessing.json"
    assert there.read_bytes() == (ruled / "postprocessing.json").read_bytes()
    run_ok("export_model", "-m", ruled, "-o", tmp_path / "n", "--to", "nnunet")
    assert "rfmed_postprocess --rule" in caplog.text


def test_a_model_with_a_rule_of_another_dataset_is_refused_unless_it_is_left_out(
    model_and_images, ruled, tmp_path
) -> None:
    write_rule(ruled / "postprocessing.json", labels={"background": 0, "liver": 1, "kidney": 2}, steps=[])
    words = ("predict", "-i", model_and_images[1], "-o", tmp_path / "out", "-m", ruled)
    assert "a postprocessing rule of another dataset" in run_error(*words)
    assert "a postprocessing rule of another dataset" in run_error(
        "export_model", "-m", ruled, "-o", tmp_path / "m.zip"
    )
    (ruled / "postprocessing.json").write_text("{")
    assert "is not valid JSON" in run_error(*words)
    run_ok(*words, "--no-postprocessing")
