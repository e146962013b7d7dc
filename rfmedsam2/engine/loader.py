"""Data loading in worker processes: batch i depends only on (seed, i), not on the number of workers.

A worker that raises, is killed or stalls ends in an error that names the cause and the cases, never in a hang. If
memory ran out, the same batches are retried once with half as many workers.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import re
import shutil
import signal
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Generic, TypeVar

import blosc2
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from rfmedsam2.engine.rng import preserved, seed_all
from rfmedsam2.engine.runtime import tensor_bytes
from rfmedsam2.errors import MemoryShortError, RfMedSamError, UsageError, WorkerError
from rfmedsam2.system.memory import free_bytes, memory_ran_out
from rfmedsam2.system.private_apis import private

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - shared memory through which workers pass batches
MEMORY_PER_WORKER = 1.5 * 2**30
MAX_WORKERS = 12
PREFETCH = 2
POLL_SECONDS = 1.0
DEATH_SECONDS = 2.0
MEMORY_SIGNALS = {getattr(signal, name, None) for name in ("SIGKILL", "SIGBUS")}
"""Signals that kill a worker when memory, or shared memory, runs out."""
REMEDY = "Run the same command again to resume, with fewer workers (train.workers, 0: none) if memory is short"
UNGUARDED = "Its traceback stands above. A program that trains must do so below: if __name__ == '__main__':"


def batches(
    make_batch: Callable[[int], Batch],
    start: int,
    stop: int,
    *,
    workers: int | None,
    seed: int,
    timeout_seconds: float,
    describe: Callable[[int], str],
) -> Iterator[Batch]:
    """Iterate over make_batch(start), ..., make_batch(stop - 1); close the iterator to end the workers.

    While make_batch runs, the global RNGs of torch, numpy and Python are seeded from (seed, number).

    Args:
        make_batch: makes batch number i; with workers it is pickled, so it must be in an importable module.
        start: first batch number.
        stop: one past the last batch number.
        workers: number of processes; None: `default_workers()`, 0: load in this process.
        seed: seed of this rank.
        timeout_seconds: maximum wait for one batch.
        describe: text naming the cases of batch number i, without reading them.

    Raises:
        WorkerError: a worker died, was killed or stalled, or make_batch raised (an RfMedSamError keeps its class).
        MemoryShortError: a WorkerError whose cause is memory, also with half as many workers.
    """
    workers = min(default_workers() if workers is None else workers, max(stop - start, 0))
    made, spared = start, False
    while made < stop:
        numbers = range(made, stop)
        if workers == 0:
            stream = _in_process(make_batch, numbers, seed, describe)
        else:
            heartbeat = torch.full((workers, 2), -1.0, dtype=torch.float64).share_memory_()
            numbered = _Numbered(make_batch, seed, heartbeat)
            stream = _from_workers(numbered, heartbeat, numbers, timeout_seconds, describe)
        try:
            with closing(stream):
                for batch in stream:
                    made += 1
                    yield batch
        except MemoryShortError as error:
            if spared or workers == 0:
                raise
            workers, spared = workers // 2, True
            logger.warning("%s Retrying with %s", error, f"{workers} worker(s)" if workers else "no workers")


def _in_process(
    make_batch: Callable[[int], Batch], numbers: range, seed: int, describe: Callable[[int], str]
) -> Generator[Batch, None, None]:
    for number in numbers:
        with _single_thread():
            batch = _safe_call(make_batch, number, seed)
        yield _unwrap(batch, number, describe)


def _from_workers(
    numbered: _Numbered[Batch],
    heartbeat: Tensor,
    numbers: range,
    timeout_seconds: float,
    describe: Callable[[int], str],
) -> Generator[Batch, None, None]:
    started = _start_workers(numbered, numbers, len(heartbeat), timeout_seconds)
    pool = _WorkerPool(started, heartbeat, timeout_seconds, describe)
    try:
        for number in numbers:
            yield _unwrap(pool.take(number), number, describe)
    finally:
        pool.end()


def default_workers(local_ranks: int = 1) -> int:
    """Number of workers by cores and free memory, at most 12; 0 if shared memory is too small."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_memory = int(free_bytes() / MEMORY_PER_WORKER)
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).total < 2**29:
        logger.warning(
            "%s holds only %.0f MiB: batches are made in this process. In a container, start it with --shm-size=8g.",
            SHARED_MEMORY,
            shutil.disk_usage(SHARED_MEMORY).total / 2**20,
        )
        return 0
    return max(0, min(MAX_WORKERS, max(1, cores - 1), by_memory) // local_ranks)


@dataclass(frozen=True, slots=True)
class _Failure:
    """An exception of make_batch, to be passed to the main process."""

    error: RfMedSamError | None
    found: str
    trace: str
    memory: int | None = None
    """Resident bytes when memory ran out."""


class _Numbered(Dataset[Any], Generic[Batch]):
    """Batches by number; each worker writes (batch number, resident bytes) to `heartbeat` in shared memory."""

    def __init__(self, make_batch: Callable[[int], Batch], seed: int, heartbeat: Tensor) -> None:
        self.make_batch, self._seed, self._heartbeat = make_batch, seed, heartbeat

    def __getitem__(self, number: int) -> Batch | _Failure:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        self._heartbeat[worker, 0] = number
        batch = _safe_call(self.make_batch, number, self._seed)
        short = _shared_memory_short(batch)
        self._heartbeat[worker, 1] = psutil.Process().memory_info().rss
        return batch if short is None else short


class _WorkerPool:
    """The worker processes: waits for batches, detects dead and stalled workers, ends them."""

    def __init__(
        self, iterator: Any, heartbeat: Tensor, timeout_seconds: float, describe: Callable[[int], str]
    ) -> None:
        self._iterator, self._heartbeat, self._timeout, self._describe = iterator, heartbeat, timeout_seconds, describe
        names = ("_workers", "_index_queues", "_shutdown", "_worker_pids_set")
        self._processes, self._queues, *_ = [private(iterator, name, package="torch") for name in names]
        # torch would raise at any line of the main thread when a worker dies; here it is detected while waiting
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        # also if the iterator is never closed: at exit Python would wait for workers, and a stalled one never ends
        self._kill = weakref.finalize(self, _kill, self._processes)

    def take(self, number: int) -> Any:
        """Wait for the next batch, `number`; raises WorkerError if it cannot arrive."""
        waited = 0.0
        while True:
            began = time.monotonic()
            try:
                return next(self._iterator)
            except (RuntimeError, OSError, EOFError) as error:
                late = "timed out" in str(error)
                if not late:  # the batch's worker may have died meanwhile, which shows a moment later
                    multiprocessing.connection.wait([p.sentinel for p in self._processes], DEATH_SECONDS)
                dead = [i for i, process in enumerate(self._processes) if not process.is_alive()]
                if dead:
                    raise self._died(dead[0], self._processes[dead[0]]) from None
                if not late:
                    where = f"batch {number} ({self._describe(number)})"
                    raise WorkerError("Batches cannot be transferred", where=where, found=error) from error
                # not the clock's time: a scheduler may have stopped this process for hours, and its workers with it
                waited += min(time.monotonic() - began, 2 * POLL_SECONDS)
                if waited >= self._timeout:
                    raise self._stalled(number) from None

    def end(self) -> None:
        """Kill all workers at once, also stalled ones; they only read, so nothing is lost."""
        self._iterator._shutdown = True
        self._kill()
        for queue in self._queues:
            queue.cancel_join_thread()
            queue.close()

    def _stalled(self, number: int) -> WorkerError:
        working = [f"worker {i} (pid {p.pid}) at {self._work(i)}" for i, p in enumerate(self._processes)]
        return WorkerError(
            f"No batch arrived within {self._timeout:g} s: data loading is stalled",
            where=f"batch {number} ({self._describe(number)})",
            found="; ".join(working),
            remedy="Check the disk with the preprocessed cases, or raise train.worker_timeout_seconds",
        )

    def _died(self, index: int, process: Any) -> WorkerError:
        process.join(1.0)
        code = process.exitcode
        cause = f"exit code {code}"
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            cause = f"signal {name}" + {
                "SIGKILL": ", probably out of memory",
                "SIGBUS": f", probably because {SHARED_MEMORY} is full ({_shared_memory_free():.0f} MiB free)",
            }.get(name, "")
        resident, free = float(self._heartbeat[index, 1]), free_bytes()
        size = f"its memory was {resident / 2**30:.1f} GiB, " if resident >= 0 else ""
        # a worker killed from outside was most likely OOM-killed, but there is no certain sign
        kind = MemoryShortError if code is not None and -code in MEMORY_SIGNALS else WorkerError
        return kind(
            f"Data loading worker {index} (pid {process.pid}) was killed or died ({cause})",
            where=self._work(index),
            found=f"{size}{free / 2**30:.1f} GiB of memory are free now",
            remedy=REMEDY if code is None or code <= 0 else UNGUARDED,
        )

    def _work(self, index: int) -> str:
        number = int(self._heartbeat[index, 0])
        return f"batch {number} ({self._describe(number)})" if number >= 0 else "no batch yet"


def _safe_call(make_batch: Callable[[int], Batch], number: int, seed: int) -> Batch | _Failure:
    with preserved():
        seed_all(seed, number)
        try:
            return make_batch(number)
        except RfMedSamError as error:
            return _Failure(error, str(error), traceback.format_exc())
        except Exception as error:  # noqa: BLE001 - process boundary: every exception is reported with its case
            short = memory_ran_out(error)
            used = psutil.Process().memory_info().rss if short else None
            return _Failure(None, f"{type(error).__name__}: {error}", traceback.format_exc(), used)


def _unwrap(result: Batch | _Failure, number: int, describe: Callable[[int], str]) -> Batch:
    """Return the batch, or raise the failure in the main process."""
    if not isinstance(result, _Failure):
        return result
    logger.debug("batch %d failed:\n%s", number, result.trace)
    where = f"batch {number} ({describe(number)})"
    if result.error is not None:
        raise type(result.error)(f"While loading {where}: {result.error}")
    if result.memory is not None:
        free = free_bytes()
        raise MemoryShortError(
            "Memory ran out while making a batch",
            where=where,
            found=f"its process used {result.memory / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free",
            remedy=REMEDY,
        )
    raise WorkerError(
        "A batch could not be made", where=where, found=re.sub(r"\s+", " ", result.found), remedy="Check these cases"
    )


def _context(make_batch: Callable[[int], Any]) -> multiprocessing.context.BaseContext:
    """Start method of the processes: forked from a clean server (forkserver) that has loaded the code once.

    A plain fork of this process hangs if blosc2 has used its threads before (measured, blosc2 4.14); the server has
    no threads, no CUDA context, and none of this process's memory.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, getattr(make_batch, "__module__", __name__)])
    return context


def _start_workers(numbered: _Numbered[Any], numbers: range, workers: int, timeout_seconds: float) -> Any:
    """Start worker processes with the signals of a training blocked; the main process ends them by SIGKILL."""
    private(signal_handling, "_remove_worker_pids", package="torch")
    with _block_signals(), warnings.catch_warnings():
        # torch's warnings: more workers than cores were requested; pickling errors are handled below
        warnings.simplefilter("ignore", UserWarning)
        loader = DataLoader(
            numbered,
            sampler=numbers,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            timeout=min(POLL_SECONDS, timeout_seconds),
            worker_init_fn=_init_worker,
            multiprocessing_context=_context(numbered.make_batch),
            # with its own RNG the loader does not draw from the global one
            generator=torch.Generator(),
        )
        if "<locals>" in getattr(numbered.make_batch, "__qualname__", ""):
            raise _not_picklable(numbered.make_batch.__qualname__)
        try:
            return iter(loader)
        except (AttributeError, TypeError) as error:
            raise _not_picklable(error) from error


def _not_picklable(found: object) -> UsageError:
    return UsageError(
        "Batches cannot be made in worker processes, because `make_batch` cannot be pickled",
        found=found,
        remedy="Use a function or method of an importable module, or set train.workers to 0",
    )


@contextmanager
def _block_signals() -> Iterator[None]:
    """Block signals sent to the process group; processes started inside inherit the mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGHUP])
    try:
        resource_tracker.ensure_running()  # ignores the others itself, but starting it would unblock them here
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _single_thread() -> Iterator[None]:
    """Use one thread, as in a worker: sums over several threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _init_worker(_: int) -> None:
    """Use one core, and end with the main process."""
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with the main process: torch's own watchdog watches the server, which lives as long as a worker."""
    if (parent := multiprocessing.parent_process()) is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _shared_memory_free() -> float:
    """Free shared memory in MiB; infinite if it is not a file system."""
    return shutil.disk_usage(SHARED_MEMORY).free / 2**20 if SHARED_MEMORY.is_dir() else float("inf")


def _shared_memory_short(batch: object) -> _Failure | None:
    """A failure if shared memory is too full for the batch, which would otherwise be lost silently."""
    size = tensor_bytes(batch) / 2**20
    free = _shared_memory_free()
    if size < free:
        return None
    error = WorkerError(
        f"{SHARED_MEMORY} is too small to transfer a batch",
        expected=f"more than {size:.0f} MiB free",
        found=f"{free:.0f} MiB",
        remedy="In a container, start it with --shm-size=8g or --ipc=host; or set train.workers to 0",
    )
    return _Failure(error, str(error), "")
