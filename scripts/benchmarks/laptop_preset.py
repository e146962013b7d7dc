#!/usr/bin/env python3
"""Plan, train and score `--preset cpu` on datasets, without figures by hand: DSC of every class, processor seconds.

usage: python scripts/benchmarks/laptop_preset.py WORK_FOLDER DATASET_FOLDER... [--set FIELD=VALUE ...] [--epochs N]

Each dataset is a raw folder (Dataset910_Name); fold 0 is trained. Scored are its imagesTs against labelsTs where it has
them, else the fold's validation cases. `--set` changes fields of 3d_fullres, to measure a setting. A training that was
stopped or finished in WORK_FOLDER is not repeated. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from _harness.usage import installed_program, run_measured

from rfmedsam2.records.report import Evaluation
from rfmedsam2.system.atomic import read_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--set", dest="changes", nargs="*", default=[])
    parser.add_argument("--epochs", type=int)
    args = parser.parse_args()
    rows = [measured(args.work.resolve(), folder.resolve(), args.changes, args.epochs) for folder in args.datasets]
    for row in rows:
        classes = ", ".join(f"{name} {score:.2f}" for name, score in row["dsc"].items())
        print(f"{row['dataset']}: mean DSC {row['mean']:.3f} after {row['cpu_s']:.0f} CPU-s; {classes}")
    print(json.dumps({"name": "laptop_preset", "set": args.changes, "rows": rows}))


def measured(work: Path, dataset: Path, changes: list[str], epochs: int | None) -> dict:
    """One row: mean DSC by class, their mean, and processor seconds of planning and training."""
    name = f"cpu_{hashlib.sha256(' '.join(changes).encode()).hexdigest()[:8]}" if changes else "rfmed_cpu"
    raw = work / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    if not (link := raw / dataset.name).exists():
        link.symlink_to(dataset, target_is_directory=True)
    overrides = ["--set", *(f"3d_fullres.{change}" for change in changes)] if changes else []
    common = ["-d", dataset.name, "-p", name, "--root", str(work)]
    shorter = [] if epochs is None else ["--epochs", str(epochs)]
    used = [command("plan_and_preprocess", *common, "--preset", "cpu", "-c", "3d_fullres", *overrides)]
    used.append(command("train", "3d_fullres", "fold", "0", *common, *shorter))
    fold = work / "results" / dataset.name / f"{name}__3d_fullres" / "fold_0"
    scores = fold / "validation" / "metrics.json"
    if (dataset / "labelsTs").is_dir():
        predictions = work / "predictions" / f"{dataset.name}__{name}"
        command(
            "predict", "-i", str(dataset / "imagesTs"), "-o", str(predictions), "-m", str(fold.parent), "--overwrite"
        )
        command("evaluate", "-p", str(predictions), "-g", str(dataset / "labelsTs"), "-o", str(fold / "test"))
        scores = fold / "test" / "metrics.json"
    found = read_record(scores, Evaluation)
    dsc = {label: means["dsc"].mean for label, means in found.classes.items() if means["dsc"].mean is not None}
    return {"dataset": dataset.name, "mean": found.mean["dsc"].mean, "cpu_s": sum(used), "dsc": dsc}


def command(name: str, *arguments: str) -> float:
    """Run a command of this package; its processor seconds."""
    return run_measured([installed_program(f"rfmed_{name}"), *arguments]).cpu_s


if __name__ == "__main__":
    main()
