"""Pieces of code, each in an interpreter of its own that costs a fork and not a start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_SERVER = """
import json, os, sys, traceback
preload, codes = json.load(sys.stdin)
exec(preload, {})
answers = {}
for name, code in codes.items():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            scope = {}
            exec(code, scope)
            answer = scope.get("answer")
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        with os.fdopen(write, "w") as stream:
            json.dump([answer, sorted(sys.modules)], stream)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        answers[name] = stream.read()
    os.waitpid(child, 0)
json.dump({name: json.loads(text) for name, text in answers.items()}, sys.stdout)
"""


def run_each(codes: Mapping[str, str], *, preload: str = "") -> dict[str, tuple[Any, set[str]]]:
    """Run every piece of code in a copy of an interpreter that has run `preload` alone.

    Args:
        codes: name -> code; what it calls `answer` comes back, if JSON can hold it.
        preload: imports that are not under test and that all pieces need: they are paid for once.

    Returns:
        Name -> (answer, names of all modules that are loaded then).
    """
    done = subprocess.run(
        [sys.executable, "-c", _SERVER],
        input=json.dumps([preload, dict(codes)]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (answer, _) in found.items():
        assert not (isinstance(answer, dict) and "failed" in answer), f"{name}: {answer['failed']}"
    return {name: (answer, set(modules)) for name, (answer, modules) in found.items()}
