"""The loop: what a task meets, what is written, and what ends it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support.toy_task import ToyBatch, ToyTask, make_config, make_run, timeless, weights_of
from torch.nn import functional as F

from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.rng import capture
from rfmedsam2.engine.runtime import Runtime, choose_precision, start_runtime, to_device
from rfmedsam2.errors import DivergedError, PlanError, UsageError
from rfmedsam2.records.training import PolySchedule, Sgd, WarmupPolySchedule
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.checkpoints import read_all, read_weights
from rfmedsam2.system.devices import choose_device
from rfmedsam2.system.progress import OnStep

OFTEN = 1e-9


def test_the_loop_is_a_bare_torch_loop(tmp_path):
    """Same weights, to the bit, as the ten lines that one would write by hand."""
    config = make_config(accumulation=2, clip_norm=0.5, schedule=PolySchedule(per="iteration"), seed=3)
    task = ToyTask(config, dropout=0.0)
    fit(task, config, make_run(tmp_path))
    bare = ToyTask(config, dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in bare.model.parameters() if p.requires_grad], lr=0.05, weight_decay=3e-5)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 20) ** 0.9
        for micro in range(2):
            (sum(bare.loss(bare.batch(2 * step + micro)).values()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(bare.model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(task.model.state_dict().items(), bare.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_training_lowers_the_loss_and_says_how_it_went(tmp_path):
    config = make_config(epochs=20)
    reports = []
    progress = fit(ToyTask(config, dropout=0.0), config, make_run(tmp_path, track=OnStep(reports.append)))
    losses = [e["loss"] for e in timeless(tmp_path) if e["event"] == "step"]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert (progress.status, progress.step, progress.epoch, progress.signal) == ("finished", 100, 20, None)
    assert progress.best == max(e["scores"]["score"] for e in timeless(tmp_path) if e["event"] == "validation")
    assert progress.seconds > 0
    assert [r.step for r in reports if r.scores is None] == list(range(1, 101))
    assert len([r for r in reports if r.scores]) == 20
    assert reports[-1].eta_seconds == 0


def test_events_name_losses_and_scores(tmp_path):
    config = make_config(epochs=1)
    fit(ToyTask(config), config, make_run(tmp_path))
    *steps, validation = timeless(tmp_path)
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5]
    for event in steps:
        assert event["loss"] == pytest.approx(event["losses"]["square"] + event["losses"]["absolute"])
        assert (event["epoch"], event["lr"]) == (0, 0.05)
    assert (validation["event"], validation["step"], set(validation["scores"])) == ("validation", 5, {"score", "other"})
    assert (tmp_path / "metrics.csv").read_text().startswith("epoch,step,loss,")


def test_final_and_best_hold_weights_alone_and_latest_everything(tmp_path):
    config = make_config()
    task = ToyTask(config)
    fit(task, config, make_run(tmp_path))
    for name in ("final", "best"):
        _, tensors, state = read_all(tmp_path / f"checkpoint_{name}.safetensors")
        assert all(n.startswith("model/") for n in tensors)
        assert state == {}
    latest = read_all(tmp_path / "checkpoint_latest.safetensors")[1]
    assert {n.split("/")[0] for n in latest} == {"model", "optimizer", "random"}
    weights = read_weights(tmp_path / "checkpoint_final.safetensors")[1]
    assert all(torch.equal(t, weights[n]) for n, t in task.model.state_dict().items())
    best = read_record_of(tmp_path / "checkpoint_best.safetensors")
    scores = {e["step"]: e["scores"] for e in timeless(tmp_path) if e["event"] == "validation"}
    assert scores[best.step] == best.scores == max(scores.values(), key=lambda s: s["score"])


def test_how_often_one_validates_changes_no_weight(tmp_path):
    for n in (1, 3):
        config = make_config(validate_every_epochs=n)
        task = ToyTask(config)
        fit(task, config, make_run(tmp_path / str(n)))
        assert task.validations == {1: 4, 3: 2}[n]
    assert weights_of(tmp_path / "1") == weights_of(tmp_path / "3")


def test_the_generators_around_are_left_as_they_were_and_do_not_matter(tmp_path):
    config = make_config(epochs=1)
    for n in (1, 2):
        task = ToyTask(config)
        torch.manual_seed(n)
        before = capture()
        fit(task, config, make_run(tmp_path / str(n)))
        assert all(torch.equal(t, before[name]) for name, t in capture().items() if name != "gauss")
    assert weights_of(tmp_path / "1") == weights_of(tmp_path / "2")


def test_another_seed_is_another_training(tmp_path):
    for seed in (0, 1):
        config = make_config(epochs=1, seed=seed)
        fit(ToyTask(config), config, make_run(tmp_path / str(seed)))
    assert weights_of(tmp_path / "0") != weights_of(tmp_path / "1")


def test_frozen_weights_stay(tmp_path):
    config = make_config(epochs=1)
    task = ToyTask(config)
    before = task.model.frozen.weight.clone()
    fit(task, config, make_run(tmp_path))
    assert torch.equal(task.model.frozen.weight, before)


def test_a_loss_that_is_not_finite_names_step_and_cases_and_spares_the_last_good_checkpoint(tmp_path):
    config = make_config(accumulation=2, checkpoint_minutes=OFTEN)
    task = ToyTask(config)
    task.nan_at = 13
    with pytest.raises(DivergedError, match=r"step 6.*cases case_12, case_13.*square nan"):
        fit(task, config, make_run(tmp_path))
    record, tensors, _ = read_all(tmp_path / "checkpoint_latest.safetensors")
    assert record.step == 6
    assert all(torch.isfinite(t).all() for n, t in tensors.items() if n.startswith("model/"))
    assert [e["step"] for e in timeless(tmp_path) if e["event"] == "step"] == list(range(1, 7))


def test_a_gradient_that_is_not_finite_ends_training_before_it_is_saved(tmp_path):
    class Steep(ToyTask):
        def loss(self, batch: ToyBatch):
            # the value is finite everywhere, the slope at 0 is not
            return {"root": (self.model.out.weight * 0).abs().sqrt().sum()}

    config = make_config(checkpoint_minutes=OFTEN)
    with pytest.raises(DivergedError, match="gradient norm nan"):
        fit(Steep(config), config, make_run(tmp_path))
    assert not (tmp_path / "checkpoint_latest.safetensors").exists()


def test_checkpoints_come_by_the_clock(tmp_path):
    config = make_config(epochs=1, iterations_per_epoch=6, checkpoint_minutes=0.1 / 60)
    task = ToyTask(config)
    seen = {}
    path = tmp_path / "checkpoint_latest.safetensors"
    for number in range(6):
        task.at[number] = lambda n=number: (
            seen.__setitem__(n, read_record_of(path).step if path.exists() else 0),
            time.sleep(0.12 if n == 2 else 0),
        )
    fit(task, config, make_run(tmp_path))
    assert seen == {0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 3} or min(seen[3], 3) == 3


def test_too_few_batches_are_told(tmp_path):
    config = make_config()
    task = ToyTask(config)
    task.batches = lambda start: iter([task.batch(0)])
    with pytest.raises(UsageError, match="ended before training did: step 1"):
        fit(task, config, make_run(tmp_path))


def test_bf16_trains_on_the_cpu(tmp_path):
    config = make_config(epochs=2)
    runtime = Runtime(device=torch.device("cpu"), precision=torch.bfloat16)
    kinds = set()

    class Watched(ToyTask):
        def loss(self, batch):
            kinds.add(self.model(batch.x).dtype)
            return super().loss(batch)

    task = Watched(config)
    fit(task, config, make_run(tmp_path, runtime=runtime))
    assert kinds == {torch.bfloat16}
    assert task.model.out.weight.dtype == torch.float32


POISONED = """
import torch
from torch.nn import functional as F
from rfmedsam2.engine.runtime import Runtime

torch.manual_seed(0)
runtime = Runtime(device=torch.device("cpu"), precision=torch.bfloat16)
cube = (3, 3, 3)
for size, kernel in (((2, 4, 4), cube), ((2, 8, 8), cube), ((4, 4, 4), cube), ((2, 5), (7, 7)), ((8, 1), (3, 3))):
    convolve = F.conv3d if len(size) == 3 else F.conv2d
    maps, weight = torch.randn(2, 32, *size), torch.randn(32, 32, *kernel)
    gradients = []
    for precise in (False, True):
        learned = weight.clone().requires_grad_()
        with runtime.whole_gradients(), torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            out = convolve(maps, learned, padding=tuple(k // 2 for k in kernel), stride=1 if size[-1] > 1 else 2)
        out.float().pow(2).sum().backward()
        gradients.append(learned.grad)
    error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    assert error < 0.02, (size, kernel, error)
"""


def test_gradients_of_bf16_hold_no_uninitialized_memory():
    # glibc fills what it hands out with 3.4e38, so that a gradient with unwritten places is far off
    done = subprocess.run(
        [sys.executable, "-c", POISONED],
        env=os.environ | {"MALLOC_PERTURB_": "128"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_only_maps_narrower_than_the_kernel_are_convolved_in_fp32():
    runtime = Runtime(device=torch.device("cpu"), precision=torch.bfloat16)
    weight = torch.zeros(1, 1, 3, 3, 3)
    with runtime.whole_gradients(), runtime.autocast():
        kinds = [F.conv3d(torch.zeros(1, 1, depth, 4, 4), weight, padding=1).dtype for depth in (1, 2, 3, 8)]
    assert kinds == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(("warmup", "said"), [(9, False), (10, True)])
def test_a_warmup_that_never_ends_is_said(tmp_path, caplog, warmup, said):
    config = make_config(epochs=2, schedule=WarmupPolySchedule(warmup_iterations=warmup))
    with caplog.at_level(logging.WARNING):
        fit(ToyTask(config), config, make_run(tmp_path))
    expected = "warms up for 10 iterations, and the training has 10: the full rate is never reached"
    assert (expected in caplog.text) is said


def test_a_failing_compiler_costs_one_warning_line(tmp_path, monkeypatch, caplog):
    def refuse(self, *_, **__):
        self._compiled_call_impl = _no_compiler

    monkeypatch.setattr(torch.nn.Module, "compile", refuse)
    for compile_mode in ("on", "off"):
        config = make_config(epochs=1, compile=compile_mode)
        with caplog.at_level(logging.WARNING):
            fit(ToyTask(config), config, make_run(tmp_path / compile_mode))
    assert [r.message for r in caplog.records] == [
        "torch.compile failed, training continues without it (gcc: not found)"
    ]
    assert weights_of(tmp_path / "on") == weights_of(tmp_path / "off")


def _no_compiler(*_, **__):
    raise RuntimeError("gcc: not found\nmore")


def test_a_compiled_model_keeps_the_names_of_its_weights(tmp_path, monkeypatch):
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="eager"))
    config = make_config(epochs=1, compile="on")
    task = ToyTask(config)
    fit(task, config, make_run(tmp_path))
    assert task.model._compiled_call_impl is not None
    assert set(read_weights(tmp_path / "checkpoint_final.safetensors")[1]) == set(ToyTask(config).model.state_dict())


def test_deterministic_mode_is_put_back_and_refuses_in_a_sentence(tmp_path):
    config = make_config(epochs=1, deterministic=True)
    task = ToyTask(config)
    seen = []
    task.at[0] = lambda: seen.append(torch.are_deterministic_algorithms_enabled())
    fit(task, config, make_run(tmp_path))
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()

    def refuse():
        raise RuntimeError("put_ does not have a deterministic implementation")

    task.at[0] = refuse
    with pytest.raises(PlanError, match="put_ does not have"):
        fit(task, config, make_run(tmp_path))


def test_devices_and_precisions_that_are_not_here_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wanted in ("cuda", "cuda:3", "toaster"):
        with pytest.raises(UsageError):
            choose_device(wanted)
    bf16 = torch.bfloat16
    for units, expected in (({}, torch.float32), ({"amx_bf16": True}, bf16), ({"avx512_bf16": True}, bf16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=units: found, raising=False)
        assert choose_precision("auto", torch.device("cpu")) == expected
    with pytest.raises(PlanError):
        choose_precision("fp16", torch.device("cpu"))
    with start_runtime("cpu", precision="bf16") as runtime:
        assert (runtime.rank, runtime.world_size, runtime.precision) == (0, 1, torch.bfloat16)


def test_batches_of_any_make_reach_the_device():
    meta = torch.device("meta")
    batch = {"a": [torch.zeros(1)], "b": (ToyBatch(x=torch.zeros(1), y=torch.ones(1), ids=("c",)), "text")}
    moved = to_device(batch, meta)
    assert moved["a"][0].device == moved["b"][0].x.device == meta
    assert (moved["b"][0].ids, moved["b"][1]) == (("c",), "text")


def test_sgd_without_clipping_trains(tmp_path):
    config = make_config(epochs=1, optimizer=Sgd(), clip_norm=None, learning_rate=1e-3)
    assert fit(ToyTask(config), config, make_run(tmp_path)).step == 5
