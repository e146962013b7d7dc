"""Every file of plans/ loads, is what its recipe gives, is in the README, moves to a dataset and builds its network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rfmedsam2.errors import PlanError, UsageError
from rfmedsam2.models import build_stage
from rfmedsam2.pipeline.planning.overrides import adapt_plan_to_dataset
from rfmedsam2.pipeline.planning.published_plans import PUBLISHED, UNKNOWN, WINDOW, published_plan
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import CaseFingerprint, Fingerprint
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Plan
from rfmedsam2.system.atomic import read_record

FOLDER = Path(__file__).resolve().parents[3] / "plans"


def stored(name: str) -> Plan:
    return read_record(FOLDER / f"{name}.json", Plan)


def refined(name: str) -> RFMedSam2Config:
    model = published_plan(name).stages["3d_fullres"].model
    assert isinstance(model, RFMedSam2Config)
    return model


def own(labels: dict[str, int]) -> tuple[SimpleNamespace, Fingerprint]:
    """A user's dataset with these labels, and its fingerprint."""
    described = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    case = CaseFingerprint(
        id="a", shape_zyx=(9, 9, 9), shape_after_crop_zyx=(9, 9, 9), spacing_zyx_mm=(1, 1, 1), voxels_by_label={}
    )
    fingerprint = Fingerprint(
        dataset="Dataset900_Mine",
        digest="own",
        cases=(case,),
        intensities=(WINDOW.model_copy(update={"mean": 77.0}),),
        median_relative_size_after_crop=1,
    )
    return SimpleNamespace(name="Dataset900_Mine", json=DatasetJson.parse(described)), fingerprint


def test_every_file_has_a_recipe_and_a_row_in_the_readme():
    names = {path.stem for path in FOLDER.glob("*.json")}
    assert names == set(PUBLISHED)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}.json`" not in readme] == []


def test_an_unknown_name_is_a_sentence():
    with pytest.raises(UsageError, match=r"published plan does not exist.*btcv_1024.*btcv_patch_2x1024"):
        published_plan("btcv_1024")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_plan_is_what_its_recipe_gives(name):
    assert stored(name) == published_plan(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_plan_builds_its_networks(name):
    found = stored(name)
    for stage in found.stages.values():
        with torch.device("meta"):
            assert sum(p.numel() for p in build_stage(found, stage).parameters()) > 30e6


def test_the_papers_u_net_has_45_million_parameters():
    found = stored("btcv_unet")
    stage = found.stages["3d_fullres"]
    assert (stage.patch_size, stage.batch_size) == ((32, 256, 256), 2)
    with torch.device("meta"):
        network = build_stage(found, stage)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(45.0, abs=0.05)


@pytest.mark.parametrize("name", ["btcv", "amos22_ct"])
def test_the_papers_model_is_planned(name):
    found = published_plan(name)
    stage, model = found.stages["3d_fullres"], refined(name)
    assert list(found.stages) == ["3d_fullres"]
    assert (stage.patch_size, stage.batch_size) == ((32, 256, 256), 2)
    assert (stage.train.optimizer.kind, stage.train.learning_rate, stage.train.epochs) == ("sgd", 1e-3, 1000)
    assert (model.backbone, model.frame_size, model.freeze_backbone) == ("sam2_large", 256, True)
    assert (model.generator, model.refinements, model.strategy, model.output) == ("unet", 2, "preceding", "replace")
    assert (model.adapters.blocks, model.adapters.convolutions, model.adapters.encoder) == ("dwconv", "cnn", True)
    assert model.unet == published_plan(f"{name}_unet").stages["3d_fullres"].model


def test_ablations_differ_from_the_paper_in_what_they_are_about():
    assert [refined(f"btcv_gt_memory_{s}").strategy for s in ("sam2", "preceding", "following", "both")] == [
        "sam2",
        "preceding",
        "following",
        "both",
    ]
    assert refined("btcv_gt").unet is None
    assert refined("btcv_one_refinement").refinements == 1
    assert refined("btcv_gt_no_object_scores") == refined("btcv_gt").model_copy(update={"object_scores": False})
    assert refined("btcv_object_scores") == refined("btcv").model_copy(update={"object_scores": True})


@pytest.mark.parametrize(
    ("name", "patch", "stages"), [("btcv_patch_2x1024", (2, 1024, 1024), 9), ("btcv_patch_8x512", (8, 512, 512), 8)]
)
def test_the_papers_other_patches_have_the_same_voxels(name, patch, stages):
    stage, model = published_plan(name).stages["3d_fullres"], refined(name)
    assert stage.patch_size == patch
    assert model.frame_size == patch[1]
    assert model.unet is not None
    assert len(model.unet.features) == stages


def test_step_0_may_see_single_frames():
    model = refined("btcv_step0_2d_attention")
    assert model.unet is not None
    assert (model.unet.dimensions, model.unet.attention) == (2, True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_plan_moves_to_a_dataset_with_its_own_intensities(name):
    found = stored(name)
    assert found.fingerprint == UNKNOWN
    mine = adapt_plan_to_dataset(found, *own(PUBLISHED[name].data.labels))
    assert (mine.fingerprint, mine.intensities[0].mean, mine.dataset) == ("own", 77.0, "Dataset900_Mine")
    assert mine.stages == found.stages


def test_a_plan_of_other_classes_is_refused():
    with pytest.raises(PlanError, match=r"14 classes with background.*2 classes in Dataset900_Mine"):
        adapt_plan_to_dataset(stored("btcv"), *own({"background": 0, "liver": 1}))
