#!/usr/bin/env python3
"""Preprocessing, prediction and export of this checkout beside those of an earlier one, in turns, in one run.

usage: python scripts/benchmarks/before_after.py --before CHECKOUT [--rounds N] [--slices N]

CHECKOUT is another clone of this repository at the commit to compare with, run by the same Python environment. The data
are a phantom of 512x512xSLICES; both sides predict with one model, which the earlier checkout trains for two steps.
Prints processor seconds (user and system, all child processes) as medians and the median of the ratios of each round,
which holds up on a shared machine where seconds do not; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
COMMAND = "import sys; from rfmedsam2.cli.{module} import {name}_command as run; sys.argv[0] = 'rfmed_{name}'; run()"
SETTINGS = (
    "3d_fullres.patch_size=[32,64,64]",
    "3d_fullres.train.workers=0",
    "3d_fullres.validation.patches_while_training=1",
)
EXPORT = """
import sys
sys.path.insert(0, {benchmarks!r})
import numpy as np, torch
import export
setting = export.FULL[1]
rng = np.random.default_rng(0)
logits = rng.standard_normal((export.CLASSES, 40, 552, 552), dtype=np.float32)
how = export.restore((40, 552, 552), (48, 512, 512), setting)
memory = torch.zeros(export.CLASSES * export.PLANES_A_SLAB * 552 * 552)
for _ in range(3):
    export.ours(logits, how, memory)
"""


def main() -> None:
    """Run both sides in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slices", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        compare(args.before.resolve(), Path(work), rounds=args.rounds, slices=args.slices)


def compare(before: Path, work: Path, *, rounds: int, slices: int) -> None:
    """Prepare data and a model, measure, print."""
    root = work / "root"
    shape = ("--shape", slices, 512, 512)
    rfmed(before, "data_and_models", "make_phantom", "-o", root / "raw", "--cases", 2, "--test-cases", 1, *shape)
    preset = ("--preset", "cpu", "-c", "3d_fullres", "--spacing", 3, 1.2, 1.2)
    thin = "3d_fullres.model.features=[4,4,4,4,4]"  # nearly all of the time is ours, not the network's
    planning = ("--set", *SETTINGS, thin, *preset, "--root", root)
    rfmed(before, "pipeline", "plan_and_preprocess", *planning)
    training = ("--epochs", 1, "--iterations", 2, "--no-validate", "--root", root)
    rfmed(before, "pipeline", "train", "3d_fullres", "fold", 0, *training)

    def preprocess(side: Path) -> float:
        mine = work / "preprocess"
        shutil.rmtree(mine, ignore_errors=True)
        shutil.copytree(root / "raw", mine / "raw")
        return rfmed(side, "pipeline", "plan_and_preprocess", *planning[:-1], mine)

    def predict(side: Path) -> float:
        shutil.rmtree(work / "out", ignore_errors=True)
        images = next((root / "raw").glob("*/imagesTs"))
        return rfmed(side, "pipeline", "predict", "-i", images, "-o", work / "out", "--root", root)

    def export(side: Path) -> float:
        return run(side, [sys.executable, "-c", EXPORT.format(benchmarks=str(side / "scripts" / "benchmarks"))])

    result = {}
    for name, work_of in (("preprocess", preprocess), ("predict", predict), ("export", export)):
        for side in (before, HERE):
            work_of(side)  # compiled loops and file caches are warm
        pairs = [(work_of(before), work_of(HERE)) for _ in range(rounds)]
        ratio = statistics.median(now / then for then, now in pairs)
        then, now = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"{name}: before {then:.2f} CPU-s, now {now:.2f} CPU-s, ratio {ratio:.3f}", flush=True)
        result[name] = {"before_s": round(then, 3), "now_s": round(now, 3), "ratio": round(ratio, 3)}
    print(json.dumps({"name": "before_after", **result}))


def rfmed(side: Path, module: str, name: str, *words: object) -> float:
    """Run a command of a checkout; `module` is where today's checkout has it."""
    if not (side / "rfmedsam2" / "cli" / f"{module}.py").is_file():
        module = {"data_and_models": "exchange"}[module]  # its name before version 0.2
    return run(side, [sys.executable, "-c", COMMAND.format(module=module, name=name), *map(str, words)])


def run(side: Path, command: Sequence[str]) -> float:
    """Give the processor seconds of a command and its children."""
    environment = os.environ | {"PYTHONPATH": str(side), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(list(command), env=environment, stdout=output, stderr=output, cwd=side)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(command)}\n{output.read().decode()}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
