"""The training loop on CUDA: as on the CPU, exact when deterministic, in every precision."""

from __future__ import annotations

import pytest
import torch
from support.toy_task import ToyTask, make_config, make_run, timeless, weights_of

from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.runtime import Runtime, choose_precision
from rfmedsam2.errors import DivergedError
from rfmedsam2.store.checkpoints import read_all


def runtime(device, precision="fp32"):
    return Runtime(device=device, precision=choose_precision(precision, device))


def test_losses_are_those_of_the_cpu(tmp_path, device):
    config = make_config(compile="off")
    fit(ToyTask(config, dropout=0.0), config, make_run(tmp_path / "gpu", runtime=runtime(device)))
    fit(ToyTask(config, dropout=0.0), config, make_run(tmp_path / "cpu"))
    ours, theirs = ([e["loss"] for e in timeless(tmp_path / n) if e["event"] == "step"] for n in ("gpu", "cpu"))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_bit_identical_when_deterministic(tmp_path, precision, device):
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("fp16 trains on a GPU alone")
    config = make_config(compile="off", deterministic=True, checkpoint_minutes=1e-9)
    fit(ToyTask(config), config, make_run(tmp_path / "unbroken", runtime=runtime(device, precision)))
    task = ToyTask(config)
    task.at[12] = _crash
    with pytest.raises(ZeroDivisionError):
        fit(task, config, make_run(tmp_path / "broken", runtime=runtime(device, precision)))
    fit(ToyTask(config), config, make_run(tmp_path / "broken", runtime=runtime(device, precision)), resume=True)
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "unbroken")
    assert weights_of(tmp_path / "broken") == weights_of(tmp_path / "unbroken")


def test_the_compiled_model_learns_the_same(tmp_path, device):
    if device.type == "cpu":
        pytest.skip("compiling for the CPU needs a C++ compiler")
    for mode in ("on", "off"):
        config = make_config(compile=mode)
        fit(ToyTask(config, dropout=0.0), config, make_run(tmp_path / mode, runtime=runtime(device)))
    ours, theirs = ([e["loss"] for e in timeless(tmp_path / n) if e["event"] == "step"] for n in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_divergence_is_noticed_before_anything_is_saved(tmp_path, device):
    config = make_config(compile="off", checkpoint_minutes=1e-9)
    task = ToyTask(config)
    task.nan_at = 7
    with pytest.raises(DivergedError, match=r"step 7.*case_7"):
        fit(task, config, make_run(tmp_path, runtime=runtime(device)))
    record, tensors, _ = read_all(tmp_path / "checkpoint_latest.safetensors")
    assert record.step <= 7
    assert all(torch.isfinite(t).all() for n, t in tensors.items() if n.startswith("model/"))


def _crash():
    raise ZeroDivisionError
