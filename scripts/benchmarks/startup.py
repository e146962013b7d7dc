#!/usr/bin/env python3
"""How long a user waits: `--help` of every command, and from the start to the first useful output, beside nnU-Net's.

usage: python scripts/benchmarks/startup.py [--raw DATASET_FOLDER] [--work DIR] [--repeats 3] [--quick]

Commands run as in a terminal (a pseudo-terminal, so that progress bars show). The first useful output is the first
line, or bar, that tells of the work: not which folder was chosen, not a note on what to cite. Each figure is the least
of the repeats, after one more that nobody timed. The last line is JSON: the slowest of our `--help` against nnU-Net's
fastest, and the slowest first output. Needs the extra `nnunet`. `--quick` is enough: data are small here.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import entry_points

from _harness.peers import STAGE, Sides, add_side_arguments, set_up_sides
from _harness.usage import best_time, installed_program

PEERS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_evaluate_simple")
NOT_YET = re.compile(r"^\s*$|^Data: |^Training \S+, plan")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PLAN = "startup"


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
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
        first = [first_output(name, words) for _ in range(repeats + 1)]
        found[name] = min(first[1:])
    return found


def first_output(name: str, words: tuple[str, ...]) -> float:
    """Seconds until the command tells of its work; it then runs to its end."""
    ours, theirs = pty.openpty()
    started = time.perf_counter()
    process = subprocess.Popen([installed_program(name), *words], stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    told, seconds = "", None
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end was closed
            break
        if not block:
            break
        told += block.decode(errors="replace")
        lines = re.split(r"[\r\n]+", ESCAPES.sub("", told))
        if seconds is None and any(not NOT_YET.match(line) for line in lines):
            seconds = time.perf_counter() - started
    os.close(ours)
    if process.wait() or seconds is None:
        sys.exit(f"{name} {' '.join(words)} ended with {process.returncode}:\n{told[-4000:]}")
    return seconds


if __name__ == "__main__":
    main()
