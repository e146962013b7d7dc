"""Files that somebody else wrote, with names that lead elsewhere: every command refuses, and writes nothing outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import samhq_commands
from support.commands import run, run_error
from support.tiny_model import make_plan, write_image, write_model

from rfmedsam2.store.checkpoints import read_all, write_checkpoint
from rfmedsam2.store.raw import open_dataset

PHANTOM = "Dataset900_PhantomCT"
HOSTILE = ("../../escaped", "/escaped_absolute", "..\\escaped", "", ".", "..", "x" * 300, "nul\0byte")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.fixture
def guarded(tmp_path: Path) -> Path:
    """A folder deep in the test's own, with files around it that nobody may touch."""
    inner = tmp_path / "around" / "deep" / "inner"
    inner.mkdir(parents=True)
    for place in (tmp_path, tmp_path / "around", inner.parent):
        (place / "escaped.json").write_text("mine")
        (place / "escaped.nii.gz").write_bytes(b"mine")
    return inner


def outside(inner: Path) -> dict[str, bytes]:
    base = inner.parents[2]
    return {name: data for name, data in everything(base).items() if not (base / name).is_relative_to(inner)}


@pytest.mark.parametrize("name", HOSTILE)
def test_ids_of_dataset_json(name: str, raw_root: Path, guarded: Path) -> None:
    root = guarded / "root"
    shutil.copytree(raw_root, root)
    path = root / "raw" / PHANTOM / "dataset.json"
    cases = open_dataset(path.parent).training
    listed = {c.id: {"images": [str(p.resolve()) for p in c.images], "label": str(c.label)} for c in cases}
    listed[name] = listed.pop(cases[0].id)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": listed}))
    before = outside(guarded)
    for command in (("verify",), ("plan_and_preprocess", "--preset", "cpu", "-c", "3d_fullres")):
        assert "dataset.json" in run_error(*command, "--root", root)
    assert outside(guarded) == before
    assert not (root / "preprocessed").exists()


@pytest.mark.parametrize("kind", ["split", "named split", "split of dataset.json", "ending", "group"])
def test_other_names_of_a_dataset(kind: str, planned_root: Path, guarded: Path) -> None:
    root = guarded / "root"
    shutil.copytree(planned_root, root)
    described, folder = root / "raw" / PHANTOM / "dataset.json", root / "preprocessed" / PHANTOM
    ids = [case.id for case in open_dataset(described.parent).training]
    split = {"train": ids[1:], "val": ids[:1]}
    changes: dict[str, Any] = {}
    if kind == "split":
        (folder / "splits_final.json").write_text(json.dumps([{"train": ids, "val": ["../../../../escaped"]}]))
    elif kind == "named split":
        (folder / "splits_named.json").write_text(json.dumps({"../../../../../escaped": split}))
    elif kind == "split of dataset.json":
        changes = {"splits": {"../../../../../escaped": split}}
    elif kind == "ending":
        changes = {"file_ending": ".nii/../../../escaped.nii.gz"}
    else:
        changes = {"groups": {ids[0]: "../../escaped"}}  # groups are compared and never become a path
    described.write_text(json.dumps(json.loads(described.read_text()) | changes))
    before = outside(guarded)
    fold = "../../../../../escaped" if "named" in kind else "0"
    words = ("3d_fullres", "fold", fold, "--epochs", 1, "--iterations", 1, "--no-validate", "--root", root)
    train = run("train", *words)
    plan = run("plan_and_preprocess", "--preset", "cpu", "-c", "3d_fullres", "-p", "again", "--root", root)
    refused = {"split": train, "named split": train, "split of dataset.json": plan, "ending": plan}.get(kind)
    assert refused is None or (refused.code == 2 and "escaped" in refused.err)
    assert "Traceback" not in train.err + plan.err
    assert outside(guarded) == before


@pytest.mark.parametrize("field", ["name", "dataset", "stage", "file_ending"])
def test_names_in_a_plan(field: str, planned_root: Path, guarded: Path) -> None:
    root = guarded / "root"
    shutil.copytree(planned_root, root)
    path = next((root / "preprocessed" / PHANTOM).glob("rfmed*.json"))
    path = path if path.name != "rfmed_fingerprint.json" else path.with_name("rfmed_cpu.json")
    plan = json.loads(path.read_text())
    bad = "../../../../../escaped"
    if field == "stage":
        plan["stages"][bad] = plan["stages"]["3d_fullres"]
    else:
        plan[field] = f".nii/{bad}" if field == "file_ending" else bad
    path.write_text(json.dumps(plan))
    before = outside(guarded)
    stage = bad if field == "stage" else "3d_fullres"
    assert "escaped" in run_error("train", stage, "fold", 0, "--iterations", 1, "--no-validate", "--root", root)
    assert outside(guarded) == before


@pytest.mark.parametrize("field", ["file_ending", "name", "dataset", "stage", "fold"])
def test_names_in_a_shared_model(field: str, guarded: Path) -> None:
    """A checkpoint whose record was written by another program, which checks nothing."""
    plan, bad = make_plan(), "../../escaped"
    changes: dict[str, Any] = {
        "file_ending": {"plan": plan.model_copy(update={"file_ending": f"/{bad}.nii.gz"})},
        "name": {"plan": plan.model_copy(update={"name": bad})},
        "dataset": {"plan": plan.model_copy(update={"dataset": bad})},
        "stage": {"plan": plan.model_copy(update={"stages": {bad: plan.stages["3d_fullres"]}}), "stage": bad},
        "fold": {"fold": bad},
    }[field]
    model = guarded / "model"
    path = write_model(model, plan)
    record, tensors, _ = read_all(path)
    write_checkpoint(path, record.model_copy(update=changes), tensors, {})
    image = write_image(guarded / "in" / "case_0000.nii.gz")
    before = outside(guarded)
    assert "escaped" in run_error("predict", "-i", image, "-o", guarded / "out" / "a", "-m", model)
    assert "escaped" in run_error("export_model", "-m", model, "-o", guarded / "model.zip")
    assert outside(guarded) == before


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["json", "json list", "csv"])
def test_ids_of_lists(kind: str, name: str, guarded: Path) -> None:
    if kind == "csv" and name in ("", "nul\0byte"):
        pytest.skip("a row of one cell is a path; Python's csv refuses NUL itself")
    model = guarded / "model"
    write_model(model, make_plan())
    image = write_image(guarded / "in" / "case_0000.nii.gz")
    content = {
        "json": json.dumps({name: [str(image)]}),
        "json list": json.dumps([{"id": name, "images": [str(image)]}]),
        "csv": f'id,image\n"{name}",{image}\n',
    }[kind]
    listing = guarded / f"cases.{kind.split()[0]}"
    listing.write_text(content)
    before = outside(guarded)
    told = run_error("predict", "-i", listing, "-o", guarded / "out" / "a", "-m", model)
    assert listing.name in told
    assert outside(guarded) == before
    assert not (guarded / "out").exists()


def test_names_in_predictions_json_and_boxes(guarded: Path) -> None:
    model, out = guarded / "model", guarded / "out" / "a"
    write_model(model, make_plan())
    image = write_image(guarded / "in" / "case_0000.nii.gz")
    assert run("predict", "-i", image, "-o", out, "-m", model).code == 0
    record = json.loads((out / "predictions.json").read_text())
    record["cases"]["case"]["file"] = "../../escaped.nii.gz"
    (out / "predictions.json").write_text(json.dumps(record))
    before = outside(guarded)
    assert "predictions.json" in run_error("predict", "-i", image, "-o", out, "-m", model, "--continue")
    boxes = guarded / "boxes.json"
    boxes.write_text(json.dumps({"../../escaped": []}))
    run_error("predict", "-i", image, "-o", out, "-m", model, "--boxes", boxes, "--overwrite")
    assert outside(guarded) == before


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("name", [n for n in HOSTILE if n])
def test_names_of_prompts(name: str, guarded: Path) -> None:
    images = samhq_commands.write_images(guarded / "data") / "images"
    prompts = samhq_commands.written(guarded / "p.json", [{"image": "a.png", "box": [1, 1, 9, 9], "name": name}])
    before = outside(guarded)
    words = ("sam", "-b", "vit_nano", "-i", images, "-p", prompts, "-o", guarded / "out")
    assert "is not a valid file name" in samhq_commands.run_error("predict", *words)
    assert outside(guarded) == before
    assert not (guarded / "out").exists()


@pytest.mark.parametrize("name", ["../../secret.png", "/secret.png", "..", "a/../../secret.png"])
def test_file_names_of_coco_and_lists_of_sbd_lead_to_no_other_folder(name: str, guarded: Path) -> None:
    from segment_anything_hq.data.coco import image_file, open_annotations
    from segment_anything_hq.data.datasets import open_sbd

    for place in (guarded.parent, guarded.parent.parent):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place / "secret.png")
    (guarded / "images").mkdir()
    record = {"id": 1, "height": 8, "width": 8, "file_name": name.replace("/secret", f"{guarded.parent}/secret", 1)}
    assert image_file(record, guarded / "images") is None
    square = {"id": 1, "image_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]], "area": 16, "iscrowd": 0}
    content = {"images": [record], "annotations": [square], "categories": []}
    found = open_annotations(samhq_commands.written(guarded / "coco.json", content), guarded / "images")
    assert not found.samples
    assert "the image is missing" in str(found.faults[0])
    (guarded / "val.txt").write_text(f"{name}\n")
    sbd = open_sbd(guarded)
    assert not sbd.samples
    assert "is not a name" in str(sbd.faults[0])
