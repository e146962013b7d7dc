"""Cross-fitted Step 0 on the phantom, two steps a network: out-of-fold logits, resume, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import run_error, run_ok
from support.small_rfmedsam2 import small_unet

from rfmedsam2.engine.monitoring.log import read_events
from rfmedsam2.errors import StoreError, UsageError
from rfmedsam2.inference.sliding_window import predict_logits
from rfmedsam2.models import load_network
from rfmedsam2.nn.refinement_state import relative_to_background
from rfmedsam2.pipeline.training.train import TrainOptions, train
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import CrossFit, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Compute, Plan, Validation
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.store.checkpoint_header import FINAL, read_header
from rfmedsam2.store.checkpoints import read_weights
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.step0_logits import LogitsStore

PHANTOM, STAGE, NAME = "Dataset900_PhantomCT", "3d_fullres", "rfmed_cpu"
QUIET = TrainOptions(device="cpu", validate=False)
UNET = small_unet()
AUGMENTED = ("rotation_probability", "scale_probability", "noise_probability")


@pytest.fixture
def layout(planned_root: Path, tmp_path: Path) -> Layout:
    """A copy of the preprocessed cases, since logits are stored beside them."""
    shutil.copytree(planned_root / "preprocessed", tmp_path / "preprocessed")
    return Layout(raw=planned_root / "raw", preprocessed=tmp_path / "preprocessed", results=tmp_path / "results")


def crossfit_plan(layout: Layout, *, folds: int = 2, **fields: object) -> Plan:
    plan = Plan.load(layout.plan_file(PHANTOM, NAME))
    model = RFMedSam2Config(
        **{
            "unet": UNET,
            "backbone": "nano",
            "frame_size": 32,
            "freeze_backbone": False,
            "step0": "crossfit",
            "crossfit": CrossFit(folds=folds, iterations=2),
            **fields,
        }
    )
    stage = plan.stages[STAGE].model_copy(
        update={
            "patch_size": (8, 32, 32),
            "batch_size": 1,
            "model": model,
            "compute": Compute(memory_mb=256),
            "validation": Validation(patches_while_training=1),
            "train": TrainConfig(epochs=1, iterations_per_epoch=2, workers=0, compile="off"),
        }
    )
    return plan.model_copy(update={"stages": {STAGE: stage}})


def places(layout: Layout) -> tuple[CaseStore, LogitsStore, Path]:
    cases = layout.cases_folder(PHANTOM, NAME, STAGE)
    unets = layout.model_folder(PHANTOM, NAME, STAGE) / "step0_fold_0"
    return CaseStore(cases), LogitsStore(cases / "step0_fold_0"), unets


def logits_of(checkpoint: Path, plan: Plan, store: CaseStore, case: str) -> np.ndarray:
    _, network = load_network(checkpoint)
    stage = plan.stages[STAGE]
    found = predict_logits(
        [network],
        store.open(case).image(),
        patch_size=stage.patch_size,
        inference=stage.inference,
        mirror_axes=stage.augmentation.mirror_axes,
        device="cpu",
        outputs=plan.labels.num_outputs,
    )
    return relative_to_background(found[None], regions=False)[0].numpy()


@pytest.mark.parametrize("unet", [UNET, small_unet(input_stride=(1, 2, 2))], ids=["fine", "coarse"])
def test_every_case_has_logits_of_a_network_that_was_not_trained_on_it(layout: Layout, unet: UNetConfig) -> None:
    plan = crossfit_plan(layout, unet=unet)
    result = train(layout, plan, STAGE, fold="0", options=QUIET)
    assert result.progress.step == 2
    store, logits, unets = places(layout)
    split = json.loads(layout.splits_file(PHANTOM).read_text())[0]
    trained_on = {
        part: set(read_header(unets / part / FINAL, CheckpointRecord).record.cases.train)
        for part in ("part_0", "part_1", "all")
    }
    assert trained_on["all"] == set(split["train"])
    assert trained_on["part_0"] | trained_on["part_1"] == set(split["train"])
    for case in (*split["train"], *split["val"]):
        stored = logits.open(case)
        part = "all" if case in split["val"] else next(p for p, cases in trained_on.items() if case not in cases)
        expected = logits_of(unets / part / FINAL, plan, store, case)
        found = stored.patch([(0, n) for n in stored.shape])
        assert np.abs(found - expected).max() <= 2e-3 * max(1.0, np.abs(expected).max())
    # Step 0 of the model is the U-Net trained on all cases, and Steps 1 and 2 have not changed it
    own, all_cases = read_weights(result.folder / FINAL)[1], read_weights(unets / "all" / FINAL)[1]
    assert all(torch.equal(own[f"unet.{name}"], tensor) for name, tensor in all_cases.items())
    losses = {name for event in read_events(result.folder / "metrics.jsonl") for name in event.get("losses", {})}
    assert {"step1/dice", "step2/dice"} <= losses
    assert not {name for name in losses if name.startswith("step0")}
    scores = {name for event in read_events(result.folder / "metrics.jsonl") for name in event.get("scores", {})}
    assert {"step0/dsc", "step2/dsc"} <= scores


def test_a_killed_run_goes_on_and_a_changed_one_begins_again(layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    plan = crossfit_plan(layout)
    first = train(layout, plan, STAGE, fold="0", options=QUIET)
    _, logits, unets = places(layout)
    split = json.loads(layout.splits_file(PHANTOM).read_text())[0]
    kept, lost = split["val"][0], split["train"][0]
    before = {path: path.stat().st_mtime_ns for path in (logits.folder / f"{kept}.b2nd", unets / "part_0" / FINAL)}
    lost_bytes = (logits.folder / f"{lost}.b2nd").read_bytes()
    (logits.folder / f"{lost}.json").unlink()  # as if killed between array and record
    shutil.rmtree(unets / "part_1")
    again = train(layout, plan, STAGE, fold="0", options=QUIET)
    assert again.progress.step == first.progress.step
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (logits.folder / f"{lost}.b2nd").read_bytes() == lost_bytes
    # damaged logits are made again, too
    (logits.folder / f"{lost}.b2nd").write_bytes(lost_bytes[:-1] + bytes([lost_bytes[-1] ^ 1]))
    train(layout, plan, STAGE, fold="0", options=QUIET)
    assert (logits.folder / f"{lost}.b2nd").read_bytes() == lost_bytes
    # other U-Nets: the old ones are moved aside, and the refinement that learned from their logits is not continued
    longer = crossfit_plan(layout, crossfit=CrossFit(folds=2, iterations=3))
    with pytest.raises(Exception, match="of another training"):
        train(layout, longer, STAGE, fold="0", options=QUIET)
    assert read_header(unets / "all" / FINAL, CheckpointRecord).record.step == 4  # whole epochs of 2
    assert "Moved the previous contents" in caplog.text


def test_a_stored_logit_moves_with_its_voxel(layout: Layout) -> None:
    """With logits that are the image itself, image and logits of an augmented patch are equal."""
    from rfmedsam2.engine.rng import seed_all
    from rfmedsam2.tasks.patches import OUTSIDE_LOGIT, Beside, PatchSource

    plan = crossfit_plan(layout)
    stage = plan.stages[STAGE]
    silent = {name: 0.0 for name in type(stage.augmentation).model_fields if name.endswith("_probability")}
    spatial = silent | {"rotation_probability": 1.0, "scale_probability": 1.0}
    stage = stage.model_copy(update={"augmentation": stage.augmentation.model_copy(update=spatial), "batch_size": 2})
    store, logits, _ = places(layout)
    for case in store.ids():
        stored = store.open(case)
        logits.write(case, stored.image() + OUTSIDE_LOGIT, stored.record, weights="w", settings="s")
    source = PatchSource(
        store, store.ids(), stage, labels=plan.labels, augment=True, seed=3, beside=Beside(step0=logits)
    )
    for number in range(4):
        seed_all(number)
        batch = source.batch(number)
        assert batch.step0 is not None
        assert (batch.step0 - OUTSIDE_LOGIT - batch.image).abs().max() < 0.02  # float16
        assert batch.image.std() > 0.1


def test_fewer_cases_than_parts_and_too_small_a_disk_are_sentences(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"fewer training cases.*at least 50 cases.*Found \d+ training case"):
        train(layout, crossfit_plan(layout, folds=50), STAGE, fold="0", options=QUIET)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"too little room.*Expected .* GB for \d+ case\(s\) of 13 class"):
        train(layout, crossfit_plan(layout), STAGE, fold="0", options=QUIET)
    _, logits, unets = places(layout)
    assert not logits.folder.exists()
    assert not unets.exists()


def test_the_command_trains_it_whole(layout: Layout, tmp_path: Path) -> None:
    joint = crossfit_plan(layout, step0="joint")
    joint.model_copy(update={"name": "small"}).save(layout.plan_file(PHANTOM, "small"))
    shutil.copytree(layout.cases_folder(PHANTOM, NAME, STAGE), layout.cases_folder(PHANTOM, "small", STAGE))
    (tmp_path / "raw").symlink_to(layout.raw)
    words = ("train", STAGE, "fold", 0, "-p", "small", "--root", tmp_path, "--device", "cpu", "--no-validate")
    done = run_ok(*words, "--step0", "crossfit")
    assert "Trained" in done.out
    final = layout.fold_folder(PHANTOM, "small", STAGE, "0") / FINAL
    record = read_header(final, CheckpointRecord).record
    assert record.plan.stages[STAGE].model.step0 == "crossfit"
    assert record.step0 is not None
    assert "Already trained" in run_ok(*words, "--step0", "crossfit").out
    assert "step0 was 'crossfit', is 'joint'" in run_error(*words)
    unet = ("train", STAGE, "fold", 0, "-p", NAME, "--root", tmp_path, "--step0", "crossfit")
    assert "RFMedSAM 2" in run_error(*unet)


def test_it_trains_its_own_unets(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"step0='crossfit' trains the U-Nets"):
        train(layout, crossfit_plan(layout), STAGE, options=TrainOptions(device="cpu", unet=tmp_path / "unet"))
