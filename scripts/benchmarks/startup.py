#!/usr/bin/env python3
"""How long a user waits: `--help` of every command, and from the start to the first useful output, beside nnU-Net's.

usage: python scripts/benchmarks/startup.py [--raw DATASET_FOLDER] [--work DIR] [--repeats 3] [--quick]

Commands run as in a terminal (a pseudo-terminal, so that progress bars show). The first useful output is the first
line, or bar, that reports on the work: not the chosen folder, not a note on citation. Each figure is the minimum of
the repeats, after an untimed one. The last line is JSON: the slowest of our `--help` against nnU-Net's
fastest, and the slowest first output. Needs the extra `nnunet`. `--quick` is enough: data are small here.

With `--before`, another clone of this repository at an earlier commit is the other side, run by the same Python: in
turns, `--help` of every command that both have, and `rfmed_train` from its start to its first useful output, each in
processor seconds (user and system, all child processes). The data are a small phantom.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import psutil
from _harness.peers import STAGE, Sides, add_side_arguments, set_up_sides
from _harness.usage import best_time, installed_program
from before_after import HERE, SETTINGS, run

PEERS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_evaluate_simple")
# an earlier rfmed_train named only what was asked for; a line that goes on with the network and its patch is news
NOT_YET = re.compile(r"^\s*$|^Data: |^Training \S+, plan \S+, \S+, fold \S+$")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PLAN = "startup"
SCRIPTS = re.compile(r'^((?:rfmed|samhq)_\w+) = "([\w.]+):(\w+)"', re.MULTILINE)
COMMAND = "import sys; from {module} import {function} as run; sys.argv[0] = {name!r}; run()"
TRAIN = ("3d_fullres", "fold", "0", "--epochs", "1", "--iterations", "2", "--no-validate", "--restart")


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    args = parser.parse_args()
    if args.before is not None:
        with tempfile.TemporaryDirectory() as work:
            compare(args.before.resolve(), Path(work), args.repeats)
        return
    commands = sorted(
        {e.name for e in entry_points(group="console_scripts") if e.name.startswith(("rfmed_", "samhq_"))}
    )
    help_s = {name: helped(name, args.repeats) for name in commands}
    peer_s = {name: helped(name, 1) for name in PEERS}
    for name, seconds in {**help_s, **peer_s}.items():
        print(f"{name} --help: {seconds:.2f} s")
    with set_up_sides(args) as sides:
        first_s = first_outputs(sides, args.repeats)
    for name, seconds in first_s.items():
        print(f"{name}, first useful output: {seconds:.2f} s")
    ours, peer = max(help_s.values()), min(peer_s.values())
    figures = {"name": "startup", "ours": round(ours, 3), "peer": round(peer, 3), "ratio": round(peer / ours, 2)}
    print(json.dumps({**figures, "first_output_s": round(max(first_s.values()), 2)}))


def helped(name: str, repeats: int) -> float:
    """Seconds of `--help`."""

    def once() -> None:
        subprocess.run([installed_program(name), "--help"], check=True, capture_output=True)

    once()
    return best_time(once, repeats)[1]


def first_outputs(sides: Sides, repeats: int) -> dict[str, float]:
    """Seconds to the first useful output of the commands of the main job, in its order."""
    shutil.rmtree(sides.root / "preprocessed", ignore_errors=True)
    shutil.rmtree(sides.root / "results", ignore_errors=True)
    root = ("--root", str(sides.root))
    plan = ("-d", sides.number, "-c", STAGE, "--preset", "cpu", "-p", PLAN)
    train = (sides.number, STAGE, "fold", "0", "-p", PLAN, "--epochs", "1", "--iterations", "2", "--no-validate")
    preds, scores = str(sides.work / "preds"), str(sides.work / "scores")
    model = ("-d", sides.number, "-p", PLAN)
    jobs = {
        "rfmed_doctor": root,
        "rfmed_verify": ("-d", sides.number, *root),
        "rfmed_plan_and_preprocess": (*plan, "--clean", *root),
        "rfmed_train": (*train, "--restart", *root),
        "rfmed_summary": (str(sides.root / "preprocessed" / sides.raw.name / f"{PLAN}.json"),),
        "rfmed_predict": ("-i", str(sides.raw / "imagesTs"), "-o", preds, *model, *root),
        "rfmed_evaluate": ("-p", preds, "-g", str(sides.raw / "labelsTs"), "-o", scores, "-d", sides.number, *root),
        "rfmed_report": ("-e", f"{scores}/metrics.json", "-i", str(sides.raw / "imagesTs"), "-o", f"{scores}/r.html"),
    }
    found = {}
    for name, words in jobs.items():
        first = [first_output([installed_program(name), *words]).wall_s for _ in range(repeats + 1)]
        found[name] = min(first[1:])
    return found


def compare(before: Path, work: Path, repeats: int) -> None:
    """Run an earlier checkout and this one in turns and print the ratios of their processor seconds."""
    sides = {before: work / "before", HERE: work / "now"}
    commands = {side: scripts(side) for side in sides}
    for side, root in sides.items():
        shape, data = ("--shape", "40", "96", "96"), ("--cases", "4", "--test-cases", "1")
        run(side, [*commands[side]["rfmed_make_phantom"], "-o", str(root / "raw"), *data, *shape])
        planning = ("--preset", "cpu", "-c", "3d_fullres", "--set", *SETTINGS, "--root", str(root))
        run(side, [*commands[side]["rfmed_plan_and_preprocess"], *planning])
    result = {}
    for name in sorted(commands[before].keys() & commands[HERE].keys()):
        words = f"{name} --help"
        result[words] = turns(
            words, before, repeats, lambda side, name=name: run(side, [*commands[side][name], "--help"])
        )

    def train(side: Path) -> float:
        command = [*commands[side]["rfmed_train"], *TRAIN, "--root", str(sides[side])]
        return first_output(command, env=os.environ | {"PYTHONPATH": str(side)}, cwd=side).cpu_s

    result["rfmed_train, first useful output"] = turns("rfmed_train, first useful output", before, repeats, train)
    print(json.dumps({"name": "startup_before_after", "ratios": result}))


def scripts(side: Path) -> dict[str, list[str]]:
    """How to start each command of a checkout, wherever it had it."""
    found = SCRIPTS.findall((side / "pyproject.toml").read_text(encoding="utf-8"))
    return {
        name: [sys.executable, "-c", COMMAND.format(name=name, module=module, function=function)]
        for name, module, function in found
    }


def turns(name: str, before: Path, repeats: int, work_of: Callable[[Path], float]) -> float:
    """Median of the ratios, this checkout's seconds over the earlier one's, after one turn that nobody timed."""
    pairs = [(work_of(before), work_of(HERE)) for _ in range(repeats + 1)][1:]
    then, now = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(now / then for then, now in pairs)
    print(f"{name}: before {then:.2f} CPU-s, now {now:.2f} CPU-s, ratio {ratio:.2f}", flush=True)
    return round(ratio, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstOutput:
    """When the first useful output came: seconds since the start, and processor seconds of all processes."""

    wall_s: float
    cpu_s: float


def first_output(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> FirstOutput:
    """Wait until the command reports on its work; it then runs to its end."""
    ours, theirs = pty.openpty()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=env, cwd=cwd)
    os.close(theirs)
    told, found = "", None
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end was closed
            break
        if not block:
            break
        told += block.decode(errors="replace")
        lines = re.split(r"[\r\n]+", ESCAPES.sub("", told))
        if found is None and any(not NOT_YET.match(line) for line in lines):
            found = FirstOutput(wall_s=time.perf_counter() - started, cpu_s=processor_seconds(process.pid))
    os.close(ours)
    if process.wait() or found is None:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{told[-4000:]}")
    return found


def processor_seconds(pid: int) -> float:
    """Those of a running process and all its children, so far."""
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(each.user + each.system for each in times)


if __name__ == "__main__":
    main()
