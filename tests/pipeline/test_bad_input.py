"""Bad input: every command answers with a sentence that names the place, exit code 2, and leaves nothing half."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support.commands import TINY, run, run_error, run_ok, unfinished_files

from rfmedsam2.errors import CheckpointError
from rfmedsam2.store import images
from rfmedsam2.store.checkpoint_header import read_header, read_record_of
from segment_anything_hq.records import RefinerRecord

PHANTOM = "Dataset900_PhantomCT"
PLANNING = ("--preset", "cpu", "-c", "3d_fullres", "--set", *TINY)
SHORT = ("--epochs", 1, "--iterations", 2)


def raw_of(root: Path) -> Path:
    return root / "raw" / PHANTOM


def fold_of(root: Path) -> Path:
    return root / "results" / PHANTOM / "rfmed_cpu__3d_fullres" / "fold_0"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: to see that nothing was written."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else (0, 0)
        for p in folder.rglob("*")
    }


# ---------------------------------------------------------------- raw data


def no_cases(raw: Path) -> str:
    for path in (raw / "imagesTr").iterdir():
        path.unlink()
    return "imagesTr"


def other_suffixes(raw: Path) -> str:
    for path in (raw / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", ".mha")))
    return "imagesTr"


def corrupt_gzip(raw: Path) -> str:
    path = raw / "imagesTr" / "phantom_002_0000.nii.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    return "phantom_002"


def truncated(raw: Path) -> str:
    path = raw / "labelsTr" / "phantom_003.nii.gz"
    path.write_bytes(path.read_bytes()[:300])
    return "phantom_003"


def not_an_image(raw: Path) -> str:
    (raw / "imagesTr" / "phantom_001_0000.nii.gz").write_text("this is no image")
    return "phantom_001"


def empty_file(raw: Path) -> str:
    (raw / "imagesTr" / "phantom_001_0000.nii.gz").write_bytes(b"")
    return "phantom_001"


def nan_voxels(raw: Path) -> str:
    path = raw / "imagesTr" / "phantom_004_0000.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj).astype(np.float32)
    array[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), path)
    return "phantom_004"


def undeclared_label(raw: Path) -> str:
    path = raw / "labelsTr" / "phantom_005.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[3, 3, 3] = 77
    nib.save(nib.Nifti1Image(array, image.affine), path)
    return "77"


def negative_spacing(raw: Path) -> str:
    path = raw / "imagesTr" / "phantom_002_0000.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(bytes(content[:348])))
    pixdim = header["pixdim"].copy()
    pixdim[1:4] = (-1.5, 0.0, float("nan"))
    content[76 : 76 + 32] = pixdim.tobytes()
    content[252:256] = np.array([1, 0], "<i2").tobytes()  # qform only: spacing comes from pixdim
    path.write_bytes(gzip.compress(bytes(content)))
    return "phantom_002"


def another_shape(raw: Path) -> str:
    shutil.copy(raw / "labelsTr" / "phantom_001.nii.gz", raw / "labelsTr" / "phantom_002.nii.gz")
    return "phantom_002"


def missing_label(raw: Path) -> str:
    (raw / "labelsTr" / "phantom_003.nii.gz").unlink()
    return "phantom_003"


def folder_for_a_file(raw: Path) -> str:
    path = raw / "labelsTr" / "phantom_003.nii.gz"
    path.unlink()
    path.mkdir()
    return "phantom_003"


def no_dataset_json(raw: Path) -> str:
    (raw / "dataset.json").unlink()
    return "dataset.json"


def torn_dataset_json(raw: Path) -> str:
    path = raw / "dataset.json"
    path.write_text(path.read_text()[:100])
    return "dataset.json"


def impossible_labels(raw: Path) -> str:
    path = raw / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": {"organ": 1}}))
    return "background"


def binary_dataset_json(raw: Path) -> str:
    (raw / "dataset.json").write_bytes(b"\xff\xfe\x00\x00")
    return "dataset.json"


FAULTS = (
    no_cases,
    other_suffixes,
    corrupt_gzip,
    truncated,
    not_an_image,
    empty_file,
    nan_voxels,
    undeclared_label,
    negative_spacing,
    another_shape,
    missing_label,
    folder_for_a_file,
    no_dataset_json,
    torn_dataset_json,
    impossible_labels,
    binary_dataset_json,
)


@pytest.mark.parametrize("damage", FAULTS, ids=lambda f: f.__name__)
def test_faulty_raw_data(raw_root, root_of, damage):
    """Both verifying and planning name the place; planning writes no plan and no case."""
    root = root_of(raw_root)
    named = damage(raw_of(root))
    outcome = run("verify", "--root", root)
    assert outcome.code == 2
    told = (outcome.out + outcome.err).replace("\n", "")
    assert named in told
    assert "Traceback" not in outcome.err
    sentence = run_error("plan_and_preprocess", *PLANNING, "--root", root)
    assert named in sentence
    assert not list((root / "preprocessed").rglob("rfmed*"))
    assert unfinished_files(root) == []


def test_a_file_that_changes_while_it_is_used(raw_root, root_of, monkeypatch):
    root = root_of(raw_root)
    real = images.read_nifti

    def meddling(path):
        found = real(path)
        if "phantom_002" in path.name:
            path.touch()
        return found

    monkeypatch.setattr(images, "read_nifti", meddling)
    outcome = run("verify", "--root", root)
    assert outcome.code == 2
    assert "changed-while-reading" in outcome.out
    sentence = run_error("plan_and_preprocess", *PLANNING, "--root", root)
    assert "phantom_002" in sentence
    assert "has ended, then run the same command again" in sentence
    assert not list(root.rglob("*.b2nd"))


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "rfmed_train 3d_fullres fold 0"),
        (("a", "b", "c", "d"), "a b c d"),
        (("Nothing", "3d_fullres", 0), "Nothing"),
        (("3d_fulres", "fold", 0), "3d_fulres"),
        (("3d_fullres", "fold", 7), "7"),
        (("3d_fullres", "fold", "../../x"), "../../x"),
        (("3d_fullres", "fold", 0, "-p", "nonesuch"), "nonesuch"),
        (("3d_fullres", "fold", 0, "-p", "../../x"), "plan is not a name"),
        (("3d_fullres", "fold", 0, "--device", "tpu"), "tpu"),
        (("3d_fullres", "fold", 0, "--device", "cuda:99"), "cuda:99"),
        (("3d_fullres", "fold", 0, "--epochs", 0), "epochs"),
        (("3d_fullres", "fold", 0, "--lr", -1), "learning_rate"),
        (("3d_fullres", "fold", 0, "--lr", "nan"), "learning_rate"),
        (("3d_fullres", "fold", 0, "--lr", "1e400"), "learning_rate"),
        (("3d_fullres", "fold", 0, "--name", ""), "An argument is empty: after --name"),
        (("3d_fullres", "fold", 0, "--checkpoint", "best"), "Add --validate-only"),
        (("3d_fullres", "fold", 0, "--validate-only"), "Leave out --no-validate, or --validate-only"),
        (("3d_fullres", "fold", 0, "--probabilities"), "Found --probabilities --no-validate"),
        (("3d_fullres", "fold", 0, "--validate-only", "--restart"), "Leave out --restart and --no-validate"),
        (("3d_fullres", "fold", 0, "--weights", "no_such_model"), "The model does not exist: no_such_model"),
        (("3d_fullres", "fold", 0, "--set", "3d_fullres.train.epoch=1"), "Did you mean 'epochs'?"),
        (("3d_fullres", "fold", 0, "--set", "3d_fullres.train.epochs"), "stage.field=value"),
        (("3d_fullres", "fold", 0, "--set", "3d_fullres.patch_size=[16,30,32]"), "stride"),
        (("3d_fullres", "fold", 0, "--set", "3d_fullres.train.seed=-1"), "seed"),
        (("3d_fullres", "fold", 0, "--set", 'labels.names={"background":0,"x":1}'), "rfmed_plan_and_preprocess --set"),
        (("3d_fullres", "fold", 0, "--set", "3d_fullres.spacing_mm=[1,1,1]"), "rfmed_plan_and_preprocess --set"),
    ],
)
def test_wrong_words_of_a_training(planned_root, root_of, words, named):
    root = root_of(planned_root)
    before = tree(root)
    words = (*words, *SHORT) if "--epochs" not in words else words
    sentence = run_error("train", *words, "--no-validate", "--root", root)
    assert named in sentence
    assert tree(root) == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("-d", 4), "4"),
        (("--preset", "cpu", "-c", "4d"), "4d"),
        (("--preset", "cpu", "--set", "3d_fullres.batch=3"), "batch"),
        (("--preset", "cpu", "--spacing", 0, 1, 1), "spacing"),
        (("--preset", "cpu", "--spacing", "nan", 1, 1), "spacing"),
        (("--nnunet-plans", "no_such_plans.json"), "no_such_plans.json"),
        (("--preset", "cpu", "--nnunet-plans", "plans.json"), "but only one of these"),
        (("--preset", "cpu", "--group-regex", "(broken"), "(broken"),
        (("--preset", "cpu", "-p", "../outside"), "outside"),
        (("--preset", "cpu", "-p", "splits_final"), "splits_final"),
        (("--preset", "cpu", "-p", "a__b"), "a__b"),
        (("--preset", "cpu", "-p", "x" * 300), "xxx"),
        (("--preset", "cpu", "--set", "3d_fullres.augmentation.mirror_axes=[5]"), "mirror_axes"),
    ],
)
def test_wrong_words_of_planning(raw_root, root_of, words, named):
    root = root_of(raw_root)
    assert named in run_error("plan_and_preprocess", *words, "--root", root)
    assert not list(root.rglob("*.b2nd"))
    assert not list(root.parent.rglob("outside*"))
    assert unfinished_files(root) == []


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--epochs", "many"),
        ("train", "--no-such-flag"),
        ("plan_and_preprocess", "--preset", "huge"),
        ("predict",),
        ("convert", "kits"),
        ("evaluate", "-p", "here"),
    ],
    ids=str,
)
def test_what_the_parser_refuses_is_exit_code_2_as_well(words):
    outcome = run(*words)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "--help" in outcome.err


@pytest.mark.parametrize(
    "words", [("--seed", -1), ("--cases", 0), ("--shape", 1, 2, 3), ("--shape", 8, 8, 40000)], ids=str
)
def test_impossible_phantoms(tmp_path, words):
    assert str(words[-1]) in run_error("make_phantom", *words, "-o", tmp_path)
    assert list(tmp_path.iterdir()) == []


def predicting(root: Path, out: Path, *words: object) -> tuple[object, ...]:
    return ("predict", "-i", raw_of(root) / "imagesTs", "-o", out, "--root", root, *words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("-f", 3), "3"),
        (("-c", "2d"), "3d_fullres"),
        (("-m", "no_such_model"), "no_such_model"),
        (("-d", "Nothing"), "Nothing"),
        (("--step-size", 0), "step"),
        (("--step-size", "nan"), "step"),
        (("--tile-batch", 0), "tile"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_wrong_words_of_predicting(trained_root, tmp_path, words, named):
    assert named in run_error(*predicting(trained_root, tmp_path / "preds", *words))
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_a_file_of_another_kind_is_named_for_what_it_is(trained_root, tmp_path):
    """Not for its many faults, nor as of a later version: a plan's format is 2, a rule's 1."""
    plan = trained_root / "preprocessed" / PHANTOM / "rfmed_cpu.json"
    model = trained_root / "results" / PHANTOM / "rfmed_cpu__3d_fullres" / "fold_0"
    predictions = model / "validation" / "predictions.json"
    rule = run_error("postprocess", "-i", model / "validation", "-o", tmp_path / "out", "--rule", plan)
    assert f"another file than the postprocessing rule: {plan}. Expected the fields dataset, labels, steps." in rule
    assert "another file than the evaluation" in run_error("compare", predictions, predictions)
    assert "another file than the plan" in run_error("summary", raw_of(trained_root) / "dataset.json")
    assert "does not exist: no/such.json" in run_error("summary", "no/such.json")
    assert "plan file cannot be read" in run_error("summary", model)
    labels, dataset = raw_of(trained_root) / "labelsTs", raw_of(trained_root) / "dataset.json"
    run_ok("evaluate", "-p", labels, "-g", labels, "-o", tmp_path / "scored")
    for other in (plan, tmp_path / "scored" / "metrics.json"):
        names = run_error("evaluate", "-p", labels, "-g", labels, "-o", tmp_path / "scores", "--labels", other)
        assert f"another file than the dataset.json: {other}. Expected the fields channel_names, labels," in names
    for other in (plan, dataset):
        sentence = run_error("plan_and_preprocess", "--root", trained_root, "--nnunet-plans", other)
        assert f"another file than the nnUNetPlans.json: {other}. Expected the fields dataset_name," in sentence
    with pytest.raises(
        CheckpointError, match=r"not a checkpoint of samhq_train: .*Expected the fields method, .* plan"
    ):
        read_header(model / "checkpoint_final.safetensors", RefinerRecord)
    for source in (model, model.parent):
        sentence = run_error("import_model", source, "--root", tmp_path)
        assert "not a model of nnU-Net, but one of this package" in sentence


def test_variables_of_nnunet_that_are_not_all_there_are_named(raw_root):
    outcome = run("verify", environment={"nnUNet_raw": raw_root / "raw"})
    assert outcome.code == 2
    assert "./rfmed_data; nnUNet_raw alone counts not, but all three" in outcome.err


@pytest.mark.parametrize("flag", ["-i", "-o", "--root", "-m"])
def test_an_empty_argument_is_not_the_folder_here(trained_root, tmp_path, monkeypatch, flag):
    """As of a shell variable that is not set: images that lie here were predicted, label maps written here."""
    monkeypatch.chdir(tmp_path)
    words = {"-i": raw_of(trained_root) / "imagesTs", "-o": "out", "--root": trained_root, flag: ""}
    sentence = run_error("predict", *(word for pair in words.items() for word in pair))
    assert f"An argument is empty: after {flag}." in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ("train", "3d_fullres", 0, "--set", "a=1", "--set", "b=2"),
            "--set is given more than once. Found --set --set.",
        ),
        (
            ("predict", "-m", "a", "--model=b", "-i", "x", "-o", "y"),
            "--model is given more than once. Found -m --model=b.",
        ),
        (("predict", "-i", "x", "-i", "y", "-o", "z"), "--input is given more than once"),
        (
            ("predict", "-i", "x", "-o", "z", "--step-size", 0.5, "--step_size", 0.3),
            "--step-size is given more than once",
        ),
        (("verify", "-d", 4, "--dataset", 5), "--dataset is given more than once"),
    ],
)
def test_a_flag_given_twice_is_no_choice_of_the_last(words, named, tmp_path):
    assert named in run_error(*words, "--root", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_predict(trained_root, tmp_path):
    def predict(source):
        return run_error("predict", "-i", source, "-o", tmp_path / "preds", "--root", trained_root)

    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in predict(tmp_path / "empty")
    assert str(tmp_path / "nowhere") in predict(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("\n")
    assert "notes.txt" in predict(tmp_path / "notes.txt")
    (tmp_path / "list.json").write_text('{"a": ')
    assert "list.json" in predict(tmp_path / "list.json")
    (tmp_path / "picture.nii.gz").write_text("no image")
    assert "picture" in predict(tmp_path / "picture.nii.gz")
    assert not list((tmp_path / "preds").glob("*")) if (tmp_path / "preds").exists() else True


def test_a_faulty_case_is_named_and_the_others_are_predicted(trained_root, tmp_path):
    shutil.copytree(raw_of(trained_root) / "imagesTs", tmp_path / "in")
    (tmp_path / "in" / "phantom_006_0000.nii.gz").write_bytes(b"\x1f\x8b broken")
    sentence = run_error("predict", "-i", tmp_path / "in", "-o", tmp_path / "preds", "--root", trained_root)
    assert "1 of 2 cases" in sentence
    assert "phantom_006" in sentence
    assert "--continue" in sentence
    assert {p.name for p in (tmp_path / "preds").iterdir()} == {"phantom_007.nii.gz", "predictions.json"}


def test_wrong_words_of_scoring_and_reporting(raw_root, tmp_path):
    labels = raw_of(raw_root) / "labelsTs"
    (tmp_path / "empty").mkdir()

    def evaluate(predictions, references, *words):
        return run_error("evaluate", "-p", predictions, "-g", references, "-o", tmp_path / "scores", *words)

    assert "empty" in evaluate(tmp_path / "empty", labels)
    assert "nowhere" in evaluate(tmp_path / "nowhere", labels)
    assert "nowhere" in evaluate(labels, tmp_path / "nowhere", "--labels", raw_of(raw_root) / "dataset.json")
    assert "tolerance" in evaluate(labels, labels, "--tolerance", -1)
    assert "tolerance" in evaluate(labels, labels, "--tolerance", "nan")
    assert "no.json" in evaluate(labels, labels, "--labels", tmp_path / "no.json")
    (tmp_path / "preds").mkdir()
    shutil.copy(labels / "phantom_006.nii.gz", tmp_path / "preds" / "phantom_007.nii.gz")
    assert "phantom_007" in evaluate(tmp_path / "preds", labels, "--labels", raw_of(raw_root) / "dataset.json")
    assert not list((tmp_path / "scores").glob("*"))
    page = tmp_path / "page.html"
    assert "no.json" in run_error("report", "-o", page, "-e", tmp_path / "no.json")
    assert "nowhere" in run_error("report", "-o", page, "-t", tmp_path / "nowhere")
    assert "folder of images does not exist" in run_error(
        "report", "-o", page, "-t", tmp_path, "-i", tmp_path / "nowhere"
    )
    assert not page.exists()


def test_a_file_where_a_folder_is_named_is_there(raw_root, tmp_path):
    """It is no folder; it does exist."""
    labels = raw_of(raw_root) / "labelsTs"
    file, out = labels / "phantom_006.nii.gz", tmp_path / "out"
    (tmp_path / "rule.json").write_text('{"dataset": "a", "labels": {"background": 0, "a": 1}, "steps": []}')
    for words in (
        ("report", "-t", tmp_path, "-i", file, "-o", tmp_path / "page.html"),
        ("overlay", "-p", file, "-i", labels, "-o", out),
        ("overlay", "-p", labels, "-i", file, "-o", out),
        ("postprocess", "-i", file, "--rule", tmp_path / "rule.json", "-o", out),
        ("submit", "amos22", "-i", file, "--images", labels, "-o", tmp_path / "a.zip"),
        ("convert", "btcv", "-i", file, "--root", tmp_path),
    ):
        sentence = run_error(*words)
        assert f" is a file, not a folder: {file}" in sentence, sentence
        assert "exist" not in sentence
    assert "is a file" not in run_error("overlay", "-p", tmp_path / "none", "-i", labels, "-o", out)


# ---------------------------------------------------------------- disks and folders


def full_disk(monkeypatch):
    def sync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", lambda *_: sync(0))
    monkeypatch.setattr(Path, "rename", lambda *_: sync(0))  # Python 3.10's holds its own os.rename


def closed_folder(monkeypatch):
    import tempfile

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)


WRITERS = (
    "plan_and_preprocess",
    "train",
    "predict",
    "evaluate",
    "report",
    "export_model",
    "import_model",
    "make_phantom",
)


def writing(command: str, root: Path, out: Path) -> tuple[object, ...]:
    """Words of a command that writes, into `out` where it can be told where."""
    raw = raw_of(root)
    return {
        "plan_and_preprocess": ("-p", "again", "-c", "3d_fullres", "--preset", "cpu", "--root", root),
        "train": ("3d_fullres", 1, *SHORT, "--root", root),
        "predict": predicting(root, out / "preds")[1:],
        "evaluate": ("-p", raw / "labelsTs", "-g", raw / "labelsTs", "-o", out / "scores"),
        "report": ("-o", out / "page.html", "-t", fold_of(root)),
        "export_model": ("-o", out / "new" / "model.zip", "--root", root),
        "import_model": (root.parent / "model.zip", "--root", out / "other"),
        "make_phantom": ("--cases", 1, "--shape", 8, 16, 16, "-o", out / "raw"),
    }[command]


@pytest.mark.parametrize("trouble", [full_disk, closed_folder], ids=lambda f: f.__name__)
@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_and_a_closed_folder(trained_root, root_of, monkeypatch, command, trouble):
    root = root_of(trained_root)
    out = root.parent / "out"
    out.mkdir()
    run_ok("export_model", "-o", root.parent / "model.zip", "--root", root)
    before = {p for p in root.rglob("*") if p.is_file()}
    trouble(monkeypatch)
    sentence = run_error(command, *writing(command, root, out))
    monkeypatch.undo()
    assert "disk is full" in sentence if trouble is full_disk else "cannot be written" in sentence
    assert str(root.parent) in sentence
    assert unfinished_files(root.parent) == []
    assert not [p for p in out.rglob("*") if p.is_file() and p.stat().st_size]
    after = {p for p in root.rglob("*") if p.is_file()}
    assert not {p for p in after - before if p.suffix in (".safetensors", ".b2nd", ".json")}
    run_ok(command, *writing(command, root, out))


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 40 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder]).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("words", "taken"), [(("--probabilities",), 30_000), ((), 38_000)], ids=["probabilities", "label maps"]
)
def test_a_disk_that_is_really_full(trained_root, small_disk, words, taken):
    (small_disk / "other").write_bytes(b"x" * taken)
    sentence = run_error(*predicting(trained_root, small_disk / "preds", *words))
    assert "2 of 2 cases" in sentence
    assert "Free space" in sentence
    assert ".." not in sentence
    assert [p.name for p in small_disk.rglob("*") if p.is_file()] == ["other"]


@pytest.mark.parametrize("command", ["predict", "evaluate", "export_model", "import_model", "make_phantom", "report"])
def test_a_file_stands_where_a_folder_is_needed(trained_root, tmp_path, command):
    run_ok("export_model", "-o", tmp_path / "model.zip", "--root", trained_root)
    root = tmp_path / "root"
    root.symlink_to(trained_root)
    out = tmp_path / "out"
    out.write_text("I am a file")
    sentence = run_error(command, *writing(command, root, out))
    assert "Expected a folder, but a file exists" in sentence
    assert out.read_text() == "I am a file"


def test_a_folder_that_cannot_be_made(trained_root):
    """Whatever else the system says when it refuses: here, a folder of the kernel."""
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    assert "/proc/preds" in run_error(*predicting(trained_root, Path("/proc/preds")))
    long = "x" * 300
    assert long in run_error(*predicting(trained_root, Path("/tmp") / long))


# ---------------------------------------------------------------- checkpoints and archives


def test_a_checkpoint_of_another_plan_is_not_gone_on_with(trained_root, root_of):
    root = root_of(trained_root)
    before = tree(fold_of(root))
    other = ("--epochs", 1, "--iterations", 2, "--lr", 0.5)
    sentence = run_error("train", "3d_fullres", 0, *other, "--root", root)
    assert "checkpoint_latest.safetensors" in sentence
    assert "learning_rate was 0.006, is 0.5" in sentence
    assert "--restart" in sentence
    assert tree(fold_of(root)) == before


def test_a_truncated_checkpoint_is_neither_trained_nor_predicted_with(trained_root, root_of, tmp_path):
    root = root_of(trained_root)
    for which in ("latest", "final"):
        path = fold_of(root) / f"checkpoint_{which}.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "checkpoint_latest.safetensors" in run_error("train", "3d_fullres", 0, *SHORT, "--root", root)
    assert "checkpoint_final.safetensors" in run_error(*predicting(root, tmp_path / "preds"))
    assert "checkpoint_final.safetensors" in run_error("export_model", "-o", tmp_path / "m.zip", "--root", root)
    assert not (tmp_path / "m.zip").exists()
    assert unfinished_files(tmp_path) == []


def test_a_damaged_case_is_not_trained_with_and_is_rebuilt(planned_root, root_of):
    root = root_of(planned_root)
    path = next((root / "preprocessed").rglob("rfmed_cpu_3d_fullres/phantom_002.b2nd"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    words = ("3d_fullres", 0, *SHORT, "--no-validate", "--root", root)
    sentence = run_error("train", *words)
    assert "1 of 5 preprocessed cases are damaged" in sentence
    assert "phantom_002" in sentence
    assert not fold_of(root).exists()
    assert "1 rebuilt" in run_ok("plan_and_preprocess", *PLANNING, "--root", root).out
    run_ok("train", *words)


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path(self.where),))


def test_a_pickle_dressed_as_a_checkpoint_is_not_run(trained_root, root_of, tmp_path):
    root, bomb = root_of(trained_root), Bomb()
    bomb.where = str(tmp_path / "ran")
    for which in ("latest", "final"):
        (fold_of(root) / f"checkpoint_{which}.safetensors").write_bytes(pickle.dumps(bomb))
    for words in (
        predicting(root, tmp_path / "preds"),
        ("train", "3d_fullres", 0, *SHORT, "--root", root),
        ("export_model", "-o", tmp_path / "m.zip", "--root", root),
    ):
        assert "checkpoint_" in run_error(*words)
    assert not (tmp_path / "ran").exists()


def test_a_zip_that_wants_out_of_its_folder_is_refused(trained_root, tmp_path):
    run_ok("export_model", "-o", tmp_path / "good.zip", "--root", trained_root)
    with zipfile.ZipFile(tmp_path / "good.zip") as source, zipfile.ZipFile(tmp_path / "evil.zip", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("../../evil.txt", "out")
    assert "../../evil.txt" in run_error("import_model", tmp_path / "evil.zip", "--root", tmp_path / "a" / "b")
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 nothing")
    assert "no.zip" in run_error("import_model", tmp_path / "no.zip", "--root", tmp_path / "a" / "b")
    assert "nowhere.zip" in run_error("import_model", tmp_path / "nowhere.zip", "--root", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("evil.txt"))
    assert not [p for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert unfinished_files(tmp_path) == []


def test_a_damaged_plan_and_damaged_splits_are_sentences(planned_root, root_of):
    root = root_of(planned_root)
    folder = root / "preprocessed" / PHANTOM
    splits = (folder / "splits_final.json").read_text()
    (folder / "splits_final.json").write_text(splits.replace("phantom_002", "phantom_099"))
    assert "phantom_099" in run_error("train", "3d_fullres", 0, *SHORT, "--root", root)
    (folder / "splits_final.json").write_text("[{]")
    assert "splits_final.json" in run_error("train", "3d_fullres", 0, *SHORT, "--root", root)
    (folder / "splits_final.json").unlink()
    assert "rfmed_plan_and_preprocess" in run_error("train", "3d_fullres", 0, *SHORT, "--root", root)
    (folder / "splits_final.json").write_text(splits)
    plan = folder / "rfmed_cpu.json"
    plan.write_text(
        plan.read_text().replace('"batch_size": 2', '"batch_size": 0').replace('"order_z": 0', '"order_z": 9')
    )
    sentence = run_error("train", "3d_fullres", 0, *SHORT, "--root", root)
    assert "batch_size" in sentence
    assert "order_z" in sentence


# ---------------------------------------------------------------- a training that is ended


@pytest.mark.whole  # tests/faults/test_killed_training.py holds this with workers
def test_a_terminated_training_saves_and_the_same_command_finishes(planned_root, root_of):
    root = root_of(planned_root)
    words = ["3d_fullres", "fold", "0", "--epochs", "300", "--iterations", "1", "--no-validate", "--root", str(root)]
    code = "from rfmedsam2.cli.pipeline import train_command; train_command()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, *words, "--set", "3d_fullres.train.validate_every_epochs=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        for line in process.stderr:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Stopped by SIGTERM after step" in out
    assert "Traceback" not in err
    assert unfinished_files(root) == []
    latest = read_record_of(fold_of(root) / "checkpoint_latest.safetensors")
    assert 0 < latest.step < 300
    # the same command, only with fewer epochs, so that the test is short
    words[4] = str(latest.step + 2)
    done = run_ok("train", *words, "--set", "3d_fullres.train.validate_every_epochs=1")
    assert f"Trained {latest.step + 2} steps" in done.out
    lines = (fold_of(root) / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if json.loads(line)["event"] == "step"]
    assert steps == sorted(set(steps))
    assert len(steps) == latest.step + 2
