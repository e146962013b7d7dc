"""The commands as a user meets them, from the raw folder to the report, on a small phantom."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support.commands import PLANNING, TINY, run, run_error, run_ok, unfinished_files

from rfmedsam2.errors import UsageError
from rfmedsam2.pipeline.prediction.checkpoints import checkpoint_of

PHANTOM = "Dataset900_PhantomCT"
COMMANDS = {
    "pipeline": ("verify", "plan_and_preprocess", "train", "predict", "evaluate", "report"),
    "plans": ("summary",),
    "data_and_models": ("make_phantom", "convert", "submit", "export_model", "import_model", "doctor"),
}
HEAVY = {"torch", "numba", "pandas", "scipy", "nibabel", "SimpleITK", "matplotlib"}
SHORT = ("--epochs", 1, "--iterations", 2)


def images_of(root: Path) -> Path:
    return root / "raw" / PHANTOM / "imagesTs"


def labels_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


def test_a_phantom_is_made_and_never_overwritten_unasked(tmp_path):
    words = ("--cases", 1, "--test-cases", 0, "--shape", 8, 16, 16, "-o", tmp_path)
    assert str(tmp_path / PHANTOM) in run_ok("make_phantom", *words).out
    before = (tmp_path / PHANTOM / "imagesTr" / "phantom_001_0000.nii.gz").read_bytes()
    sentence = run_error("make_phantom", *words)
    assert str(tmp_path / PHANTOM) in sentence
    assert "--force" in sentence
    assert (tmp_path / PHANTOM / "imagesTr" / "phantom_001_0000.nii.gz").read_bytes() == before
    run_ok("make_phantom", *words, "--force", "--seed", 1)
    assert (tmp_path / PHANTOM / "imagesTr" / "phantom_001_0000.nii.gz").read_bytes() != before


def test_verify_counts_cases_and_files(raw_root):
    done = run_ok("verify", "--root", raw_root)
    assert f"{PHANTOM}: 7 cases, 12 files read" in done.out
    assert "0 error(s), 0 warning(s)" in done.out
    assert f"Data: {raw_root} (--root)" in done.err


def test_verify_as_json_is_json_alone(raw_root):
    found = json.loads(run_ok("verify", "--json", "--root", raw_root).out)
    assert (found["cases"], found["files"], found["faults"]) == (7, 12, [])


def test_planning_writes_plan_splits_and_cases(planned_root):
    folder = planned_root / "preprocessed" / PHANTOM
    plan = json.loads((folder / "rfmed_cpu.json").read_text())
    assert plan["stages"]["3d_fullres"]["patch_size"] == [16, 32, 32]
    assert len(json.loads((folder / "splits_final.json").read_text())) == 5
    for stage in ("3d_fullres", "2d"):
        assert len(list((folder / f"rfmed_cpu_{stage}").glob("phantom_*.json"))) == 5


def test_a_second_run_skips_what_is_finished(planned_root, root_of):
    root = root_of(planned_root)
    words = ("--preset", "cpu", "-c", "3d_fullres", "2d", "--set", *TINY, "--root", root)
    # the copy has new file times, but the same contents
    run_ok("plan_and_preprocess", *words)
    before = {p: p.stat().st_mtime_ns for p in (root / "preprocessed").rglob("*.b2nd")}
    done = run_ok("plan_and_preprocess", *words)
    assert "0 new, 0 rebuilt, 10 finished before" in done.out
    assert "5 fold(s)" in done.out
    assert {p: p.stat().st_mtime_ns for p in (root / "preprocessed").rglob("*.b2nd")} == before


def test_an_edited_plan_is_kept_when_planned_anew(raw_root, root_of):
    root = root_of(raw_root)
    words = ("-d", 900, "--preset", "cpu", "--no-preprocess", "--root", root)
    run_ok("plan_and_preprocess", *words)
    path = next((root / "preprocessed").rglob("rfmed_cpu.json"))
    edited = [re.sub(r'"epochs": \d+', f'"epochs": {epochs}', path.read_text()) for epochs in (30, 40)]
    for content in edited:
        path.write_text(content)
        assert "it is kept as rfmed_cpu.json.older" in run_ok("plan_and_preprocess", *words).out
    assert [path.with_name(f"{path.name}.older{number}").read_text() for number in (1, 2)] == edited
    assert "kept as" not in run_ok("plan_and_preprocess", *words).out


@pytest.mark.parametrize(("old", "stage", "new"), [("a", "b_3d_fullres", "a_b"), ("a_b", "3d_fullres", "a")])
def test_two_plans_never_share_a_folder(raw_root, root_of, tmp_path, old, stage, new):
    """The cases of `a` with `b_3d_fullres` and of `a_b` with `3d_fullres` would lie in `a_b_3d_fullres`."""
    root = root_of(raw_root)
    words = ("plan_and_preprocess", "--no-preprocess", "--root", root)
    run_ok(*words, "--preset", "cpu", "-p", old)
    path = root / "preprocessed" / PHANTOM / f"{old}.json"
    content = path.read_text()
    path.write_text(content.replace('"3d_fullres": {', f'"{stage}": {{'))
    other = "3d_fullres" if new == "a_b" else "b_3d_fullres"
    (tmp_path / "new.json").write_text(content.replace('"3d_fullres": {', f'"{other}": {{'))
    told = run(*words, "--published", tmp_path / "new.json", "-p", new)
    assert told.code == 2
    assert "Two plans would have one folder for their cases or models" in told.err
    assert f"{PHANTOM}/a_b_3d_fullres. Found {new} with {other}, {old} with {stage}. Choose another plan" in told.err
    assert not path.with_name(f"{new}.json").exists()
    run_ok(*words, "--published", tmp_path / "new.json", "-p", "c")
    run_ok(*words, "--preset", "cpu", "-p", old)


@pytest.mark.parametrize("name", [".partial-uxgfl6jn-rfmed_cpu.json", "rfmed_cpu (2).json", "rfmed__cpu.json"])
def test_a_plan_that_is_just_written_and_a_persons_copy_disturb_nothing(planned_root, root_of, name):
    root = root_of(planned_root)
    plan = root / "preprocessed" / PHANTOM / "rfmed_cpu.json"
    whole = plan.read_text()
    for fold, content in enumerate((whole, whole[:100])):
        plan.with_name(name).write_text(content)
        run_ok("plan_and_preprocess", *PLANNING, "-p", f"new{fold}", "--root", root)
        shutil.rmtree(root / "preprocessed" / PHANTOM / "rfmed_cpu_3d_fullres")
        plan.with_name(f"new{fold}.json").unlink()
        run_ok("plan_and_preprocess", *PLANNING, "--root", root)
        run_ok("train", "3d_fullres", fold, "--epochs", 1, "--iterations", 1, "--no-validate", "--root", root)


def test_planning_alone_preprocesses_nothing(raw_root, root_of):
    root = root_of(raw_root)
    done = run_ok(
        "plan_and_preprocess", "-d", 900, "--preset", "nnunet", "-p", "mine", "--no-preprocess", "--root", root
    )
    assert "Plan mine" in done.out
    assert sorted(p.name for p in (root / "preprocessed" / PHANTOM).iterdir()) == [
        "dataset.json",
        "mine.json",
        "rfmed_fingerprint.json",
        "splits_final.json",
    ]


def test_training_leaves_checkpoints_metrics_scores_and_report(trained_root):
    folder = trained_root / "results" / PHANTOM / "rfmed_cpu__3d_fullres" / "fold_0"
    names = {path.name for path in folder.iterdir()}
    assert names >= {f"checkpoint_{which}.safetensors" for which in ("final", "best", "latest")}
    assert names >= {"metrics.jsonl", "metrics.csv", "progress.png", "report.html", "validation"}
    assert (folder / "validation" / "metrics.json").is_file()
    assert unfinished_files(trained_root) == []


def test_a_finished_training_says_so_and_changes_nothing(trained_root, root_of):
    root = root_of(trained_root)
    final = root / "results" / PHANTOM / "rfmed_cpu__3d_fullres" / "fold_0" / "checkpoint_final.safetensors"
    before = final.read_bytes()
    done = run_ok("train", "3d_fullres", "fold", 0, *SHORT, "--root", root)
    assert "Already trained for 2 steps" in done.out
    assert "--restart" in done.out
    assert final.read_bytes() == before


def test_restart_keeps_the_old_training_aside(trained_root, root_of):
    root = root_of(trained_root)
    done = run_ok(
        "train", "3d_fullres", 0, "--epochs", 1, "--iterations", 1, "--restart", "--no-validate", "--root", root
    )
    assert "Trained 1 steps" in done.out
    model = root / "results" / PHANTOM / "rfmed_cpu__3d_fullres"
    old = [p for p in model.iterdir() if p.name.startswith("before-")]
    assert len(old) == 1
    assert (old[0] / "checkpoint_final.safetensors").is_file()
    # what was moved aside is no fold that predicting would average
    assert "fold(s) 0," in run_ok("predict", "-i", images_of(root), "-o", root / "preds", "--root", root).err


def test_predicting_takes_the_only_model_and_says_which(trained_root, tmp_path):
    done = run_ok("predict", "-i", images_of(trained_root), "-o", tmp_path / "preds", "--root", trained_root)
    assert f"Model: {trained_root / 'results' / PHANTOM / 'rfmed_cpu__3d_fullres'}, fold(s) 0" in done.err
    assert "Predicted 2 case(s)" in done.out
    made = labels_in(tmp_path / "preds")
    assert set(made) == {"phantom_006.nii.gz", "phantom_007.nii.gz"}
    for name, labels in made.items():
        image = nib.load(images_of(trained_root) / name.replace(".nii.gz", "_0000.nii.gz"))
        assert labels.shape == image.shape
        assert set(np.unique(labels)) <= set(range(14))
    sidecar = json.loads((tmp_path / "preds" / "predictions.json").read_text())
    assert sidecar["labels"]["liver"] == 6


def test_evaluating_needs_to_be_told_nothing_but_the_folders(trained_root, tmp_path):
    run_ok("predict", "-i", images_of(trained_root), "-o", tmp_path / "preds", "--root", trained_root)
    # no dataset.json anywhere near: the predictions say what their labels mean
    shutil.copytree(images_of(trained_root).with_name("labelsTs"), tmp_path / "alone" / "labels")
    run_ok("evaluate", "-p", tmp_path / "preds", "-g", tmp_path / "alone" / "labels", "-o", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(scores["classes"]) >= {"liver", "spleen"}
    assert (tmp_path / "out" / "metrics.csv").is_file()


def test_a_label_table_of_nnunet_v1_is_named_for_what_it_is(raw_root, tmp_path):
    labels = raw_root / "raw" / "Dataset900_PhantomCT" / "labelsTr"
    table = tmp_path / "dataset.json"
    table.write_text(json.dumps({"modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}}))
    told = run_error("evaluate", "-p", labels, "-g", labels, "-o", tmp_path / "out", "--labels", table)
    assert "in the format of nnU-Net v1" in told
    assert "names by value, the other way round" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["-p", "-g", "--labels"])
def test_a_pipe_is_no_label_map_and_no_label_table(flag, raw_root, tmp_path):
    labels = raw_root / "raw" / "Dataset900_PhantomCT" / "labelsTr"
    pipe = tmp_path / "pipe.nii.gz"
    os.mkfifo(pipe)
    given = {"-p": labels, "-g": labels} | {flag: pipe}
    told = run_error("evaluate", *[word for pair in given.items() for word in pair], "-o", tmp_path / "out")
    assert "it is a pipe, a socket or a device, not an ordinary file" in told
    assert str(pipe) in told


def test_a_pipe_is_no_model(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for words in (
        ("export_model", "-m", pipe, "-o", tmp_path / "a.zip"),
        ("predict", "-m", pipe, "-i", pipe, "-o", "x"),
    ):
        told = run_error(*words)
        assert "The model cannot be read (it is a pipe, a socket or a device, not an ordinary file)" in told
        assert str(pipe) in told
    with pytest.raises(UsageError, match="it is a pipe, a socket or a device"):
        checkpoint_of(pipe)  # of rfmed_train --weights


def test_continue_keeps_and_json_tells(trained_root, tmp_path):
    words = ("-i", images_of(trained_root), "-o", tmp_path / "preds", "--root", trained_root, "--json")
    first = json.loads(run_ok("predict", *words).out)
    assert [Path(p).name for p in first["written"]] == ["phantom_006.nii.gz", "phantom_007.nii.gz"]
    (tmp_path / "preds" / "phantom_007.nii.gz").unlink()
    second = json.loads(run_ok("predict", *words, "--continue").out)
    assert [Path(p).name for p in second["kept"]] == ["phantom_006.nii.gz"]
    assert [Path(p).name for p in second["written"]] == ["phantom_007.nii.gz"]


def test_single_files_and_options_of_predicting(trained_root, tmp_path):
    image = images_of(trained_root) / "phantom_006_0000.nii.gz"
    words = ("--step-size", 1.0, "--mirror", "on", "--tile-batch", 2, "--skip-empty", "--probabilities")
    run_ok("predict", "-i", image, "-o", tmp_path, "--root", trained_root, "--checkpoint", "best", *words)
    assert {p.name for p in tmp_path.iterdir()} == {
        "phantom_006.nii.gz",
        "phantom_006.probabilities.b2nd",
        "predictions.json",
    }


def test_several_models_are_listed_and_one_can_be_named(trained_root, root_of, tmp_path):
    root = root_of(trained_root)
    done = run_ok("train", "PhantomCT", "2d", 1, *SHORT, "--root", root)
    assert "fold 1" in done.err
    words = ("-i", images_of(root), "-o", tmp_path / "preds", "--root", root)
    sentence = run_error("predict", *words)
    assert "-c 2d (folds 1)" in sentence
    assert "-c 3d_fullres (folds 0)" in sentence
    assert not (tmp_path / "preds").exists()
    assert "rfmed_cpu__2d, fold(s) 1" in run_ok("predict", *words, "-c", "2d").err
    model = root / "results" / PHANTOM / "rfmed_cpu__3d_fullres"
    assert f"{model}, fold(s) 0" in run_ok("predict", *words, "-m", model).err


def test_evaluate_and_report(trained_root, tmp_path):
    preds = tmp_path / "preds"
    run_ok("predict", "-i", images_of(trained_root), "-o", preds, "--root", trained_root)
    labels = trained_root / "raw" / PHANTOM / "labelsTs"
    done = run_ok("evaluate", "-p", preds, "-g", labels, "-o", tmp_path / "scores")
    assert "2 case(s), NSD at 2 mm" in done.out
    assert {p.name for p in (tmp_path / "scores").iterdir()} == {"metrics.json", "metrics.csv"}
    same = run_ok("evaluate", "-p", labels, "-g", labels, "-o", tmp_path / "same", "--tolerance", 1, "--json")
    assert json.loads(same.out)["mean"]["dsc"]["mean"] == 1.0
    fold = trained_root / "results" / PHANTOM / "rfmed_cpu__3d_fullres" / "fold_0"
    metrics = tmp_path / "scores" / "metrics.json"
    run_ok("report", "-o", tmp_path / "page.html", "-t", fold, "-e", metrics, "-i", images_of(trained_root))
    page = (tmp_path / "page.html").read_text()
    assert "liver" in page
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_model_goes_to_another_root_and_predicts_the_same(trained_root, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    run_ok("predict", "-i", images_of(trained_root), "-o", here, "--root", trained_root)
    run_ok("export_model", "-o", tmp_path / "model.zip", "--root", trained_root)
    other = tmp_path / "other"
    done = run_ok("import_model", tmp_path / "model.zip", "--root", other)
    assert f"Imported: {other / 'results' / PHANTOM / 'rfmed_cpu__3d_fullres'} (fold(s) 0)" in done.out
    assert "--force" in run_error("import_model", tmp_path / "model.zip", "--root", other)
    run_ok("import_model", tmp_path / "model.zip", "--root", other, "--force")
    run_ok("predict", "-i", images_of(trained_root), "-o", there, "-d", "PhantomCT", "--root", other)
    ours, theirs = labels_in(here), labels_in(there)
    assert ours.keys() == theirs.keys()
    for name, labels in ours.items():
        np.testing.assert_array_equal(labels, theirs[name])
    assert unfinished_files(other) == []


def test_variables_stand_in_for_flags(trained_root, tmp_path):
    images = images_of(trained_root)
    ours = {"RFMED_ROOT": trained_root, "RFMED_DATASET": "900"}
    assert "(RFMED_ROOT)" in run_ok("predict", "-i", images, "-o", tmp_path / "a", environment=ours).err
    assert "The dataset does not exist: 4" in run_error(
        "predict", "-i", images, "-o", tmp_path / "b", environment=ours | {"RFMED_DATASET": "4"}
    )
    nnunet = {f"nnUNet_{part}": trained_root / part for part in ("raw", "preprocessed", "results")}
    assert "nnU-Net's variables" in run_ok("predict", "-i", images, "-o", tmp_path / "c", environment=nnunet).err
    assert "7 cases" in run_ok("verify", environment=nnunet).out


def test_without_any_root_it_is_the_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--cases", 1, "--test-cases", 0, "--shape", 8, 16, 16)
    assert "./rfmed_data" in run_ok("make_phantom", *words).err
    assert (tmp_path / "rfmed_data" / "raw" / PHANTOM).is_dir()


def test_an_incomplete_submission_is_refused(raw_root, tmp_path):
    labels = raw_root / "raw" / PHANTOM / "labelsTr"
    words = ("amos22", "-i", labels, "--images", images_of(raw_root), "-o", tmp_path / "amos.zip")
    assert "phantom_006" in run("submit", *words).out
    run_error("submit", *words)
    as_json = run("submit", *words, "--json")
    assert (as_json.code, bool(json.loads(as_json.out)["faults"])) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_amos22_predictions_become_a_zip(raw_root, tmp_path):
    for number in (6, 7):
        for kind, suffix in (("images", "_0000"), ("labels", "")):
            (tmp_path / kind).mkdir(exist_ok=True)
            source = raw_root / "raw" / PHANTOM / f"{kind}Ts" / f"phantom_{number:03d}{suffix}.nii.gz"
            shutil.copy(source, tmp_path / kind / f"amos_{number:04d}{suffix}.nii.gz")
    words = ("amos22", "-i", tmp_path / "labels", "--images", tmp_path / "images", "-o", tmp_path / "amos.zip")
    assert "(2 cases)" in run_ok("submit", *words).out
    assert (tmp_path / "amos.zip").is_file()


def test_an_msd_task_is_converted_and_verified(raw_root, tmp_path):
    task, raw = tmp_path / "Task07_Small", raw_root / "raw" / PHANTOM
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (task / folder).mkdir(parents=True)
    names = ("phantom_001", "phantom_002")
    for name in names:
        shutil.copy(raw / "imagesTr" / f"{name}_0000.nii.gz", task / "imagesTr" / f"{name}.nii.gz")
        shutil.copy(raw / "labelsTr" / f"{name}.nii.gz", task / "labelsTr" / f"{name}.nii.gz")
    declared = {
        "name": "Small",
        "modality": {"0": "CT"},
        "labels": {str(n): f"organ {n}" if n else "background" for n in range(14)},
        "numTraining": 2,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [],
    }
    (task / "dataset.json").write_text(json.dumps(declared))
    done = run_ok("convert", "msd", "-i", task, "--root", tmp_path / "root")
    assert "Dataset007_Small (2 training, 0 test cases)" in done.out
    assert "2 cases, 4 files" in run_ok("verify", "-d", 7, "--root", tmp_path / "root").out
    assert "--force" in run_error("convert", "msd", "-i", task, "--root", tmp_path / "root")


def test_the_doctor_tells_versions_and_folders(tmp_path):
    found = json.loads(run_ok("doctor", "--root", tmp_path, "--json").out)
    assert found["packages"]["torch"]
    assert "This machine" in run_ok("doctor", "--root", tmp_path).out


def test_installed_commands_give_exit_codes(raw_root, tmp_path):
    """One command through its own process: codes, streams and that a pipe reads results alone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RFMED", "nnUNet"))}
    code = "from rfmedsam2.cli.pipeline import verify_command; verify_command()"

    def shell(*words):
        command = [sys.executable, "-c", code, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)

    fine = shell("--root", raw_root, "--json")
    assert (fine.returncode, json.loads(fine.stdout)["cases"]) == (0, 7)
    wrong = shell("--root", tmp_path / "nowhere")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert "rfmed_verify: No raw dataset was found" in wrong.stderr
    assert wrong.stdout == ""


def test_warnings_are_sentences_and_tables_are_not_needed(raw_root, tmp_path):
    """In a process of its own: pytest listens to all logs, so that commands do not set theirs up."""
    labels = next((raw_root / "raw").iterdir()) / "labelsTr"
    shutil.copytree(labels, tmp_path / "refs")
    shutil.copytree(labels, tmp_path / "preds")
    code = "from rfmedsam2.cli.pipeline import evaluate_command; evaluate_command()"
    words = ["-p", tmp_path / "preds", "-g", tmp_path / "refs", "-o", tmp_path / "out", "--root", tmp_path]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RFMED", "nnUNet"))}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    warning = "Warning: No table names the label values: every value is scored under its number."
    assert done.stderr.splitlines().count(warning) == 1
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(found["classes"]) == [str(value) for value in range(1, 14)]
    assert {scores["dsc"]["mean"] for scores in found["classes"].values()} == {1.0}


@pytest.fixture(scope="module")
def special_root(tmp_path_factory) -> Path:
    """Small cubes: 77 has nested regions, 78 an ignore label; both planned for cpu."""
    root = tmp_path_factory.mktemp("special")
    labels = {"Dataset077_Regions": {"background": 0, "whole": [1, 2], "core": 2}}
    labels["Dataset078_Ignore"] = {"background": 0, "organ": 1, "ignore": 2}
    rng = np.random.default_rng(0)
    for name, declared in labels.items():
        folder = root / "raw" / name
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        for number in range(5):
            label = np.zeros((24, 24, 16), np.uint8)
            label[6:16, 6:16, 4:12] = 1
            label[8:12, 8:12, 6:10] = 2
            image = (rng.normal(size=label.shape) + 3 * label).astype(np.float32)
            nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"c{number}_0000.nii.gz")
            nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / f"c{number}.nii.gz")
        described = {"channel_names": {"0": "MR"}, "labels": declared, "numTraining": 5, "file_ending": ".nii.gz"}
        if "Regions" in name:
            described["regions_class_order"] = [1, 2]
        (folder / "dataset.json").write_text(json.dumps(described))
        changes = ("features=[4,8,8]", "encoder_blocks=[1,1,1]", "decoder_blocks=[1,1]")
        changes += ("kernel_sizes=[[3,3,3],[3,3,3],[3,3,3]]", "strides=[[1,1,1],[2,2,2],[2,2,2]]")
        model = json.dumps({part.split("=")[0]: json.loads(part.split("=")[1]) for part in changes} | {"kind": "unet"})
        words = (f"3d_fullres.model={model}", "3d_fullres.patch_size=[16,16,16]", "3d_fullres.train.workers=0")
        words += ("3d_fullres.validation.patches_while_training=2",)
        run_ok("plan_and_preprocess", "-d", name, "--preset", "cpu", "--set", *words, "--root", root)
    return root


def test_a_fold_of_all_cases_says_that_it_is_scored_on_them(special_root):
    outcome = run_ok("train", 77, "3d_fullres", "all", *SHORT, "--root", special_root)
    sentence = "The model was trained on 5 of these 5 cases: scores of training cases"
    assert sentence in outcome.out
    fold = special_root / "results" / "Dataset077_Regions" / "rfmed_cpu__3d_fullres" / "fold_all"
    metrics = json.loads((fold / "validation" / "metrics.json").read_text())
    assert metrics["trained_on"] == [f"c{number}" for number in range(5)]
    assert (fold / "report.html").read_text().count(sentence) == 1


def test_unlabeled_voxels_are_counted_as_nnunet_does_or_left_out(special_root, tmp_path):
    """Image values are about 3 times the label; with value 2 ignored, only those around 3 are labeled foreground."""
    root = tmp_path / "root"
    shutil.copytree(special_root / "raw" / "Dataset078_Ignore", root / "raw" / "Dataset078_Ignore")
    described = root / "raw" / "Dataset078_Ignore" / "dataset.json"
    described.write_text(described.read_text().replace('"MR"', '"CT"'))
    words = ("plan_and_preprocess", "--preset", "cpu", "--no-preprocess", "--root", root)
    note = "320 voxels of 5 case(s) have the ignore label 2. As in nnU-Net, they count as foreground"
    assert note in run_ok(*words).out

    def statistics() -> dict[str, float]:
        folder = root / "preprocessed" / "Dataset078_Ignore"
        found = json.loads((folder / "rfmed_fingerprint.json").read_text())["intensities"][0]
        assert json.loads((folder / "rfmed_cpu.json").read_text())["intensities"][0] == found
        return found

    counted = statistics()
    assert counted["mean"] == pytest.approx(3 * (736 * 1 + 64 * 2) / 800, abs=0.05)
    outcome = run_ok(*words, "--skip-unlabeled")
    assert "ignore label" not in outcome.out
    left_out = statistics()
    assert left_out["mean"] == pytest.approx(3, abs=0.05)
    assert left_out["max"] < counted["max"]
    run_ok(*words)  # and back: the fingerprint on disk is not taken for the other kind
    assert statistics() == counted
    regions = (*words[:-1], special_root, "-d", 77, "--skip-unlabeled")
    assert "declares no ignore label" in run_error(*regions)


@pytest.mark.parametrize(
    ("dataset", "classes", "values"), [(77, ["whole", "core"], {0, 1, 2}), (78, ["organ"], {0, 1})]
)
def test_regions_and_ignored_voxels_train_predict_and_score(special_root, tmp_path, dataset, classes, values):
    run_ok("train", dataset, "3d_fullres", 0, *SHORT, "--root", special_root)
    name = next(p.name for p in (special_root / "raw").iterdir() if p.name.startswith(f"Dataset{dataset:03d}"))
    metrics = special_root / "results" / name / "rfmed_cpu__3d_fullres" / "fold_0" / "validation" / "metrics.json"
    assert list(json.loads(metrics.read_text())["classes"]) == classes
    images = special_root / "raw" / name / "imagesTr" / "c0_0000.nii.gz"
    run_ok("predict", "-d", dataset, "-i", images, "-o", tmp_path, "--root", special_root)
    assert set(np.unique(labels_in(tmp_path)["c0.nii.gz"])) <= values
