"""Every file of plans/ loads, is what the planner decides for the published figures, and builds its network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rfmedsam2.models import build
from rfmedsam2.pipeline import convert_amos22, convert_btcv
from rfmedsam2.pipeline.changes import moved
from rfmedsam2.pipeline.plan import plan
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.files import read_record

FOLDER = Path(__file__).resolve().parents[2] / "plans"
UNKNOWN = "published figures, no dataset"
# no statistics: a soft-tissue window, replaced by the dataset's own when the plan is moved to it
WINDOW = IntensityStatistics(mean=40, median=40, std=115, min=-160, max=240, percentile_00_5=-160, percentile_99_5=240)
PUBLISHED = {
    "btcv_unet": {
        "dataset": convert_btcv.NAME,
        "labels": convert_btcv.LABELS,
        "shape": (100, 512, 512),
        "spacing": (3.0, 0.76, 0.76),
        "cases": 30,
    },
    "amos22_ct_unet": {
        "dataset": convert_amos22.NAMES[1],
        "labels": convert_amos22.LABELS,
        "shape": (258, 512, 512),
        "spacing": (2.0, 0.712890625, 0.712890625),
        "cases": 300,
        "reader": "NibabelIOWithReorient",
    },
}


def planned(name: str) -> Plan:
    figures = PUBLISHED[name]
    case = CaseFingerprint(
        id="median",
        shape_zyx=figures["shape"],
        shape_after_crop_zyx=figures["shape"],
        spacing_zyx_mm=figures["spacing"],
        voxels_by_label={},
    )
    fingerprint = Fingerprint(
        dataset=figures["dataset"],
        digest=UNKNOWN,
        cases=(case,) * figures["cases"],
        intensities=(WINDOW,),
        median_relative_size_after_crop=1.0,
    )
    described = {
        "channel_names": {"0": "CT"},
        "labels": figures["labels"],
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": figures.get("reader"),
    }
    dataset = SimpleNamespace(name=figures["dataset"], json=DatasetJson.parse(described))
    return plan(dataset, fingerprint, name=name)


def test_every_file_is_known_here_and_named_in_the_readme():
    names = {path.stem for path in FOLDER.glob("*.json")}
    assert names == set(PUBLISHED)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"{name}.json" in readme for name in names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_plan_is_what_the_planner_decides(name):
    assert read_record(FOLDER / f"{name}.json", Plan) == planned(name)


@pytest.mark.parametrize(("name", "millions"), [("btcv_unet", 45.0), ("amos22_ct_unet", 45.0)])
def test_a_published_plan_builds_the_papers_network(name, millions):
    found = read_record(FOLDER / f"{name}.json", Plan)
    stage = found.stages["3d_fullres"]
    assert (stage.patch_size, stage.batch_size) == ((32, 256, 256), 2)
    with torch.device("meta"):
        network = build(stage.model, channels=1, outputs=found.labels.num_outputs)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_plan_moves_to_a_dataset_with_its_own_intensities(name):
    found = read_record(FOLDER / f"{name}.json", Plan)
    described = {"channel_names": {"0": "CT"}, "labels": PUBLISHED[name]["labels"], "file_ending": ".nii.gz"}
    dataset = SimpleNamespace(name="Dataset900_Mine", json=DatasetJson.parse(described))
    case = CaseFingerprint(
        id="a", shape_zyx=(9, 9, 9), shape_after_crop_zyx=(9, 9, 9), spacing_zyx_mm=(1, 1, 1), voxels_by_label={}
    )
    own = WINDOW.model_copy(update={"mean": 77.0})
    fingerprint = Fingerprint(
        dataset="Dataset900_Mine", digest="own", cases=(case,), intensities=(own,), median_relative_size_after_crop=1
    )
    mine = moved(found, dataset, fingerprint)
    assert (mine.fingerprint, mine.intensities, mine.dataset) == ("own", (own,), "Dataset900_Mine")
