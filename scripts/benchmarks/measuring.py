"""What the benchmarks share: seconds and growth of memory of one call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")


def best(function: Callable[[], T], repeats: int) -> tuple[T, float]:
    """Give the last result, and the least of the seconds that `repeats` calls took."""
    timed = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        timed.append((result, time.perf_counter() - started))
    return timed[-1][0], min(seconds for _, seconds in timed)


def measured(function: Callable[[], T]) -> tuple[T, float, int]:
    """Give result, seconds, and by how many MiB the process grew at most while it ran."""
    process = psutil.Process()
    before = process.memory_info().rss
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        result = function()
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return result, seconds, (max(peak) - before) >> 20
