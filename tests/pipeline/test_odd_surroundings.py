"""Memory that ends, variables of nonsense, JSON of nonsense: a sentence, and what can be done is done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import samhq_commands
from support.commands import run, run_error, run_ok
from support.tiny_model import make_plan, write_image, write_model

from rfmedsam2.cli.command import command
from rfmedsam2.pipeline.prediction import predictor as predictor_module
from rfmedsam2.records.prediction import PredictionsRecord
from segment_anything_hq.inference import files as image_files

PHANTOM = "Dataset900_PhantomCT"
DEEP = "[" * 200_000
LONG = f'{{"a": {"7" * 5000}}}'


def exhausted(*_, **__) -> None:
    torch.empty(1 << 56)


def broken_primitive(*_, **__) -> None:
    raise RuntimeError("could not create a primitive")


def no_room(*_, **__) -> None:
    np.empty(1 << 56)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("ends", [exhausted, broken_primitive, no_room])
@pytest.mark.parametrize("where", ["preprocess_case", "predict_prepared"])
def test_a_case_without_memory_is_named_and_the_others_are_predicted(ends, where, monkeypatch, tmp_path) -> None:
    write_model(tmp_path / "m", make_plan())
    shapes = {0: (22, 25, 14), 1: (30, 20, 10), 2: (22, 25, 14)}
    for number, shape in shapes.items():
        write_image(tmp_path / "in" / f"case{number}_0000.nii.gz", number, shape)
    real = getattr(predictor_module, where)

    def limited(*words, **named):
        case = words[0] if where == "preprocess_case" else words[1]
        return ends() if 30 in case.grid.shape_zyx else real(*words, **named)

    monkeypatch.setattr(predictor_module, where, limited)
    words = ("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", tmp_path / "m", "--device", "cpu")
    told = run_error("predict", *words)
    assert "1 of 3 cases were not predicted" in told
    assert "case1: Memory ran out (" in told
    assert "GiB more available" in told
    assert set(PredictionsRecord.load(tmp_path / "out" / "predictions.json").cases) == {"case0", "case2"}
    monkeypatch.undo()
    assert "Predicted 1 case(s)" in run_ok("predict", *words, "--continue").out


def test_a_tile_without_memory_on_the_cpu_is_a_sentence(monkeypatch, tmp_path) -> None:
    write_model(tmp_path / "m", make_plan())
    image = write_image(tmp_path / "case_0000.nii.gz")
    monkeypatch.setattr(torch.nn.Conv3d, "forward", exhausted)
    told = run_error("predict", "-i", image, "-o", tmp_path / "out", "-m", tmp_path / "m", "--device", "cpu")
    assert "case: The device has too little memory for one tile: cpu" in told
    assert "Free memory, or use a plan with a smaller patch" in told


def test_an_image_without_memory_is_named_and_the_others_are_segmented(monkeypatch, tmp_path) -> None:
    images = samhq_commands.write_images(tmp_path / "data") / "images"
    prompts = [{"image": name, "box": [8, 10, 24, 30]} for name in ("a.png", "b.png")]
    real = image_files.embed
    monkeypatch.setattr(image_files, "embed", lambda n, i, t: exhausted() if i.shape[0] == 40 else real(n, i, t))
    words = ("sam", "-b", "vit_nano", "--frame-size", 64, "--device", "cpu", "-i", images)
    words = (*words, "-p", samhq_commands.written(tmp_path / "p.json", prompts), "-o", tmp_path / "out")
    told = samhq_commands.run_error("predict", *words)
    assert "1 of 2 images were not predicted" in told
    assert "a.png: Memory ran out" in told
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["file"] for entry in record["objects"]] == ["b.png"]
    assert (tmp_path / "out" / "b.png").is_file()


@pytest.mark.parametrize("ends", [exhausted, broken_primitive, no_room])
def test_any_command_without_memory_ends_with_a_sentence(ends, monkeypatch, capsys) -> None:
    def doctor() -> None:
        """Look."""
        ends()

    monkeypatch.setattr(sys, "argv", ["rfmed_doctor"])
    with pytest.raises(SystemExit) as end:
        command(doctor)()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("rfmed_doctor: Memory ran out. Found ")


def test_other_errors_of_a_command_are_no_memory(monkeypatch) -> None:
    def doctor() -> None:
        """Look."""
        torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(sys, "argv", ["rfmed_doctor"])
    with pytest.raises(RuntimeError, match="size"):
        command(doctor)()


@pytest.mark.parametrize(
    "words",
    [
        ("make_phantom", "-o"),
        ("predict", "-m", "m", "-o", "out", "-i"),
        ("evaluate", "-p", "p", "-o", "out", "-g"),
        ("report", "-o", "page.html", "-t"),
        ("import_model",),
        ("summary",),
    ],
    ids=lambda words: words[0],
)
def test_paths_that_the_system_refuses_are_sentences(words, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m", make_plan())
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / ("x" * 300), tmp_path / "loop" / "x"):
        run_error(*words, path)
    assert {p.name for p in tmp_path.iterdir()} - {"rfmed_data"} == {"m", "loop"}


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_in_a_circle_are_sentences(tmp_path) -> None:
    write_model(tmp_path / "model", make_plan())
    image = write_image(tmp_path / "in" / "a_0000.nii.gz")
    circle, labels = tmp_path / "circle", tmp_path / "labels" / "a.nii.gz"
    labels.parent.mkdir()
    circle.symlink_to(circle.name)
    labels.symlink_to(labels.name)
    for words in (
        ("predict", "-i", image, "-o", labels.parent, "-m", tmp_path / "model", "--overwrite"),
        ("predict", "-i", image, "-o", tmp_path / "out", "-m", circle),
        ("overlay", "-p", image.parent, "-o", circle),
    ):
        told = run_error(*words)
        assert "The system refuses this path (Too many levels of symbolic links)" in told
        assert str(labels if labels.parent in words else circle) in told
    assert labels.is_symlink()


@pytest.mark.parametrize("name", ["predict", "evaluate", "train"])
def test_paths_that_the_system_refuses_to_image_commands_are_sentences(name, tmp_path) -> None:
    data = samhq_commands.write_images(tmp_path / "data")
    prompts = samhq_commands.written(tmp_path / "p.json", [{"image": "a.png", "box": [8, 10, 24, 30]}])
    words = {
        "predict": ("sam", "-i", data / "images", "-p", prompts),
        "evaluate": ("sam", "--data", data, "--protocol", "box"),
        "train": ("sam_decoder", "--data", data, "--held-out", 0),
    }[name]
    words = (*words, "-b", "vit_nano", "--frame-size", 64, "--device", "cpu", "-o", tmp_path / ("x" * 300))
    assert "File name too long" in samhq_commands.run_error(name, *words)


# ---------------------------------------------------------------- variables


@pytest.mark.parametrize(
    "name", ["OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
)
@pytest.mark.parametrize("text", ["abc", "-3", "1;2", "9" * 50 + "x"])
def test_variables_of_nonsense_are_named(name: str, text: str) -> None:
    told = run_error("doctor", environment={name: text})
    assert f"The environment variable {name} is not valid" in told
    assert repr(text[:40]) in told


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "NUMBA_NUM_THREADS"])
def test_no_threads_are_a_sentence(name: str) -> None:
    assert f"The environment variable {name} is not valid" in run_error("doctor", environment={name: "0"})


@pytest.mark.parametrize("threads", ["", "3", "4,2", " 2 , 1 ", "128"])
def test_every_valid_number_of_threads_works(threads: str, tmp_path: Path) -> None:
    code = "from rfmedsam2.cli.data_and_models import doctor_command as run; run()"
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    words = [sys.executable, "-c", code, "--root", str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert "nthreads" not in done.stdout + done.stderr


@pytest.mark.parametrize("columns", ["1", "7", "39", "0", "-5", "abc", "9" * 30])
def test_help_is_shown_at_any_width(columns: str) -> None:
    program = (
        "import sys; sys.argv[0] = 'rfmed_report'; from rfmedsam2.cli.pipeline import report_command; report_command()"
    )
    words = [sys.executable, "-c", program, "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=100, env={**os.environ, "COLUMNS": columns})
    assert shown.returncode == 0, shown.stderr
    assert "--evaluation" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 1000


def test_help_is_shown_whatever_the_variables_say() -> None:
    assert run("doctor", "--help", environment={"RANK": "abc", "OMP_NUM_THREADS": "abc"}).code == 0


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"WORLD_SIZE": "2"}])
def test_a_training_of_a_team_that_is_not_there_is_a_sentence(variables, root_of, planned_root) -> None:
    root = root_of(planned_root)
    words = ("3d_fullres", 0, "--epochs", 1, "--iterations", 1, "--no-validate", "--device", "cpu", "--root", root)
    assert "do not describe a team" in run_error("train", *words, environment=variables)


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("text", [DEEP, LONG, '{"a": ' * 500 + "1" + "}" * 500], ids=["deep", "long", "nested"])
@pytest.mark.parametrize(
    "file", ["dataset.json", "splits_final.json", "splits_named.json", "rfmed_cpu.json", "rfmed_fingerprint.json"]
)
def test_json_of_a_dataset(file: str, text: str, root_of, planned_root) -> None:
    root = root_of(planned_root)
    raw, folder = root / "raw" / PHANTOM, root / "preprocessed" / PHANTOM
    (raw if file == "dataset.json" else folder).joinpath(file).write_text(text)
    words = ("3d_fullres", 0, "--epochs", 1, "--iterations", 1, "--no-validate", "--device", "cpu", "--root", root)
    for outcome in (run("train", *words), run("verify", "--root", root), run("train", *words, "-p", "rfmed_cpu")):
        assert outcome.code in (0, 2)
        assert "Traceback" not in outcome.err
        assert outcome.code == 0 or file in outcome.err + outcome.out or "The plan does not exist" in outcome.err


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
def test_json_given_to_other_commands(text: str, tmp_path: Path, raw_root: Path) -> None:
    write_model(tmp_path / "m", make_plan())
    image = write_image(tmp_path / "in" / "case_0000.nii.gz")
    path = tmp_path / "given.json"
    path.write_text(text)
    predicting = ("predict", "-o", tmp_path / "out", "-m", tmp_path / "m", "--device", "cpu")
    assert "given.json" in run_error(*predicting, "-i", path)
    labels = raw_root / "raw" / PHANTOM / "labelsTs"
    scoring = ("evaluate", "-p", labels, "-g", labels, "-o", tmp_path / "scores")
    assert "given.json" in run_error(*scoring, "--labels", path)
    assert "given.json" in run_error("report", "-o", tmp_path / "page.html", "-e", path)
    assert "given.json" in run_error("summary", path)
    root = tmp_path / "root"
    shutil.copytree(raw_root, root)
    planning = ("plan_and_preprocess", "-c", "3d_fullres", "--root", root)
    for flag in ("--nnunet-plans", "--published"):
        assert "given.json" in run_error(*planning, flag, path)
    msd = tmp_path / "Task04_X"
    (msd / "imagesTr").mkdir(parents=True)
    (msd / "dataset.json").write_text(text)
    assert "dataset.json" in run_error("convert", "msd", "-i", msd, "--root", tmp_path / "other")
    assert run("predict", *predicting[1:], "-i", image, "--set").code == 2


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
def test_json_given_to_image_commands(text: str, tmp_path: Path) -> None:
    from rfmedsam2.errors import DatasetError
    from segment_anything_hq.data.coco import open_annotations
    from segment_anything_hq.evaluation.average_precision import _json

    images = samhq_commands.write_images(tmp_path / "data") / "images"
    path = samhq_commands.written(tmp_path / "given.json", text)
    words = ("sam", "-b", "vit_nano", "-i", images, "-p", path, "-o", tmp_path / "out")
    assert "given.json" in samhq_commands.run_error("predict", *words)
    for reader in (lambda: open_annotations(path, images), lambda: _json(path)):
        with pytest.raises(DatasetError, match=r"not valid JSON.*given\.json"):
            reader()
    words = ("sam_decoder", "-b", "vit_nano", "--data", tmp_path / "data", "-o", tmp_path / "run")
    words = (*words, "--held-out", 0, "--plan", path)
    assert "given.json" in samhq_commands.run_error("train", *words)
