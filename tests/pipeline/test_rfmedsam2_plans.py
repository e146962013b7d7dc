"""Planning RFMedSAM 2 as a user meets it: from a raw dataset, from a published plan, and looked into."""

from __future__ import annotations

import json
from pathlib import Path

from support.commands import run_error, run_ok

PHANTOM = "Dataset900_PhantomCT"
PLANS = Path(__file__).resolve().parents[2] / "plans"


def planned(root: Path, name: str) -> dict:
    return json.loads((root / "preprocessed" / PHANTOM / f"{name}.json").read_text())


def test_a_plan_for_a_laptop_is_made_and_described(raw_root, root_of):
    root = root_of(raw_root)
    words = ("--model", "rfmedsam2", "--preset", "cpu", "--no-preprocess", "--root", root)
    shown = run_ok("plan_and_preprocess", *words).out
    stage = planned(root, "rfmedsam2_cpu")["stages"]["3d_fullres"]
    assert stage["patch_size"][1] == stage["patch_size"][2]
    assert (stage["model"]["kind"], stage["model"]["backbone"]) == ("rfmedsam2", "nano")
    assert "nano, 2 steps" in shown
    assert "--sam2" not in shown
    found = json.loads(run_ok("summary", "rfmedsam2_cpu", "--json", "--root", root).out)
    assert found["groups"]["SAM 2"] < 2e6
    assert found["frozen"] == 0


def test_a_backbone_with_published_weights_says_how_to_give_them(raw_root, root_of):
    root = root_of(raw_root)
    words = ("--model", "rfmedsam2", "--backbone", "lite_medsam", "-p", "lite", "--no-preprocess", "--root", root)
    assert "give their file to rfmed_train with --sam2" in run_ok("plan_and_preprocess", *words).out
    assert planned(root, "lite")["stages"]["3d_fullres"]["model"]["freeze_backbone"] is True


def test_a_published_plan_is_adopted_under_its_name(raw_root, root_of):
    root = root_of(raw_root)
    change = "3d_fullres.train.epochs=3"
    run_ok(
        "plan_and_preprocess", "--published", PLANS / "btcv.json", "--set", change, "--no-preprocess", "--root", root
    )
    found = planned(root, "btcv")
    assert (found["dataset"], found["stages"]["3d_fullres"]["train"]["epochs"]) == (PHANTOM, 3)
    assert found["fingerprint"] != "published figures, no dataset"
    assert found["stages"]["3d_fullres"]["patch_size"] == [32, 256, 256]


def test_a_published_plan_of_other_classes_and_unknown_words_are_sentences(raw_root, root_of):
    root = root_of(raw_root)
    published = PLANS / "amos22_ct.json"
    said = run_error("plan_and_preprocess", "--published", published, "--no-preprocess", "--root", root)
    assert "The plan does not match the dataset" in said
    said = run_error("plan_and_preprocess", "--backbone", "nano", "--no-preprocess", "--root", root)
    assert "Add --model rfmedsam2" in said
