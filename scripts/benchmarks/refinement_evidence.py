#!/usr/bin/env python3
"""What refinement brings beside the U-Net alone that trains on for the same processor time, on real manual labels.

usage: python scripts/benchmarks/refinement_evidence.py ROW [ROW ...] --work DIR [--data DIR] [--fold N] [--minutes M]
           [--cases N]
       python scripts/benchmarks/refinement_evidence.py --list
       python scripts/benchmarks/refinement_evidence.py --summary --work DIR

A row is one model: its data, its backbone and what differs from planning's choice (_harness/evidence_rows.py). Its
training is made as long as the row's processor time allows, by the measured time of each of its parts (rehearsal.json,
a minute or two for a light SAM); then every step of the model predicts the validation cases of the fold, and once more
with boxes of their ground truth. A row that was interrupted goes on. --summary compares all rows that are done with the
U-Net's (paired difference in DSC with a bootstrap interval, by case), writes evidence.csv with all cases and
evidence.png, and prints the table.

--data is a folder with the data sets (else RFMED_TEST_DATA). The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _harness.evidence_rehearsal import rehearse
from _harness.evidence_rows import DATASETS, FEW, ROWS, Row
from _harness.usage import installed_program, run_measured

from rfmedsam2.pipeline.datasets.splits import read_splits
from rfmedsam2.pipeline.evaluation.compare import compare
from rfmedsam2.records.report import Comparison
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.raw import open_dataset

STAGE = "3d_fullres"
PLAN = "evidence"
UNET = "step0"
"""Name of the predictions of a U-Net alone, as of the first step of a refined one."""


def main() -> None:
    """Run rows, or sum them up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--data", type=Path, default=os.environ.get("RFMED_TEST_DATA"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="processor minutes of training instead of the row's")
    parser.add_argument("--cases", type=int, help="predict only the first validation cases")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--summary", action="store_true", help="table, CSV and chart of the rows that are done")
    args = parser.parse_args()
    if args.list:
        print("\n".join(ROWS))
        return
    if args.work is None:
        parser.error("--work is missing")
    if args.summary:
        print(json.dumps(summarize(args.work, args.fold)))
        return
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown or not args.rows or args.data is None:
        parser.error(f"unknown rows {unknown}" if unknown else "name rows (--list) and --data")
    done = [
        Bench(ROWS[name], Path(args.data), args.work, args.fold, args.minutes, args.cases).run() for name in args.rows
    ]
    print(json.dumps({"name": "refinement_evidence", "rows": done}))


@dataclass(frozen=True)
class Bench:
    """One row under way; everything lies in work/ROW_foldN."""

    row: Row
    data: Path
    work: Path
    fold: int
    minutes: float | None
    cases: int | None

    @property
    def root(self) -> Path:
        """Folder of the row."""
        return self.work / f"{self.row.name}_fold{self.fold}"

    @property
    def dataset(self) -> Path:
        """The raw dataset."""
        return self.data / DATASETS[self.row.dataset]

    @property
    def layout(self) -> Layout:
        """Where the row's files lie."""
        return Layout.under(self.root)

    def run(self) -> dict[str, Any]:
        """Plan, measure a step, train, predict, score."""
        record = self.root / "row.json"
        if record.is_file():
            return json.loads(record.read_text())
        self._plan()
        figures = self._figures()
        used = self._rfmed("train", *self._training(figures), "--no-validate")  # after an interruption: of the rest
        predictions: dict[str, tuple[object, ...]] = {UNET: ()}
        if self.row.backbone is not None:
            predictions = {f"step{step}": ("--step", step) for step in (0, 2, 1)}
            predictions["boxes"] = ("--boxes", self._cases("labelsTr"))
        for name, words in predictions.items():
            self._score(name, *words)
        done = {"row": self.row.name, "fold": self.fold, "train_cpu_minutes": round(used / 60, 1), **figures}
        record.write_text(json.dumps(done))
        return done

    def _plan(self) -> None:
        """Plan and preprocess, with the few training cases of the row in the splits."""
        raw = self.layout.raw / self.dataset.name
        raw.parent.mkdir(parents=True, exist_ok=True)
        if not raw.exists():
            raw.symlink_to(self.dataset.resolve())
        words = ["--preset", "cpu", "-c", STAGE, "-d", self.dataset.name, "-p", PLAN]
        if self.row.backbone is not None:
            words += ["--model", "rfmedsam2", "--backbone", self.row.backbone]
        changes = [f"{STAGE}.{change}" for change in self.row.fields]
        self._rfmed("plan_and_preprocess", *words, *(["--set", *changes] if changes else []))
        if self.row.few:
            splits = self.layout.splits_file(self.dataset.name)
            folds = json.loads(splits.read_text())
            folds[self.fold]["train"] = folds[self.fold]["train"][: FEW[self.row.dataset]]
            splits.write_text(json.dumps(folds))

    def _figures(self) -> dict[str, int]:
        """Numbers of iterations that fill the row's processor time, kept for a run that goes on."""
        kept = self.root / "figures.json"
        if not kept.is_file():
            kept.write_text(json.dumps(self._measured_figures()))
        return json.loads(kept.read_text())

    def _measured_figures(self) -> dict[str, int]:
        row, budget = self.row, 60 * (self.minutes * self.row.share if self.minutes else self.row.minutes)
        weights, splits = row.weights(self.data), read_splits(self.layout.splits_file(self.dataset.name))
        costs = rehearse(self.root, self.dataset.name, PLAN, STAGE, self.fold, weights)
        (self.root / "rehearsal.json").write_text(json.dumps(asdict(costs)))
        train, val = splits[self.fold].train, splits[self.fold].val
        print(f"{row.name}: {costs}, {costs.all / budget:.0%} of its processor time", file=sys.stderr, flush=True)
        return costs.iterations(
            budget, train=len(train), cases=len(train) + len(val), views=row.cached_views, crossfit=row.crossfit
        )

    def _training(self, figures: Mapping[str, int]) -> list[object]:
        words: list[object] = [self.dataset.name, STAGE, self.fold, "-p", PLAN]
        # one epoch: patches that are scored after each of twenty cost more than the training of a light SAM
        words += ["--epochs", 1, "--iterations", figures["iterations"]]
        weights = self.row.weights(self.data)
        words += ["--sam2", weights] if weights else []
        if (step0 := self.row.step0_of) is not None:
            trained = replace(self, row=ROWS[step0])
            trained.run()
            words += ["--unet", trained.layout.model_folder(self.dataset.name, PLAN, STAGE)]
        if "unet_iterations" in figures and self.row.crossfit:
            words += ["--set", f"{STAGE}.model.crossfit.iterations={figures['unet_iterations']}"]
        return words

    def _score(self, name: str, *words: object) -> None:
        """Predict the validation cases and score them."""
        out = self.root / "predicted" / name
        self._rfmed("predict", "-i", self._cases("imagesTr"), "-o", out, "-p", PLAN, "--continue", *words)
        self._rfmed("evaluate", "-p", out, "-g", self._cases("labelsTr"), "-o", out / "scores", "--overwrite")

    def _cases(self, part: str) -> Path:
        """A folder with links to the images or labels of the validation cases."""
        folder = self.root / "validation" / part
        folder.mkdir(parents=True, exist_ok=True)
        names = json.loads(self.layout.splits_file(self.dataset.name).read_text())[self.fold]["val"][: self.cases]
        cases = [case for case in open_dataset(self.dataset).training if case.id in names]
        for path in [file for case in cases for file in (case.images if part == "imagesTr" else (case.label,))]:
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path.resolve())
        return folder

    def _rfmed(self, name: str, *words: object) -> float:
        """Run a command of ours; gives its processor seconds."""
        print(f"rfmed_{name}", *words, file=sys.stderr, flush=True)
        return run_measured([installed_program(f"rfmed_{name}"), *words, "--root", self.root]).cpu_s


def summarize(work: Path, fold: int) -> dict[str, Any]:
    """Compare every step of every finished row with the U-Net alone; write evidence.csv and evidence.png."""
    found: dict[str, Comparison] = {}
    for row in ROWS.values():
        base = work / f"{row.baseline}_fold{fold}" / "predicted" / UNET / "scores"
        for scores in sorted((work / f"{row.name}_fold{fold}" / "predicted").glob("*/scores")):
            if row.backbone is not None and base.is_dir() and (scores / "metrics.json").is_file():
                found[f"{row.name} {scores.parent.name}"] = compare(base, scores)
    if not found:
        sys.exit(f"no row and its U-Net are done in {work}")
    _write_csv(work / "evidence.csv", found)
    table = {}
    for name, comparison in found.items():
        mean = comparison.mean["dsc"]
        figures = [mean.mean_a, mean.mean_b, mean.difference.mean, mean.difference.low, mean.difference.high]
        unet, model, difference, low, high = (math.nan if value is None else value for value in figures)
        table[name] = {"unet": unet, "model": model, "difference": difference, "low": low, "high": high}
        print(f"{name:44} {unet:.4f} {model:.4f} {100 * difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]")
    _draw(work / "evidence.png", table)
    return {"name": "refinement_evidence", "fold": fold, "rows": table}


def _write_csv(path: Path, found: Mapping[str, Comparison]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "case", "class", "unet_dsc", "model_dsc"])
        for name, comparison in found.items():
            for case in comparison.cases:
                writer.writerows([name, case.id, label, *scores["dsc"]] for label, scores in case.classes.items())


def _draw(path: Path, table: Mapping[str, Mapping[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.35 * len(table) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, row) in enumerate(reversed(table.items())):
        axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color="#3b6fb6")
        axes.plot(100 * row["difference"], place, "o", color="#3b6fb6")
        axes.annotate(name, (0, place), xycoords=("axes fraction", "data"), xytext=(-6, 0), textcoords="offset points",
                      ha="right", va="center", fontsize=8)  # fmt: skip
    axes.axvline(0, color="#888")
    axes.set_yticks([])
    axes.set_xlabel("DSC minus the U-Net's at equal processor time, points, with 95 % interval")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
