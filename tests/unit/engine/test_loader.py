"""Batches by number: workers change nothing, and whatever happens to one is told with its case, within seconds."""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import psutil
import pytest
import torch

from rfmedsam2.engine import loader
from rfmedsam2.engine.loader import batches, default_workers
from rfmedsam2.engine.rng import capture
from rfmedsam2.errors import ImageError, UsageError, WorkerError

pytestmark = pytest.mark.slow


def draw(number):
    """Draws from every global generator, and sums in a way that several threads would round differently."""
    noise = torch.rand(50_000)
    return {
        "number": number,
        "values": torch.tensor([noise.sum(), float(np.random.rand()), random.random()]),  # noqa: NPY002
    }


def lose_at_3(number):
    return {}["lost"] if number == 3 else draw(number)


def refuse(number):
    raise ImageError("The file is truncated", where="a.nii.gz", remedy="Copy it again")


def die_at_3(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(number)


def leave_at_3(number):
    if number == 3:
        os._exit(1)  # as a worker does that imports a program which trains when it is imported
    return draw(number)


def stall_at_2(number):
    if number == 2:
        time.sleep(600)
    return draw(number)


def slow_at_2(number):
    time.sleep(1.5 * (number == 2))
    return number


def with_blosc2_and_torch(number):
    torch.rand(200_000).sum()
    return float(blosc2.asarray(np.arange(3_000_000))[number])


def workers_alive():
    """Processes of ours, without the server that they are forked from."""
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if p.status() != psutil.STATUS_ZOMBIE and p.parent() != psutil.Process()
    ]


def take(make, start=0, stop=6, *, workers, seed=1, timeout_seconds=30.0):
    stream = batches(
        make,
        start,
        stop,
        workers=workers,
        seed=seed,
        timeout_seconds=timeout_seconds,
        describe=lambda number: f"case_{number}",
    )
    try:
        return list(stream)
    finally:
        stream.close()


def same(one, other):
    return [b["number"] for b in one] == [b["number"] for b in other] and all(
        torch.equal(a["values"], b["values"]) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def alone():
    return take(draw, workers=0)


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_workers_change_nothing(alone, workers):
    assert [b["number"] for b in alone] == list(range(6))
    assert same(take(draw, workers=workers), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_gives_the_same_batches(alone, workers):
    assert same(take(draw, 4, workers=workers), alone[4:])


def test_seeds_and_numbers_give_different_draws(alone):
    other = take(draw, workers=0, seed=2)
    values = {tuple(b["values"].tolist()) for b in [*alone, *other]}
    assert len(values) == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_the_surrounding_generators_are_left_as_they_were(workers):
    before = capture()
    take(draw, workers=workers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in capture().items() if name != "gauss")


def test_nothing_to_do_gives_nothing():
    assert take(draw, 6, 6, workers=2) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_names_case_and_cause(workers):
    with pytest.raises(WorkerError, match=r"batch 3 \(case_3\).*KeyError: 'lost'"):
        take(lose_at_3, workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_ours_keeps_its_kind(workers):
    with pytest.raises(ImageError, match=r"batch 0 \(case_0\): The file is truncated: a.nii.gz. Copy it again"):
        take(refuse, workers=workers)


def test_a_killed_worker_is_told_before_the_timeout():
    began = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        take(die_at_3, workers=2, timeout_seconds=300.0)
    assert time.monotonic() - began < 100  # and not the timeout; a loaded machine takes seconds
    for part in (r"pid ", "SIGKILL, probably out of memory", "batch 3 (case_3)", "GiB", "fewer workers"):
        assert part in str(caught.value)


def test_a_worker_that_ends_by_itself_names_the_guard_of_a_program():
    with pytest.raises(WorkerError, match=r"exit code 1.*traceback stands above.*if __name__ == '__main__':") as caught:
        take(leave_at_3, workers=2)
    assert "fewer workers" not in str(caught.value)


def test_a_worker_killed_while_the_main_process_works_does_not_break_into_that_work(alone, caplog):
    stream = batches(draw, 0, 6, workers=1, seed=1, timeout_seconds=60.0, describe=lambda number: f"case_{number}")
    first = next(stream)
    os.kill(workers_alive()[0].pid, signal.SIGKILL)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    with caplog.at_level(logging.WARNING):
        assert same([first, *stream], alone)
    assert "SIGKILL, probably out of memory" in caplog.text
    assert "Retrying with no workers" in caplog.text


def test_a_stalled_worker_is_told_after_the_timeout_and_ended():
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"No batch arrived within 5 s.*case_2.*pid \d+\) at batch 2"):
        take(stall_at_2, workers=1, timeout_seconds=5.0)
    assert time.monotonic() - began < 30
    assert workers_alive() == []


def test_closing_early_ends_the_workers():
    stream = batches(draw, 0, 1000, workers=2, seed=0, timeout_seconds=60.0, describe=str)
    next(stream)
    assert len(workers_alive()) == 2
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 30
    assert workers_alive() == []


def test_time_in_which_the_whole_job_was_stopped_is_no_stall(monkeypatch):
    """A scheduler may stop this process and its workers for hours, whose clock goes on."""
    clock = itertools.count(0.0, 3600.0)
    monkeypatch.setattr("rfmedsam2.engine.loader.time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert take(slow_at_2, workers=1, timeout_seconds=60.0) == list(range(6))


def test_leaving_python_with_a_stalled_worker_does_not_hang():
    code = """
import sys
sys.path[:0] = [{0!r}, {1!r}]
from test_loader import batches, stall_at_2
stream = batches(stall_at_2, 0, 10, workers=1, seed=0, timeout_seconds=600.0, describe=str)
print(next(stream)["number"])
"""
    here = Path(__file__).resolve().parent
    code = code.format(str(here), str(here.parents[1]))
    done = subprocess.run([sys.executable, "-c", code], timeout=300, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_signals_to_the_whole_group_leave_the_workers_to_the_main_process():
    stream = batches(draw, 0, 50, workers=1, seed=0, timeout_seconds=60.0, describe=str)
    next(stream)
    everyone = psutil.Process().children(recursive=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for process in everyone:
            os.kill(process.pid, number)
    assert len(list(stream)) == 49


def test_threads_of_blosc2_and_torch_in_the_main_process_do_not_hang_the_workers():
    threads = blosc2.set_nthreads(2)
    expected = [with_blosc2_and_torch(number) for number in range(4)]
    torch.rand(10**6).sum()
    try:
        assert take(with_blosc2_and_torch, 0, 4, workers=2) == expected
    finally:
        blosc2.set_nthreads(threads)


def test_what_cannot_be_sent_to_a_process_is_a_sentence():
    with pytest.raises(UsageError, match=r"importable module, or set train.workers to 0"):
        take(lambda number: number, workers=1)


def test_full_shared_memory_is_a_sentence(monkeypatch):
    monkeypatch.setattr(loader, "_shared_memory_free", lambda: 0.1)
    numbered = loader._Numbered(draw, 0, torch.zeros(1, 2))
    assert numbered[0]["number"] == 0
    monkeypatch.setattr(loader, "_shared_memory_free", lambda: 0.00001)
    failure = numbered[0]
    with pytest.raises(WorkerError, match=r"batch 0 \(a\).*too small to transfer a batch.*--shm-size"):
        loader._unwrap(failure, 0, lambda _: "a")


def test_small_shared_memory_means_no_workers(monkeypatch, caplog):
    usage = namedtuple("usage", "total free")
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: usage(2**26, 2**26))
    monkeypatch.setattr(loader.Path, "is_dir", lambda _: True)
    assert default_workers() == 0
    assert "--shm-size" in caplog.text


def test_default_workers_follow_cores_and_memory(monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(loader.psutil, "virtual_memory", lambda: memory(2**37))
    assert default_workers() == 12
    assert default_workers(4) == 3
    monkeypatch.setattr(loader.psutil, "virtual_memory", lambda: memory(2**32))
    assert default_workers() == 2
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert default_workers() == 1


def test_a_batch_whose_maker_died_on_its_way_is_no_traceback(caplog):
    stream = batches(draw, 0, 40, workers=2, seed=0, timeout_seconds=60.0, describe=lambda number: f"case_{number}")
    next(stream)
    for expected in (2, 1):
        workers = workers_alive()
        assert len(workers) == expected
        time.sleep(0.5)  # batches are waiting to be fetched
        for worker in workers:
            worker.kill()
        psutil.wait_procs(workers, timeout=120)
        while expected == 2 and "Retrying with" not in caplog.text:
            next(stream)  # batches that had arrived before come first
    assert "Retrying with 1 worker(s)" in caplog.text
    with pytest.raises(WorkerError, match="SIGKILL"):
        list(stream)


def test_workers_do_not_outlive_a_main_process_that_is_killed():
    code = """
import sys, time
from test_loader import *
stream = batches(draw, 0, 1000, workers=2, seed=0, timeout_seconds=60.0, describe=str)
next(stream)
print(*(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
time.sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    children = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(children) >= 3
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=120)[1]
