"""RFMedSAM 2 trained for two steps on the phantom, every variant; what it starts from; faults named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rfmedsam2.engine.monitoring.log import read_events
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.models import build_stage
from rfmedsam2.pipeline.training.pretrained import load_pretrained
from rfmedsam2.pipeline.training.train import TrainOptions, train
from rfmedsam2.records.model import AdapterConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Compute, Plan, Sampling, Split, Stage, Validation
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.checkpoints import read_weights
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.system.atomic import read_record
from rfmedsam2.tasks.rfmedsam2 import RFMedSam2Task

PHANTOM = "Dataset900_PhantomCT"
QUIET = TrainOptions(device="cpu", validate=False)
SCRATCH = {"freeze_backbone": False, "adapters": AdapterConfig(blocks="none", convolutions="none")}
VARIANTS: dict[str, dict[str, object]] = {
    "as_published": {},
    "conditioning_memory": {"strategy": "sam2"},
    "following_memory": {"strategy": "following"},
    "memory_both_ways": {"strategy": "both"},
    "one_refinement": {"refinements": 1},
    "object_queries": {"generator": "object_queries", "unet": None},
    "scored_object_queries": {"generator": "scored_object_queries", "unet": None, "object_scores": True},
    "point_embeddings": {"generator": "point_embeddings", "unet": None},
    "hierarchical_masks": {"generator": "hierarchical_masks", "unet": None},
    "reference_boxes": {"generator": "gt", "unet": None},
    "reference_boxes_scored": {"generator": "gt", "unet": None, "object_scores": True},
    "object_scores": {"object_scores": True},
    "no_mask_prompt": {"mask_prompt": False},
    "detail": {"output": "detail"},
    "correct": {"output": "correct", **SCRATCH},
    "gated": {"output": "gated", "step2_mask_prompt": "one_against_rest", "given_boxes": "replace", **SCRATCH},
    "plain_adapters": {"adapters": AdapterConfig(blocks="plain", convolutions="none")},
    "larger_frames": {"frame_size": 64},
}


def unet(dimensions: int = 3, *, attention: bool = False, input_stride: tuple[int, ...] | None = None) -> UNetConfig:
    return UNetConfig(
        features=(4, 8),
        kernel_sizes=((3,) * dimensions,) * 2,
        strides=((1,) * dimensions, (2,) * dimensions),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
        attention=attention,
        input_stride=input_stride,
    )


UNETS = {
    "flat_prompter": unet(2),
    "flat_prompter_with_attention": unet(2, attention=True),
    "prompter_with_attention": unet(attention=True),
    "coarse_prompter": unet(input_stride=(2, 4, 4)),
    "flat_coarse_prompter": unet(2, input_stride=(4, 2)),
}


@pytest.fixture
def layout(planned_root, tmp_path) -> Layout:
    return Layout(raw=planned_root / "raw", preprocessed=planned_root / "preprocessed", results=tmp_path / "results")


def stage_of(plan: Plan, patch: tuple[int, ...] = (8, 32, 32), **fields: object) -> Stage:
    given: dict[str, object] = {"unet": unet(), "backbone": "nano", "frame_size": 32, "freeze_backbone": False}
    return plan.stages["3d_fullres"].model_copy(
        update={
            "patch_size": patch,
            "batch_size": 1,
            "model": RFMedSam2Config(**(given | fields)),
            "compute": Compute(memory_mb=256),
            "validation": Validation(patches_while_training=1),
            "train": TrainConfig(epochs=1, iterations_per_epoch=2, workers=0, compile="off"),
        }
    )


def planned(layout: Layout, patch: tuple[int, ...] = (8, 32, 32), **fields: object) -> Plan:
    plan = read_record(layout.plan_file(PHANTOM, "rfmed_cpu"), Plan)
    return plan.model_copy(update={"stages": {"3d_fullres": stage_of(plan, patch, **fields)}})


def losses_of(folder: Path) -> set[str]:
    return {name for event in read_events(folder / "metrics.jsonl") for name in event.get("losses", {})}


def scores_of(folder: Path) -> set[str]:
    return {name for event in read_events(folder / "metrics.jsonl") for name in event.get("scores", {})}


@pytest.mark.parametrize("variant", [*VARIANTS, *UNETS])
def test_every_variant_trains(layout, variant):
    fields = {"unet": UNETS[variant]} if variant in UNETS else VARIANTS[variant]
    result = train(layout, planned(layout, **fields), "3d_fullres", fold="0", options=QUIET)
    assert result.progress.step == 2
    losses = losses_of(result.folder)
    last = fields.get("refinements", 2)
    assert {f"step{last}/cross_entropy", f"step{last}/dice", "step1/dice"} <= losses
    assert ("step0/dice" in losses) == (fields.get("generator", "unet") in ("unet", "hierarchical_masks"))
    assert ("step1/object_score" in losses) == bool(fields.get("object_scores"))
    assert ("step0/box_giou" in losses) == ("object_queries" in str(fields.get("generator")))


@pytest.mark.parametrize("patch", [(2, 64, 64), (4, 32, 32), (8, 32, 32)])
def test_patches_of_any_depth_train(layout, patch):
    result = train(layout, planned(layout, patch, frame_size=patch[1]), "3d_fullres", fold="0", options=QUIET)
    assert result.progress.step == 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_runs_of_prompts_and_given_boxes_train(layout, share):
    plan = planned(layout, **VARIANTS["gated"])
    stage = plan.stages["3d_fullres"]
    sampling = Sampling(max_prompted_objects=6, prompted_runs=True, given_box_share=share)
    stage = stage.model_copy(update={"sampling": sampling})
    result = train(layout, plan.model_copy(update={"stages": {"3d_fullres": stage}}), "3d_fullres", options=QUIET)
    gates = read_weights(result.folder / "checkpoint_final.safetensors")[1]["gates.weight"]
    # boxes that are given replace Step 0's masks, past the gates
    assert bool(gates.any()) is (share == 0)


def test_gates_have_their_own_learning_rate(layout):
    plan = planned(layout, **VARIANTS["gated"], gate_learning_rate=0.25)
    stage = plan.stages["3d_fullres"]
    store = CaseStore(layout.cases_folder(PHANTOM, plan.name, "3d_fullres"))
    split = Split(train=store.ids()[:1], val=store.ids()[:1])
    task = RFMedSam2Task(plan, "3d_fullres", store=store, split=split, runtime=Runtime(device=torch.device("cpu")))
    others, gates = task.optimizer().param_groups
    assert (others["lr"], gates["lr"], gates["weight_decay"]) == (stage.train.learning_rate, 0.25, 0)
    assert [p.shape for p in gates["params"]] == [task.model.gates.weight.shape]
    assert len(others["params"]) + 1 == sum(p.requires_grad for p in task.model.parameters())


def test_scores_are_logged_by_step_and_class(layout):
    scores = scores_of(train(layout, planned(layout), "3d_fullres", fold="0", options=QUIET).folder)
    assert {"step0/dsc", "step1/dsc", "step2/dsc", "score", "step0/dsc/liver", "step2/dsc/liver"} <= scores


def test_frozen_weights_that_were_never_given_are_asked_for(layout):
    plan = planned(layout, backbone="mobile_sam", frame_size=64, freeze_backbone=True)
    with pytest.raises(UsageError, match=r"mobile_sam.pt"):
        train(layout, plan, "3d_fullres", fold="0", options=QUIET)


def test_step_0_starts_from_a_trained_unet_of_the_same_plan(layout, tmp_path):
    plan = planned(layout)
    alone = plan.stages["3d_fullres"].model_copy(update={"model": unet()})
    first = train(layout, plan.model_copy(update={"stages": {"3d_fullres": alone}}), "3d_fullres", options=QUIET)
    checkpoint = first.folder / "checkpoint_final.safetensors"
    network = build_stage(plan, plan.stages["3d_fullres"])
    record, notes = load_pretrained(network, plan, fold="0", sam=None, unet=checkpoint)
    assert record == read_record_of(checkpoint)
    assert "scratch" in notes[0]
    assert "Step 0 starts from this U-Net" in notes[1]
    assert len(notes) == 2
    for folder in (first.folder, first.folder.parent):
        assert load_pretrained(network, plan, fold="0", sam=None, unet=folder)[1] == notes
    with pytest.raises(UsageError, match=r"fold has not been trained.*one or several of 0. Found 1"):
        load_pretrained(network, plan, fold="1", sam=None, unet=first.folder.parent)
    assert (
        "in the validation set of fold 1" in load_pretrained(network, plan, fold="1", sam=None, unet=first.folder)[1][2]
    )
    own = network.unet.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in read_weights(checkpoint)[1].items())
    wider = planned(layout, unet=UNetConfig(**(unet().model_dump() | {"features": (8, 8)})))
    options = TrainOptions(device="cpu", validate=False, unet=checkpoint)
    elsewhere = Layout(raw=layout.raw, preprocessed=layout.preprocessed, results=tmp_path / "others")
    with pytest.raises(CheckpointError, match=r"features \(8, 8\).* another network: features \(4, 8\)"):
        train(elsewhere, wider, "3d_fullres", options=options)
    coarse = planned(layout, unet=unet(input_stride=(2, 2, 2)))  # its tensors are the same
    with pytest.raises(CheckpointError, match=r"input_stride \(2, 2, 2\).* another network: input_stride None"):
        train(elsewhere, coarse, "3d_fullres", options=options)


def test_step_0_starts_from_another_rfmedsam2(layout):
    first = train(layout, planned(layout), "3d_fullres", options=QUIET)
    gated = planned(layout, **VARIANTS["gated"])
    network = build_stage(gated, gated.stages["3d_fullres"])
    _, notes = load_pretrained(network, gated, fold="0", sam=None, unet=first.folder)
    assert "starts from the U-Net in this RFMedSAM 2 (step 2)" in notes[1]
    trained = read_weights(first.folder / "checkpoint_final.safetensors")[1]
    own = network.unet.state_dict()
    assert all(torch.equal(tensor, trained[f"unet.{name}"]) for name, tensor in own.items())
    wider = planned(layout, unet=UNetConfig(**(unet().model_dump() | {"features": (8, 8)})))
    with pytest.raises(CheckpointError, match="another network"):
        load_pretrained(build_stage(wider, wider.stages["3d_fullres"]), wider, fold="0", sam=None, unet=first.folder)


def test_a_trained_rfmedsam2_is_fine_tuned_as_a_whole(layout, tmp_path):
    first = train(layout, planned(layout), "3d_fullres", options=QUIET)
    record, given = read_weights(first.folder / "checkpoint_final.safetensors")
    elsewhere = Layout(raw=layout.raw, preprocessed=layout.preprocessed, results=tmp_path / "tuned")
    slow = planned(layout).with_overrides("3d_fullres.train.learning_rate=1e-12")
    tuned = train(elsewhere, slow, "3d_fullres", options=replace(QUIET, weights=first.folder))
    after, own = read_weights(tuned.folder / "checkpoint_final.safetensors")
    assert after.started_from == record.weights_sha256
    assert own.keys() == given.keys()
    assert all(torch.allclose(own[name].float(), given[name].float(), atol=1e-6) for name in own)


def test_an_rfmedsam2_without_a_unet_is_named(layout):
    boxes = planned(layout, **VARIANTS["reference_boxes"])
    first = train(layout, boxes, "3d_fullres", options=QUIET)
    plan = planned(layout)
    network = build_stage(plan, plan.stages["3d_fullres"])
    with pytest.raises(
        CheckpointError, match=r"Expected a U-Net. Found an RFMedSAM 2 with generator gt, which has none"
    ):
        load_pretrained(network, plan, fold="0", sam=None, unet=first.folder)


def test_a_plain_unet_takes_no_weights_of_sam2(layout, tmp_path):
    plan = planned(layout)
    alone = plan.stages["3d_fullres"].model_copy(update={"model": unet()})
    options = TrainOptions(device="cpu", validate=False, sam=tmp_path / "sam2.pt")
    with pytest.raises(UsageError, match="trained as RFMedSAM 2"):
        train(layout, plan.model_copy(update={"stages": {"3d_fullres": alone}}), "3d_fullres", options=options)


@pytest.mark.parametrize("variant", ["as_published", "reference_boxes", "object_queries"])
def test_whole_volumes_can_be_validated_while_training(layout, variant):
    plan = planned(layout, **VARIANTS[variant])
    stage = plan.stages["3d_fullres"].model_copy(update={"validation": Validation(cases_while_training=1)})
    plan = plan.model_copy(update={"stages": {"3d_fullres": stage}})
    result = train(layout, plan, "3d_fullres", fold="0", options=QUIET)
    assert {"step1/dsc", "step2/dsc/liver"} <= set(result.progress.scores)
    assert 0 <= result.progress.scores["score"] <= 1
