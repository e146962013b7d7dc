"""Measure time and memory of a call, or of a command with all its processes."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")
SAMPLING_S = 0.1
PAUSE_PER_SAMPLE = 50
"""Pauses are this many times as long as a sample took: counting the shared pages of many processes is slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Resources that a command used.

    Attributes:
        wall_s: seconds from its start to its end.
        cpu_s: processor seconds of the command and of all its children.
        peak_mib: peak memory of all its processes together; shared pages count once (PSS).
        written_mib: data written to file systems on disk (not tmpfs).
        output: what it wrote to standard output and standard error.
        stopped: whether it was killed for exceeding the memory limit.
    """

    wall_s: float
    cpu_s: float
    peak_mib: int
    written_mib: float
    output: str
    stopped: bool = False

    def __str__(self) -> str:
        """Format the measurements on one line."""
        return f"{self.wall_s:.1f} s, {self.cpu_s:.1f} CPU-s, {self.peak_mib} MiB"


def best_time(function: Callable[[], T], repeats: int) -> tuple[T, float]:
    """Call a function `repeats` times; return the last result and the shortest time in seconds."""
    timed = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        timed.append((result, time.perf_counter() - started))
    return timed[-1][0], min(seconds for _, seconds in timed)


def time_and_memory(function: Callable[[], T]) -> tuple[T, float, int]:
    """Call a function; return its result, the seconds, and the peak growth of the process in MiB."""
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


def installed_program(name: str) -> str:
    """Path of a command installed beside this Python interpreter."""
    return str(Path(sys.executable).parent / name)


def run_measured(
    command: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    limit_mib: int | None = None,
) -> Usage:
    """Run a command and measure all its processes.

    Args:
        command: program and arguments.
        env: environment variables in addition to those of this process.
        cwd: working directory.
        limit_mib: kill all its processes when their memory exceeds this.

    Raises:
        SystemExit: the command failed; its output is shown.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        watcher = _Watcher(process.pid, limit_mib)
        watcher.start()
        output, _ = process.communicate()
        wall = time.perf_counter() - started
        watcher.finish()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode and not watcher.stopped:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{output[-4000:]}")
    return Usage(
        wall_s=wall,
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        peak_mib=watcher.peak >> 20,
        written_mib=(after.ru_oublock - before.ru_oublock) / 2048,
        output=output,
        stopped=watcher.stopped,
    )


class _Watcher(threading.Thread):
    """Samples the memory of a process and its descendants."""

    def __init__(self, pid: int, limit_mib: int | None) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stopped = False
        self._pid = pid
        self._limit = limit_mib
        self._done = threading.Event()

    def run(self) -> None:
        """Sample until `finish` is called."""
        pause = SAMPLING_S
        while not self._done.wait(pause):
            started = time.thread_time()
            self.peak = max(self.peak, self._held())
            if self._limit is not None and self.peak >> 20 > self._limit:
                self.stopped = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)
                return
            pause = max(SAMPLING_S, PAUSE_PER_SAMPLE * (time.thread_time() - started))

    def finish(self) -> None:
        """Stop sampling."""
        self._done.set()
        self.join()

    def _held(self) -> int:
        total = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss
        return total
