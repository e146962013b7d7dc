"""A killed and resumed training equals an unbroken one: weights and every logged figure, to the bit."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.toy_task import ToyTask, make_config, make_run, timeless, weights_of

from rfmedsam2.engine.fit import fit
from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.records.training import AdamW, Adan, PolySchedule, Sgd
from rfmedsam2.store.checkpoints import read_all

TESTS = Path(__file__).resolve().parents[2]
OFTEN = 1e-9
"""Minutes between checkpoints: one after every step."""
KILLED = """
import os, signal, sys, pathlib
sys.path.insert(0, sys.argv[1])
from support.toy_task import ToyTask, make_config, make_run
from rfmedsam2.engine.fit import fit
config = make_config(accumulation=2, checkpoint_minutes=float(sys.argv[4]))
task = ToyTask(config)
task.at[int(sys.argv[3])] = lambda: os.kill(os.getpid(), signal.SIGKILL)
fit(task, config, make_run(pathlib.Path(sys.argv[2])), resume=True)
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    config = make_config(accumulation=2)
    progress = fit(ToyTask(config), config, make_run(folder))
    assert progress.status == "finished"
    return folder


def kill_at(folder, batch, minutes=OFTEN):
    command = [sys.executable, "-c", KILLED, str(TESTS), str(folder), str(batch), str(minutes)]
    done = subprocess.run(command, timeout=120)
    assert done.returncode == -signal.SIGKILL


def test_killed_twice_and_resumed_is_bit_identical(tmp_path, unbroken):
    # within an epoch between two micro-batches, then at the first batch after a validation
    kill_at(tmp_path, 13)
    kill_at(tmp_path, 30)
    config = make_config(accumulation=2)
    progress = fit(ToyTask(config), config, make_run(tmp_path), resume=True)
    assert progress.step == 20
    assert timeless(tmp_path) == timeless(unbroken)
    for name in ("final", "best"):
        assert weights_of(tmp_path, name) == weights_of(unbroken, name)


def test_killed_before_the_first_checkpoint_starts_again(tmp_path, unbroken):
    kill_at(tmp_path, 13, minutes=10)
    config = make_config(accumulation=2)
    fit(ToyTask(config), config, make_run(tmp_path), resume=True)
    assert timeless(tmp_path) == timeless(unbroken)
    assert weights_of(tmp_path) == weights_of(unbroken)


@pytest.mark.parametrize("optimizer", [Sgd(), Sgd(momentum=0.0, nesterov=False), Adan(), AdamW(amsgrad=True)])
def test_any_step_resumes_in_process(tmp_path, optimizer):
    config = make_config(epochs=2, iterations_per_epoch=3, checkpoint_minutes=OFTEN, optimizer=optimizer)
    fit(ToyTask(config), config, make_run(tmp_path / "unbroken"))
    for step in range(1, 6):
        folder = tmp_path / str(step)
        task = ToyTask(config)
        task.at[step] = _crash
        with pytest.raises(ZeroDivisionError):
            fit(task, config, make_run(folder))
        assert read_all(folder / "checkpoint_latest.safetensors")[0].step == step
        fit(ToyTask(config), config, make_run(folder), resume=True)
        assert timeless(folder) == timeless(tmp_path / "unbroken")
        assert weights_of(folder) == weights_of(tmp_path / "unbroken")


def test_a_finished_training_resumes_to_nothing(tmp_path):
    config = make_config(epochs=1)
    fit(ToyTask(config), config, make_run(tmp_path))
    before, digest = timeless(tmp_path), weights_of(tmp_path)
    progress = fit(ToyTask(config), config, make_run(tmp_path), resume=True)
    assert progress.status == "finished"
    assert (timeless(tmp_path), weights_of(tmp_path)) == (before, digest)


def test_more_epochs_go_on_with_the_new_schedule_and_say_so(tmp_path, caplog):
    short, long = (make_config(epochs=n, schedule=PolySchedule(per="iteration")) for n in (1, 3))
    fit(ToyTask(short), short, make_run(tmp_path))
    with caplog.at_level(logging.WARNING):
        fit(ToyTask(long), long, make_run(tmp_path), resume=True)
    assert "Epochs changed from 1 to 3" in caplog.text
    rates = [e["lr"] for e in timeless(tmp_path) if e["event"] == "step"]
    assert len(rates) == 15
    assert rates[5] == pytest.approx(0.05 * (1 - 5 / 15) ** 0.9)


def test_another_number_of_threads_is_told(tmp_path, caplog):
    """Sums over several threads round differently."""
    config, before = make_config(epochs=2), torch.get_num_threads()
    task = ToyTask(config)
    task.at[7] = _crash
    with pytest.raises(ZeroDivisionError):
        fit(task, config, make_run(tmp_path))
    try:
        with caplog.at_level(logging.WARNING):
            fit(ToyTask(config), config, make_run(tmp_path), resume=True)
            assert "threads" not in caplog.text
            torch.set_num_threads(before + 1)
            longer = make_config(epochs=3)
            fit(ToyTask(longer), longer, make_run(tmp_path), resume=True)
    finally:
        torch.set_num_threads(before)
    assert (
        f"CPU threads (OMP_NUM_THREADS) changed from {before} to {before + 1}: training continues, but not"
        in caplog.text
    )


def test_without_latest_the_final_weights_stand(tmp_path):
    config = make_config(epochs=1)
    fit(ToyTask(config), config, make_run(tmp_path))
    (tmp_path / "checkpoint_latest.safetensors").unlink()
    task = ToyTask(config)
    assert fit(task, config, make_run(tmp_path), resume=True).step == 5
    assert torch.equal(
        task.model.out.weight, read_all(tmp_path / "checkpoint_final.safetensors")[1]["model/out.weight"]
    )
    longer = make_config(epochs=2)
    with pytest.raises(UsageError, match="cannot be extended"):
        fit(ToyTask(longer), longer, make_run(tmp_path), resume=True)


@pytest.mark.parametrize(
    ("fields", "run", "match"),
    [
        ({}, {"plan": "other"}, "plan.name was 'toy', is 'other'"),
        ({}, {"fold": "1"}, "fold was '0', is '1'"),
        ({"learning_rate": 0.1}, {}, "train.learning_rate was 0.05, is 0.1"),
        ({"optimizer": Sgd()}, {}, "train.optimizer"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, fields, run, match):
    config = make_config(epochs=1)
    fit(ToyTask(config), config, make_run(tmp_path))
    before = (tmp_path / "checkpoint_latest.safetensors").read_bytes()
    other = make_config(epochs=1, **fields)
    with pytest.raises(CheckpointError, match=match):
        fit(ToyTask(other), other, make_run(tmp_path, **run), resume=True)
    assert (tmp_path / "checkpoint_latest.safetensors").read_bytes() == before


def test_weights_of_another_model_are_refused(tmp_path):
    config = make_config(epochs=1)
    fit(ToyTask(config), config, make_run(tmp_path))
    with pytest.raises(CheckpointError, match=r"norm\.weight is not in this model"):
        fit(ToyTask(config, batch_norm=False), config, make_run(tmp_path), resume=True)


def test_without_resume_a_run_starts_afresh(tmp_path):
    config = make_config(epochs=1)
    fit(ToyTask(config), config, make_run(tmp_path))
    first = timeless(tmp_path)
    fit(ToyTask(config), config, make_run(tmp_path))
    assert timeless(tmp_path) == first


def _crash():
    raise ZeroDivisionError
