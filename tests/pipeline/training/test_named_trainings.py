"""Several plans and trainings on one copy of the preprocessed cases, and validation by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.commands import PLANNING, run_error, run_ok

from rfmedsam2.records.plan import Plan
from rfmedsam2.store.checkpoint_header import BEST, FINAL, read_record_of
from rfmedsam2.store.preprocessed import CaseStore

HOME = Path("preprocessed/Dataset900_PhantomCT")
FOLD = Path("results/Dataset900_PhantomCT/rfmed_cpu__3d_fullres/fold_0")
SHORT = ("--epochs", 1, "--iterations", 2)


@pytest.fixture
def root(planned_root, tmp_path) -> Path:
    return Path(shutil.copytree(planned_root, tmp_path / "root"))


@pytest.fixture
def trained(trained_root, tmp_path) -> Path:
    return Path(shutil.copytree(trained_root, tmp_path / "root"))


def test_plans_that_prepare_alike_share_one_copy(root):
    said = run_ok("plan_and_preprocess", *PLANNING, "3d_fullres.train.learning_rate=0.5", "-p", "fast", "--root", root)
    assert "3d_fullres uses the preprocessed cases of plan rfmed_cpu, which prepares them alike" in said.out
    assert "5 finished before" in said.out
    assert not (root / HOME / "fast_3d_fullres").exists()
    plan = Plan.load(root / HOME / "fast.json")
    assert plan.stages["3d_fullres"].cases_of == "rfmed_cpu"

    run_ok("train", "3d_fullres", 0, "-p", "fast", *SHORT, "--no-validate", "--root", root)
    trained = root / FOLD.parent.with_name("fast__3d_fullres") / "fold_0" / FINAL
    assert read_record_of(trained).plan.stages["3d_fullres"].train.learning_rate == 0.5

    # another plan of another spacing has its own, and a plan that shares is no source for others
    coarse = ("3d_fullres.spacing_mm=[9,9,9]", "-p", "coarse")
    run_ok("plan_and_preprocess", *PLANNING, *coarse, "--root", root)
    assert len(CaseStore(root / HOME / "coarse_3d_fullres").ids()) == 5
    run_ok("plan_and_preprocess", *PLANNING, "-p", "again", "--root", root)
    assert Plan.load(root / HOME / "again.json").stages["3d_fullres"].cases_of == "rfmed_cpu"


def test_a_plan_whose_shared_cases_were_made_otherwise_says_so_and_makes_its_own(root):
    run_ok("plan_and_preprocess", *PLANNING, "-p", "fast", "--root", root)
    run_ok("plan_and_preprocess", *PLANNING, "3d_fullres.spacing_mm=[9,9,9]", "--root", root)
    words = ("train", "3d_fullres", 0, "-p", "fast", *SHORT, "--no-validate", "--root", root)
    assert "other settings than the plan's" in run_error(*words)
    run_ok("plan_and_preprocess", *PLANNING, "-p", "fast", "--root", root)
    assert Plan.load(root / HOME / "fast.json").stages["3d_fullres"].cases_of is None
    run_ok(*words)


def test_trainings_of_one_plan_have_names(root):
    words = ("train", "3d_fullres", 0, *SHORT, "--no-validate", "--root", root)
    run_ok(*words)
    run_ok(*words, "--name", "fast", "--lr", 0.5)
    first, second = (root / FOLD.parent.with_name(f"{plan}__3d_fullres") for plan in ("rfmed_cpu", "rfmed_cpu-fast"))
    records = [read_record_of(folder / "fold_0" / FINAL) for folder in (first, second)]
    assert records[0].weights_sha256 != records[1].weights_sha256
    assert records[1].plan.name == "rfmed_cpu-fast"
    assert records[1].plan.stages["3d_fullres"].train.learning_rate == 0.5
    assert "Already trained" in run_ok(*words, "--name", "fast", "--lr", 0.5).out
    images = root / "raw/Dataset900_PhantomCT/imagesTs"
    run_ok("predict", "-i", images, "-o", root / "out", "-p", "rfmed_cpu-fast", "--device", "cpu", "--root", root)
    assert len(list((root / "out").glob("*.nii.gz"))) == 2

    assert "cannot be a plan's name" not in run_error(*words, "--name", "../x")
    assert "Invalid name of a training" in run_error(*words, "--name", "../x")
    run_ok("plan_and_preprocess", *PLANNING, "-p", "rfmed_cpu-slow", "--root", root)
    told = run_error(*words, "-p", "rfmed_cpu", "--name", "slow")
    assert "has this name already" in told


def test_an_imported_model_is_not_trained_on_but_beside(trained):
    fold = trained / FOLD
    for name in ("metrics.jsonl", "metrics.csv", "checkpoint_latest.safetensors"):
        (fold / name).unlink()
    words = ("train", "3d_fullres", 0, *SHORT, "--no-validate", "--root", trained)
    before = (fold / FINAL).read_bytes()
    message = run_error(*words)
    assert "This fold holds a model that was imported" in message
    assert f"--name NAME, starting from it with --weights {fold} if wanted; or put it aside with --restart" in message
    assert (fold / FINAL).read_bytes() == before
    run_ok(*words, "--name", "tuned", "--weights", fold)
    run_ok(*words, "--restart")


def test_weights_are_validated_by_themselves(trained):
    words = ("train", "3d_fullres", 0, "--validate-only", "--device", "cpu", "--root", trained)
    fold = trained / FOLD
    before = {path.name: path.read_bytes() for path in fold.glob("*.safetensors")}
    scores = (fold / "validation" / "metrics.json").read_text()
    shutil.rmtree(fold / "validation")
    said = run_ok(*words)
    again = json.loads((fold / "validation" / "metrics.json").read_text())
    assert again["mean"] == json.loads(scores)["mean"]
    assert str(fold / "validation" / "metrics.csv") in said.out
    assert not (fold / "validation_best").exists()

    assert not [*fold.rglob("*.b2nd")]
    run_ok(*words, "--probabilities")
    cases = json.loads((fold / "validation" / "predictions.json").read_text())["cases"]
    assert {case["probabilities"] for case in cases.values()} == {f"{id}.probabilities.b2nd" for id in cases}
    assert len([*(fold / "validation").glob("*.b2nd")]) == len(cases)
    assert json.loads((fold / "validation" / "metrics.json").read_text())["mean"] == again["mean"]

    run_ok(*words, "--checkpoint", "best")
    record = json.loads((fold / "validation_best" / "predictions.json").read_text())
    assert BEST in json.dumps(record)
    assert {path.name: path.read_bytes() for path in fold.glob("*.safetensors")} == before


@pytest.mark.parametrize("preprocessed", [False, True])
@pytest.mark.parametrize("exchanged", [False, True])
def test_a_training_case_under_a_validation_id_is_not_validated(trained, preprocessed, exchanged):
    """Ids say nothing about files that were renamed or copied."""
    cases = read_record_of(trained / FOLD / FINAL).cases
    one, other = min(cases.val), min(cases.train)
    for folder, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        here, there = (trained / "raw" / "Dataset900_PhantomCT" / folder / f"{id}{end}" for id in (one, other))
        before = here.read_bytes()
        here.write_bytes(there.read_bytes())
        if exchanged:
            there.write_bytes(before)
    if preprocessed:
        run_ok("plan_and_preprocess", *PLANNING, "--root", trained)
    scores = (trained / FOLD / "validation" / "metrics.json").read_bytes()
    told = run_error("train", "3d_fullres", 0, "--validate-only", "--device", "cpu", "--root", trained)
    assert "was trained on cases that are validation cases now" in told
    assert f"Found {one}, which was {other}." in told
    assert (trained / FOLD / "validation" / "metrics.json").read_bytes() == scores


def test_what_cannot_be_validated(trained):
    words = ("train", "3d_fullres", "--validate-only", "--root", trained)
    told = run_error(*words[:2], 1, *words[2:])
    assert "This fold has no such checkpoint" in told
    splits = trained / HOME / "splits_final.json"
    folds = json.loads(splits.read_text())
    folds[0]["val"], folds[0]["train"] = folds[1]["val"], folds[1]["train"]
    splits.write_text(json.dumps(folds))
    told = run_error(*words[:2], 0, *words[2:])
    assert "was trained on cases that are validation cases now" in told
    assert folds[0]["val"][0] in told
