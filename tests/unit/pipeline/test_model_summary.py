"""rfmed_summary: parameters by part, sizes of layers, memory; and a refusal before a training that cannot fit."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from rfmedsam2.cli.plans import summary_command
from rfmedsam2.errors import PlanError
from rfmedsam2.pipeline.planning.memory_estimate import FEATURE_BYTES, activation_terms, total_gib
from rfmedsam2.pipeline.planning.published_plans import published_plan
from rfmedsam2.pipeline.training.memory_check import check_memory
from rfmedsam2.pipeline.training.model_summary import summary
from rfmedsam2.records.plan import Plan

pytestmark = pytest.mark.slow

PLANS = Path(__file__).resolve().parents[3] / "plans"
GIB = 2**30


def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["rfmed_summary", *words])
    summary_command()
    return capsys.readouterr().out


def kept(plan: Plan, *, half: bool = False) -> float:
    found = plan.stages["3d_fullres"]
    return total_gib(activation_terms(found, outputs=14, classes=13, half=half))


def test_the_papers_table_8():
    found = summary(published_plan("btcv"), "3d_fullres")
    millions = {group: count / 1e6 for group, count in found.groups.items()}
    assert millions["SAM 2"] == pytest.approx(224.4, abs=0.06)
    assert millions["adapters"] == pytest.approx(19, rel=0.05)
    assert millions["U-Net"] == pytest.approx(45.5, abs=0.6)
    assert found.parameters - found.trained == found.groups["SAM 2"]
    assert sum(part.frozen for part in found.parts if part.group != "SAM 2") == 0


def test_sizes_of_layers_follow_the_plan():
    sizes = {(layer.part, layer.name): (layer.channels, layer.size) for layer in summary_of("btcv").layers}
    assert sizes["U-Net", "input"] == (1, (32, 256, 256))
    assert sizes["U-Net", "stage 6"] == (320, (4, 4, 4))
    assert sizes["U-Net", "logits"] == (14, (32, 256, 256))
    assert sizes["SAM 2", "embedding, stride 16"] == (256, (16, 16))
    assert sizes["SAM 2", "mask per object"] == (1, (64, 64))


def test_a_coarse_network_has_the_same_parameters_and_smaller_layers():
    plan = published_plan("btcv")
    coarse = plan.with_overrides("3d_fullres.patch_size=[64,512,512]", "3d_fullres.model.unet.input_stride=[2,2,2]")
    found, whole = summary(coarse, "3d_fullres"), summary_of("btcv")
    assert found.parts == whole.parts
    sizes = {layer.name: (layer.channels, layer.size) for layer in found.layers if layer.part == "U-Net"}
    assert sizes["input"] == (1, (64, 512, 512))
    assert sizes["means of blocks"] == (1, (32, 256, 256))
    assert sizes["stage 6"] == (320, (4, 4, 4))
    assert sizes["logits"] == (14, (64, 512, 512))
    terms = {term.name: term.gib for term in found.memory}
    fine = {term.name: term.gib for term in whole.memory}
    # the same feature maps per sample, and logits on eight times the voxels
    added = 14 * 64 * 512 * 512 * 2 * FEATURE_BYTES[False] / GIB
    assert terms["U-Net"] == pytest.approx(fine["U-Net"] + added)


def summary_of(name: str):
    return summary(published_plan(name), "3d_fullres")


def test_a_u_net_of_single_frames_and_a_generator_have_rows():
    flat = {layer.name: layer.size for layer in summary_of("btcv_step0_2d").layers if layer.part == "U-Net"}
    assert flat["input"] == (256, 256)
    assert summary_of("btcv_object_queries").groups["prompts"] > 1e6
    assert "U-Net" not in summary_of("btcv_object_queries").groups


@pytest.mark.parametrize("stage", ["3d_fullres", "3d_lowres", "2d"])
def test_a_u_net_alone_is_described_too(stage):
    found = summary(published_plan("btcv_unet"), stage)
    assert set(found.groups) == {"U-Net"}
    assert found.trained == found.parameters


def test_the_description_takes_seconds_and_no_memory_for_values():
    began = time.process_time()
    summary_of("btcv_patch_2x1024")
    assert time.process_time() - began < 10


def test_memory_grows_with_what_it_is_made_of():
    paper = published_plan("btcv")
    everything = paper.with_overrides("3d_fullres.compute.checkpointing=false", name="a")
    assert kept(everything) > 3 * kept(paper)  # with checkpointing at most a third
    assert kept(paper, half=True) < kept(paper)
    assert kept(paper.with_overrides("3d_fullres.batch_size=4", name="a")) > kept(paper) + 10
    assert kept(paper.with_overrides("3d_fullres.model.refinements=1", name="a")) < kept(paper)
    assert kept(paper.with_overrides("3d_fullres.compute.memory_mb=8192", name="a")) > kept(paper)
    assert kept(everything.with_overrides("3d_fullres.sampling.max_prompted_objects=100", name="a")) < kept(everything)


def test_a_plan_too_large_for_the_memory_is_refused_before_it_starts():
    plan = published_plan("btcv_patch_2x1024")
    with pytest.raises(
        PlanError, match=r"not enough memory.*btcv_patch_2x1024.*about \d+\.\d GiB.*U-Net.*8\.0 GiB"
    ) as e:
        check_memory(plan, "3d_fullres", 8 * GIB)
    assert "batch_size (now 2)" in str(e.value)
    assert "frame_size (now 1024)" in str(e.value)
    check_memory(plan, "3d_fullres", 80 * GIB)
    check_memory(published_plan("btcv_unet"), "3d_fullres", 8 * GIB, half=True)


def test_the_papers_plan_fits_24_gib_in_mixed_precision():
    found = summary_of("btcv")
    assert 14 < total_gib(found.memory_half) < 17  # far below 24 GiB, without the tolerance
    check_memory(published_plan("btcv"), "3d_fullres", 24 * GIB, half=True)
    with pytest.raises(PlanError, match=r"12\.0 GiB"):
        check_memory(published_plan("btcv"), "3d_fullres", 12 * GIB, half=True)


def test_the_command_shows_a_file(monkeypatch, capsys):
    shown = asked(monkeypatch, capsys, str(PLANS / "btcv.json"))
    assert "224.447" in shown
    assert "32 x 256 x 256" in shown
    assert "class maps and losses" in shown


def test_the_command_gives_json_alone(monkeypatch, capsys):
    found = json.loads(asked(monkeypatch, capsys, str(PLANS / "btcv_unet.json"), "--configuration", "2d", "--json"))
    assert found["stage"] == "2d"
    assert found["parameters"] == found["trained"] == sum(part["parameters"] for part in found["parts"])
    assert found["memory_half_gib"] < found["memory_gib"]


def test_a_plan_is_named_by_its_dataset_as_well(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "preprocessed" / "Dataset217_BTCV"
    folder.mkdir(parents=True)
    (folder / "btcv.json").write_text((PLANS / "btcv.json").read_text())
    shown = asked(monkeypatch, capsys, "btcv", "-d", "BTCV", "--root", str(tmp_path))
    assert "Plan btcv, 3d_fullres" in shown


def test_a_missing_file_or_stage_is_a_sentence(monkeypatch, capsys):
    for words in ((str(PLANS / "none.json"),), (str(PLANS / "btcv.json"), "-c", "2d")):
        monkeypatch.setattr(sys, "argv", ["rfmed_summary", *words])
        with pytest.raises(SystemExit) as stopped:
            summary_command()
        assert stopped.value.code == 2
        assert "rfmed_summary: " in capsys.readouterr().err


def test_nothing_is_left_on_the_meta_device():
    summary_of("btcv_gt")
    assert torch.empty(1).device.type == "cpu"
