"""Work over many cases on this machine, in threads: reading, packing and our kernels release the interpreter lock."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar

import psutil

from rfmedsam2.errors import MemoryShortError, RfMedSamError, WorkerError
from rfmedsam2.system.memory import free_bytes

logger = logging.getLogger(__name__)
C = TypeVar("C")
R = TypeVar("R")
T = TypeVar("T")


class Track(Protocol):
    """Shows progress: passes `items` through; called with a description and the total number."""

    def __call__(self, items: Iterable[T], description: str, total: int, /) -> Iterable[T]: ...  # noqa: D102


def silent(items: Iterable[T], description: str, total: int, /) -> Iterable[T]:  # noqa: ARG001
    """Show nothing."""
    return items


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

    At most `workers` cases are worked on at once, and at most as many more wait as results. After the first error no
    further case is begun; those under way are let to end. Where memory ran out, half as many workers then try once
    more, from the first case on whose result has not been given yet.

    Args:
        function: one case -> result; runs in a thread.
        cases: what to work on.
        workers: threads; 0 or 1: in the calling thread.
        name: what an error calls the case.
        track: progress display.
        description: what the progress display says.

    Raises:
        RfMedSamError: as raised by `function`.
        MemoryShortError: memory ran out, also with fewer workers.
        WorkerError: any other exception, with the name of the case.
    """
    results = _in_turn(function, cases, name) if workers <= 1 else _sparing(function, cases, workers, name)
    yield from track(results, description, len(cases))


def _sparing(function: Callable[[C], R], cases: Sequence[C], workers: int, name: Callable[[C], str]) -> Iterator[R]:
    """As `_threaded`, and once more with half as many threads where memory ran out."""
    given = 0
    try:
        for result in _threaded(function, cases, workers, name):
            given += 1
            yield result
    except MemoryShortError as error:
        logger.warning("%s Going on once with %d worker(s)", error, workers // 2)
        yield from _threaded(function, cases[given:], workers // 2, name)


def _in_turn(function: Callable[[C], R], cases: Sequence[C], name: Callable[[C], str]) -> Iterator[R]:
    for case in cases:
        yield _named(function, case, name)


def _threaded(function: Callable[[C], R], cases: Sequence[C], workers: int, name: Callable[[C], str]) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    remaining = iter(cases)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="case")

    def begin(case: C) -> None:
        try:
            waiting.append(pool.submit(_named, function, case, name))
        except RuntimeError as error:  # no memory for one more thread
            raise _short(name(case)) from error

    try:
        for case in islice(remaining, 2 * workers):
            begin(case)
        while waiting:
            result = waiting.popleft().result()
            for case in islice(remaining, 1):
                begin(case)
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _named(function: Callable[[C], R], case: C, name: Callable[[C], str]) -> R:
    try:
        return function(case)
    except RfMedSamError:
        raise
    except MemoryError as error:
        raise _short(name(case)) from error
    except Exception as error:
        if "can't start new thread" in str(error):
            raise _short(name(case)) from error
        raise WorkerError(f"A case failed ({type(error).__name__}: {error})", where=name(case)) from error


def _short(case: str) -> MemoryShortError:
    used, free = psutil.Process().memory_info().rss, free_bytes()
    return MemoryShortError(
        "Memory ran out",
        where=case,
        found=f"{used / 2**30:.1f} GiB in use by this process, {free / 2**30:.1f} GiB more could be had",
        remedy="Run again with fewer workers; finished cases are kept",
    )
