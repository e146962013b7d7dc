"""Commands as processes of their own, to be killed: forked from one that has imported everything, so within 0.1 s.

What a test starts is a process like any other: own group, own files for its output, ended by whatever signal.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

OURS = ("RFMED_ROOT", "RFMED_DATASET", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
POLL_SECONDS = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A command under way."""

    pid: int
    out: Path
    launcher: Launcher

    def kill(self) -> int:
        """SIGKILL, for this process alone; gives its status."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """Exit code, or minus the signal."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = self.launcher.ask({"status": self.pid})
            if status is not None:
                return status
            time.sleep(5 * POLL_SECONDS)
        raise AssertionError(f"process {self.pid} did not end within {seconds} s: {self.text()[-2000:]}")

    def until(self, happened: Callable[[], object], seconds: float = 120) -> None:
        """Wait until something is so; the process must still be there then."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.launcher.ask({"status": self.pid}) is None, self.text()[-3000:]
            assert time.monotonic() < end, self.text()[-3000:]
            time.sleep(POLL_SECONDS)

    def text(self) -> str:
        """What it has said so far, standard output and errors together."""
        return self.out.read_text(errors="replace")

    def children(self) -> list[psutil.Process]:
        """All processes below it."""
        return psutil.Process(self.pid).children(recursive=True)


class Launcher:
    """Starts commands; `with` ends it, and what it started."""

    def __enter__(self) -> Launcher:
        command = [sys.executable, str(Path(__file__)), str(Path(__file__).resolve().parents[1])]
        environment = {key: value for key, value in os.environ.items() if key not in OURS}
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"},
        )
        self._number = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()  # the end of its input ends it

    def start(
        self,
        name: str,
        *words: object,
        folder: Path,
        file_bytes: int | None = None,
        environment: Mapping[str, object] | None = None,
    ) -> Process:
        """Start rfmed_NAME.

        Args:
            name: of the command.
            words: its arguments.
            folder: where its output is kept.
            file_bytes: no file may grow beyond this.
            environment: variables that it has besides this process's.
        """
        self._number += 1
        out = folder / f"said_{self._number}.txt"
        out.touch()
        variables = {key: str(value) for key, value in (environment or {}).items()}
        request = {"start": [name, *map(str, words)], "out": str(out), "file_bytes": file_bytes, "variables": variables}
        return Process(pid=self.ask(request), out=out, launcher=self)

    def finished(self, name: str, *words: object, folder: Path, code: int = 0) -> str:
        """Run a command to its end; gives what it said."""
        process = self.start(name, *words, folder=folder)
        assert process.wait() == code, process.text()[-3000:]
        return process.text()

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and take its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _serve() -> None:
    """Answer requests until there are no more."""
    sys.path.insert(0, sys.argv[1])
    for name in ("cli.resolve", "cli.console", "cli.data_and_models", "cli.pipeline", "cli.selection"):
        importlib.import_module(f"rfmedsam2.{name}")
    for name in ("preprocessing.plan_and_preprocess", "training.train"):  # and with it, predicting
        importlib.import_module(f"rfmedsam2.pipeline.{name}")
    importlib.import_module("torch._dynamo")  # by every optimizer
    importlib.import_module("support.blank_charts").draw_no_charts(setattr)

    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: int | None = _forked(request)
            running.add(answer)
        else:
            pid, status = os.waitpid(request["status"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _forked(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = _run(request)
    finally:
        os._exit(code)


def _run(request: dict[str, Any]) -> int:
    """Be the command, in the child; gives the exit code."""
    import resource

    from rfmedsam2.cli import data_and_models, pipeline, selection

    os.setsid()
    handle = os.open(request["out"], os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (handle, 1), (handle, 2)):
        os.dup2(source, target)
    if request["file_bytes"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    os.environ.update(request["variables"])
    name, *words = request["start"]
    sys.argv = [f"rfmed_{name}", *words]
    modules = (pipeline, data_and_models, selection)
    entry = next(found for module in modules if (found := getattr(module, f"{name}_command", None)))
    try:
        entry()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does at its border
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    _leave()
    return code


def _leave() -> None:
    """Run what the interpreter runs when it ends."""
    import atexit

    atexit._run_exitfuncs()


if __name__ == "__main__":
    _serve()
