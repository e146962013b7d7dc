"""A package of a network, a loss, an augmentation, a task and a planner: installed, trained, predicted; and missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.commands import run_error, run_ok

from rfmedsam2.records.plan import Plan
from rfmedsam2.system.atomic import read_record

EXAMPLE = Path(__file__).resolve().parents[1] / "support" / "example_extension"
NAME = "example-extension"
CHANGES = (
    "3d_fullres.patch_size=[16,32,32]",
    "3d_fullres.train.workers=1",
    "3d_fullres.validation.patches_while_training=1",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that pip has installed the example into; on the search path only inside `at_hand`."""
    source, target = tmp_path_factory.mktemp("source") / EXAMPLE.name, tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE, source)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*command, "--target", target, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


@contextmanager
def at_hand(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("example_extension", None)


@pytest.fixture(scope="module")
def trained(installed, raw_root, tmp_path_factory) -> Path:
    """A root with a trained model of the example's parts."""
    root = tmp_path_factory.mktemp("trained") / "root"
    shutil.copytree(raw_root, root)
    with at_hand(installed):
        run_ok("plan_and_preprocess", "--planner", "tiny", "--set", *CHANGES, "--root", root)
        run_ok("train", "3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 2, "--root", root)
    return root


def fold_of(root: Path) -> Path:
    return next((root / "results").glob("*/tiny__3d_fullres/fold_0"))


def test_the_plan_names_the_parts_and_no_class(trained) -> None:
    path = next((trained / "preprocessed").glob("*/tiny.json"))
    stage = read_record(path, Plan).stages["3d_fullres"]
    assert (stage.model.kind, stage.model.name, stage.model.options) == ("custom", "tiny", {"width": 6})
    assert stage.extensions.loss.name == "focal"
    assert "example_extension" not in path.read_text()


def test_it_is_trained_by_its_own_loss_and_optimizer_and_validated(trained) -> None:
    events = [json.loads(line) for line in (fold_of(trained) / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 2
    assert all(set(event["losses"]) == {"focal"} for event in steps)
    assert (fold_of(trained) / "validation" / "metrics.json").is_file()
    assert "tiny, a network of example-extension" in (fold_of(trained) / "report.html").read_text()


def test_it_predicts_where_the_package_is_installed_and_says_what_is_missing_where_it_is_not(
    trained, installed, tmp_path
) -> None:
    images = next((trained / "raw").glob("*/imagesTs"))
    words = ("-i", images, "-o", tmp_path / "out", "--root", trained)
    sentence = run_error("predict", *words)
    assert "The extension is not installed: network tiny of example-extension" in sentence
    assert f"pip install {NAME}" in sentence
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    with at_hand(installed):
        run_ok("predict", *words)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


def test_training_without_the_package_is_refused_before_anything_is_written(trained) -> None:
    before = sorted(p.name for p in fold_of(trained).parent.iterdir())
    sentence = run_error("train", "3d_fullres", "fold", 1, "--root", trained)
    assert "network tiny of example-extension" in sentence
    assert sorted(p.name for p in fold_of(trained).parent.iterdir()) == before


def test_the_doctor_lists_what_is_installed(installed, tmp_path) -> None:
    with at_hand(installed):
        found = json.loads(run_ok("doctor", "--root", tmp_path, "--json").out)["extensions"]
        table = run_ok("doctor", "--root", tmp_path).out
    ours = {(each["kind"], each["name"]) for each in found if each["package"] == NAME}
    assert ours == {
        ("network", "tiny"),
        ("loss", "focal"),
        ("augmentation", "noise"),
        ("task", "adamax"),
        ("planner", "tiny"),
    }
    assert all(each["fault"] is None for each in found)
    assert "example-extension 1.0" in table


def test_options_that_the_network_does_not_have_are_named(installed, trained) -> None:
    words = ("--set", '3d_fullres.model.options={"depth": 3}', "--root", trained)
    with at_hand(installed):
        sentence = run_error("train", "3d_fullres", "fold", 1, *words)
    assert "options of network tiny of example-extension 1.0" in sentence
    assert "depth" in sentence


def test_the_summary_counts_its_parameters(installed, trained) -> None:
    with at_hand(installed):
        plan = next((trained / "preprocessed").glob("*/tiny.json"))
        found = json.loads(run_ok("summary", plan, "-c", "3d_fullres", "--json").out)
    outputs, width = 14, 6
    assert found["parameters"] == width * (27 + 1) + outputs * (width + 1)


def test_a_planner_that_is_not_installed_is_a_sentence(raw_root, root_of) -> None:
    sentence = run_error("plan_and_preprocess", "--planner", "nobodys", "--root", root_of(raw_root))
    assert "planner nobodys" in sentence
    assert "rfmedsam2.planners" in sentence
