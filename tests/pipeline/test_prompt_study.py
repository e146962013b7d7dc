"""rfmed_prompt_study: files and tables of a study, sentences for bad input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from support.commands import run_error, run_ok

from rfmedsam2.nn.sam2.build import build_base

NANO_SETTINGS = [(prompted, step2) for prompted in ("all", "two", "one") for step2 in ("unprompted", "all")]


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    """Weights of an untrained SAM 2 in a file as official ones come."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "nano.pt"
    torch.save({"model": build_base("nano", frame_size=64).state_dict()}, path)
    return path


def test_a_table_and_files_come_out(raw_root, nano, tmp_path) -> None:
    words = ("--sam2", nano, "--frame-size", 64, "--cases", 1, "--prompts", "box", "-o", tmp_path, "--root", raw_root)
    outcome = run_ok("prompt_study", *words)
    assert "nano" in outcome.out
    assert "unprompted" in outcome.out
    assert "CT: -160 to 240 HU" in outcome.out
    study = json.loads((tmp_path / "prompt_study.json").read_text())
    assert [(row["prompted"], row["step2"]) for row in study["rows"]] == NANO_SETTINGS
    with (tmp_path / "prompt_study.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(study["rows"])
    assert rows[0]["mean"] == str(study["rows"][0]["mean"]["mean"])
    assert "liver" in rows[0]


def test_the_answer_as_json(raw_root, nano) -> None:
    words = ("--sam2", nano, "--frame-size", 64, "--cases", 1, "--prompts", "point", "--prompted", "one", "--json")
    study = json.loads(run_ok("prompt_study", *words, "--root", raw_root).out)
    assert {row["prompts"] for row in study["rows"]} == {"point"}
    assert len(study["rows"]) == 2


def test_of_several_channels_the_first_is_shown_and_said(raw_root, nano, tmp_path) -> None:
    source = next((raw_root / "raw").iterdir())
    folder = tmp_path / "raw" / source.name
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    image = min(source.glob("imagesTr/*_0000.*"))
    id = image.name.split("_0000.")[0]
    shutil.copy(source / "labelsTr" / image.name.replace("_0000.", "."), folder / "labelsTr")
    for channel in range(2):
        shutil.copy(image, folder / "imagesTr" / image.name.replace("_0000.", f"_000{channel}."))
    content = json.loads((source / "dataset.json").read_text())
    content |= {"channel_names": {"0": "T1", "1": "T2"}, "numTraining": 1}
    (folder / "dataset.json").write_text(json.dumps(content))
    words = ("--sam2", nano, "--frame-size", 64, "--prompts", "box", "--prompted", "one", "--root", tmp_path)
    outcome = run_ok("prompt_study", *words)
    assert "using T1 of 2 channels (T1, T2); change with --channel" in outcome.err
    second = run_ok("prompt_study", *words, "--channel", "t2", "--json")
    assert json.loads(second.out)["channels"] == ["T2"]
    assert "Note: using" not in second.err
    assert json.loads(second.out)["cases"] == [id]


def test_a_mean_of_fewer_cases_says_so(raw_root, root_of, nano) -> None:
    root = root_of(raw_root)
    label = min((root / "raw").glob("*/labelsTr/*"))
    image = nib.load(label)
    voxels = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(np.where(voxels == 6, 0, voxels).astype(np.uint8), image.affine), label)  # no liver
    words = ("--sam2", nano, "--frame-size", 64, "--cases", 2, "--prompts", "box", "--prompted", "one", "--root", root)
    rows = {line.split()[0]: line for line in run_ok("prompt_study", *words).out.splitlines() if line.strip()}
    assert rows["liver"].count("(1 of 2)") == 2
    assert "of 2" not in rows["spleen"]


def test_bad_input_gets_sentences(raw_root, nano, tmp_path) -> None:
    assert "Give --sam or --sam2" in run_error("prompt_study", "--root", raw_root)
    assert "Give files of SAM 2 with --sam2" in run_error("prompt_study", "--sam", nano, "--root", raw_root)
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(1)}, other)
    assert "does not hold weights of a known SAM 2" in run_error("prompt_study", "--sam2", other, "--root", raw_root)
    assert "no SAM that is known" in run_error("prompt_study", "--sam", other, "--root", raw_root)
    missing = run_error("prompt_study", "--sam", tmp_path / "none.pt", "--root", raw_root)
    assert "The file of weights does not exist" in missing
    assert "The dataset does not exist" in run_error(
        "prompt_study", "-d", "Nowhere", "--sam2", nano, "--root", raw_root
    )
    words = ("prompt_study", "--sam2", nano, "--frame-size", 64, "--root", raw_root)
    assert "one of 0 CT" in run_error(*words, "--channel", "T2")
    assert "--window LOW HIGH" in run_error(*words, "--window", 5, 1)
    assert "1 or more (--cases)" in run_error(*words, "--cases", 0)
    assert "multiple of 32" in run_error(*words[:4], 50, "--root", raw_root)
