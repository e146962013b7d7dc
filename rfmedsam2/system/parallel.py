"""Thread pool over cases. I/O, compression and the compiled kernels release the GIL, so threads suffice."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from rfmedsam2.errors import MemoryShortError, RfMedSamError, UsageError, WorkerError
from rfmedsam2.system.memory import memory_ran_out, memory_words
from rfmedsam2.system.progress import Track, silent

logger = logging.getLogger(__name__)
C = TypeVar("C")
R = TypeVar("R")


def map_cases(
    function: Callable[[C], R],
    cases: Sequence[C],
    *,
    workers: int,
    name: Callable[[C], str],
    track: Track = silent,
    description: str = "",
) -> Iterator[R]:
    """Apply `function` to every case; results come in the order of the cases.

    At most `workers` cases run at a time, and at most as many results wait to be consumed. After the first error no
    further case is started; running ones finish. If memory ran out, the cases without a result are tried once more with
    half as many workers.

    Args:
        function: makes the result of one case; runs in a thread.
        cases: the cases.
        workers: number of threads; 0 or 1: run in the calling thread.
        name: gives the name of a case for error messages.
        track: progress display.
        description: label of the progress display.

    Raises:
        UsageError: a negative number of workers.
        RfMedSamError: raised by `function`.
        MemoryShortError: memory ran out, also with half as many workers.
        WorkerError: any other exception, with the name of the case.
    """
    if workers < 0:
        raise UsageError("workers must be a whole number from 0", found=workers)
    workers = min(workers, len(cases))
    results = _sequential(function, cases, name) if workers <= 1 else _with_retry(function, cases, workers, name)
    yield from track(results, description, len(cases))


def _with_retry(function: Callable[[C], R], cases: Sequence[C], workers: int, name: Callable[[C], str]) -> Iterator[R]:
    """Like `_threaded`, but retries once with half as many threads if memory runs out."""
    done = 0
    try:
        for result in _threaded(function, cases, workers, name):
            done += 1
            yield result
    except MemoryShortError as error:
        logger.warning("%s Retrying with %d worker(s)", error, workers // 2)
        yield from _threaded(function, cases[done:], workers // 2, name)


def _sequential(function: Callable[[C], R], cases: Sequence[C], name: Callable[[C], str]) -> Iterator[R]:
    for case in cases:
        yield _named(function, case, name)


def _threaded(function: Callable[[C], R], cases: Sequence[C], workers: int, name: Callable[[C], str]) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    remaining = iter(cases)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="case")

    def start(case: C) -> None:
        try:
            waiting.append(pool.submit(_named, function, case, name))
        except RuntimeError as error:  # no memory for one more thread
            raise _short(name(case)) from error

    try:
        for case in islice(remaining, 2 * workers):
            start(case)
        while waiting:
            result = waiting.popleft().result()
            for case in islice(remaining, 1):
                start(case)
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _named(function: Callable[[C], R], case: C, name: Callable[[C], str]) -> R:
    try:
        return function(case)
    except RfMedSamError:
        raise
    except Exception as error:
        if memory_ran_out(error):
            raise _short(name(case)) from error
        raise WorkerError(f"A case failed ({type(error).__name__}: {error})", where=name(case)) from error


def _short(case: str) -> MemoryShortError:
    return MemoryShortError(
        "Memory ran out",
        where=case,
        found=memory_words(),
        remedy="Run again with fewer workers; finished cases are kept",
    )
