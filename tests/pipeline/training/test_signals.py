"""Signals: SIGTERM, SIGINT and SIGHUP save and stop, SIGUSR1 saves and goes on; resuming afterwards is exact."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from support.toy_task import ToyTask, make_config, make_run, timeless, weights_of

from rfmedsam2.engine.fit import fit
from rfmedsam2.store.checkpoint_header import read_record_of


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    config = make_config()
    fit(ToyTask(config), config, make_run(folder))
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("at", [0, 7, 9])
def test_a_stop_saves_after_the_step_and_resumes_exactly(tmp_path, unbroken, number, at):
    config = make_config()
    task = ToyTask(config)
    task.at[at] = send(number)
    progress = fit(task, config, make_run(tmp_path))
    assert (progress.status, progress.signal, progress.step) == ("stopped", number.name, at + 1)
    assert not (tmp_path / "checkpoint_final.safetensors").exists()
    progress = fit(ToyTask(config), config, make_run(tmp_path), resume=True)
    assert progress.status == "finished"
    assert timeless(tmp_path) == timeless(unbroken)
    assert weights_of(tmp_path) == weights_of(unbroken)


@pytest.mark.parametrize("validation", [2, 4])
def test_a_stop_breaks_off_a_validation_which_is_made_up_for(tmp_path, unbroken, validation):
    config = make_config()
    task = ToyTask(config)
    task.at_validation[validation] = send(signal.SIGTERM)
    progress = fit(task, config, make_run(tmp_path))
    assert (progress.status, progress.step) == ("stopped", 5 * validation)
    assert timeless(tmp_path)[-1]["event"] == "step"
    fit(ToyTask(config), config, make_run(tmp_path), resume=True)
    assert timeless(tmp_path) == timeless(unbroken)
    assert weights_of(tmp_path) == weights_of(unbroken)
    assert weights_of(tmp_path, "best") == weights_of(unbroken, "best")


def test_sigusr1_saves_and_goes_on(tmp_path, unbroken):
    config = make_config()
    task = ToyTask(config)
    seen = []
    task.at[6] = send(signal.SIGUSR1)
    task.at[8] = lambda: seen.append(read_record_of(tmp_path / "checkpoint_latest.safetensors").step)
    assert fit(task, config, make_run(tmp_path)).status == "finished"
    assert seen == [7]
    assert weights_of(tmp_path) == weights_of(unbroken)


def test_under_nohup_a_closed_terminal_changes_nothing(tmp_path):
    config = make_config(epochs=1)
    task = ToyTask(config)
    task.at[2] = send(signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert fit(task, config, make_run(tmp_path)).status == "finished"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    config = make_config()
    task = ToyTask(config)
    task.at[3] = lambda: (send(signal.SIGINT)(), send(signal.SIGINT)())
    with pytest.raises(KeyboardInterrupt):
        fit(task, config, make_run(tmp_path))


def test_the_handlers_around_are_put_back(tmp_path):
    config = make_config(epochs=1)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in numbers]
    fit(ToyTask(config), config, make_run(tmp_path))
    assert [signal.getsignal(n) for n in numbers] == before


def test_fit_runs_outside_the_main_thread(tmp_path):
    config = make_config(epochs=1)
    done = []
    thread = threading.Thread(target=lambda: done.append(fit(ToyTask(config), config, make_run(tmp_path))))
    thread.start()
    thread.join(60)
    assert done[0].status == "finished"
