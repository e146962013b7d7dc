#!/usr/bin/env python3
"""A training step of RFMedSAM 2 on a light backbone, and its prediction: this checkout beside an earlier one.

usage: python scripts/benchmarks/refinement_training.py --data FOLDER [--before COMMIT] [--backbones NAME ...]
           [--steps N] [--work FOLDER]

FOLDER holds hippocampus/ and the weights of LiteMedSAM and MobileSAM (RFMED_TEST_DATA). COMMIT (default 2f38454) is
checked out beside this one. Each side plans twelve cases by its own `cpu` preset at 1 mm (patches of 32x64x64) and
trains in a process of its own: the earlier one as its plan says, this one with `--step0 crossfit` and, where the
encoder is frozen, `--cache views=2`, whose making is told apart. Both get the same prompts: Step 0's class maps are the
labels, moved by a voxel. Prediction is of Steps 1 and 2 of 32 slices of 64x64. Prints processor seconds of one core as
medians, peak memory of the processes (the making of views included), and ratios beside the wanted ones; the last line
is JSON. Ratios are now over before: smaller is better.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
DATASET, STAGE = "Dataset004_Hippocampus", "3d_fullres"
SOURCE = Path("hippocampus", DATASET)
WEIGHTS = {
    "lite_medsam": "weights-litemedsam/lite_medsam.pth",
    "mobile_sam": "weights-mobilesam/mobile_sam.pt",
    "nano": None,
}
WANTED = {"lite_medsam": 0.25, "mobile_sam": 0.25, "nano": 0.5, "predict": 0.5, "memory": 0.5}
CASES, VIEWS, SLICES, SIDE = 12, 2, 32, 64
PLANNING = """
import sys
from rfmedsam2.cli.pipeline import plan_and_preprocess_command as run
sys.argv[0] = "rfmed_plan_and_preprocess"
run()
"""


def main() -> None:
    """Run both sides and print, or be one side of one backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RFMED_TEST_DATA"), metavar="FOLDER")
    parser.add_argument("--before", default="2f38454", metavar="COMMIT")
    parser.add_argument("--backbones", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=["train", "predict"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data is missing")
    args.data = Path(args.data).resolve()
    if args.task:
        with contextlib.redirect_stdout(sys.stderr):
            found = (train if args.task == "train" else predict)(args)
        print(json.dumps(found))
        return
    with contextlib.ExitStack() as held:
        args.work = args.work or Path(held.enter_context(tempfile.TemporaryDirectory()))
        args.work = args.work.resolve()
        before = held.enter_context(checked_out(args.before, args.work / "before"))
        compare({"before": before, "now": HERE}, args)


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Any:
    """A worktree of a commit, removed afterwards."""
    git = ["git", "-C", str(HERE), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", "--force", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def compare(sides: dict[str, Path], args: argparse.Namespace) -> None:
    """Measure all backbones on both sides, in turns, and print."""
    raw = args.work / "raw" / DATASET
    copy_cases(args.data / SOURCE, raw)
    result: dict[str, Any] = {}
    for backbone in args.backbones:
        found = {}
        for side, checkout in sides.items():
            root = args.work / side / "root"
            root.mkdir(parents=True, exist_ok=True)
            if not (root / "raw").exists():
                (root / "raw").symlink_to(raw.parent)
            words = ["-d", DATASET, "--preset", "cpu", "--model", "rfmedsam2", "--backbone", backbone, "-c", STAGE]
            run(checkout, ["-c", PLANNING, *words, "--spacing", "1", "1", "1", "-p", backbone, "--root", str(root)])
            found[side] = measured(checkout, root, backbone, "train", args)
        result[backbone] = row(found, WANTED[backbone])
        tell(backbone, result[backbone])
    if "lite_medsam" in args.backbones:
        both = {side: measured(checkout, args.work / side / "root", "lite_medsam", "predict", args)
                for side, checkout in sides.items()}  # fmt: skip
        result["predict"] = row(both, WANTED["predict"])
        tell("predict 32 slices", result["predict"])
    print(json.dumps({"name": "refinement_training", "before": args.before, **result}))


def copy_cases(source: Path, target: Path) -> None:
    """Copy the first cases of the dataset."""
    for part in ("imagesTr", "labelsTr"):
        (target / part).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / part).iterdir())[:CASES]:
            shutil.copy(path, target / part)
    description = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps(description | {"numTraining": CASES}))


def run(checkout: Path, words: list[str]) -> str:
    """Run Python with a checkout's packages on one thread; gives standard output."""
    env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=env, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return done.stdout


def measured(checkout: Path, root: Path, backbone: str, task: str, args: argparse.Namespace) -> dict[str, float]:
    """What a side's process measured."""
    own = ["--task", task, "--side", str(root), "--backbones", backbone, "--steps", str(args.steps)]
    output = run(checkout, [__file__, "--data", str(args.data), *own])
    return json.loads(output.splitlines()[-1])


def row(found: dict[str, dict[str, float]], wanted: float) -> dict[str, Any]:
    """Ratios of both sides."""
    before, now = found["before"], found["now"]
    ratios = {name: round(now[name] / before[name], 3) for name in before if name in now}
    return {"before": before, "now": now, "ratios": ratios, "wanted": wanted}


def tell(name: str, measures: dict[str, Any]) -> None:
    """One line a measure."""
    for key, ratio in measures["ratios"].items():
        wanted = WANTED["memory"] if key == "peak_mb" else measures["wanted"]
        before, now = measures["before"][key], measures["now"][key]
        verdict = "reached" if ratio <= wanted else "missed"
        print(f"{name:18} {key:12} before {before:8.2f} now {now:8.2f} ratio {ratio:.2f} wanted {wanted} {verdict}")
    rest = {key: value for key, value in measures["now"].items() if key not in measures["before"]}
    print(f"{name:18} {rest}" if rest else "", flush=True)


# ---- one side, with whatever package PYTHONPATH names


def prepared(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The task of a side with its published weights, its runtime and stage."""
    import torch

    from rfmedsam2.engine.runtime import Runtime, choose_precision
    from rfmedsam2.pipeline.training.pretrained import load_pretrained
    from rfmedsam2.records import model as records
    from rfmedsam2.records.plan import Plan, Split
    from rfmedsam2.store.layout import Layout
    from rfmedsam2.store.preprocessed import CaseStore
    from rfmedsam2.system.atomic import read_record
    from rfmedsam2.tasks.rfmedsam2 import RFMedSam2Task

    torch.set_num_threads(1)
    backbone, layout = args.backbones[0], Layout.under(Path(args.side))
    plan = read_record(layout.plan_file(DATASET, backbone), Plan)
    changes = [f"{STAGE}.train.workers=0"]
    if "cached_views" in records.RFMedSam2Config.model_fields:
        changes.append(f"{STAGE}.model.step0=crossfit")
        changes += [f"{STAGE}.model.cached_views={VIEWS}"] if WEIGHTS[backbone] else []
    plan = plan.with_overrides(*changes)
    stage = plan.stages[STAGE]
    assert stage.patch_size == (SLICES, SIDE, SIDE), stage.patch_size
    cases = plan.cases_plan(STAGE) if hasattr(plan, "cases_plan") else backbone
    store = CaseStore(layout.cases_folder(DATASET, cases, STAGE), stage.patch_size)
    ids, device = tuple(store.ids()), torch.device("cpu")
    runtime = Runtime(device=device, precision=choose_precision("auto", device))
    split = Split(train=ids[:4], val=ids[4:])
    task = RFMedSam2Task(plan, STAGE, store=store, split=split, runtime=runtime)
    weights = WEIGHTS[backbone] and args.data / WEIGHTS[backbone]
    load_pretrained(task.model, plan, fold="0", sam=weights, unet=None)
    return task, runtime, (store, split)


def train(args: argparse.Namespace) -> dict[str, float]:
    """Processor seconds of a training step, of making a view if there are any, and peak memory."""
    from _harness.training_steps import labels_as_step0, processor_seconds

    task, runtime, (store, split) = prepared(args)
    model, found = task.model, {}
    changed = labels_as_step0(model)
    if getattr(model.config, "cached_views", 0):
        from rfmedsam2.pipeline.training.view_cache import ViewCaching
        from rfmedsam2.system.progress import silent

        began, folder = time.process_time(), store.folder / "views_fold_0"
        given = {"folder": folder, "task": task, "store": store, "split": split, "step0": None}
        task.use_views(ViewCaching(**given, runtime=runtime, track=silent).run())
        found["view_cpu_s"] = round((time.process_time() - began) / len(split.train) / VIEWS, 2)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        found["view_mb"] = round(size / 1e6 / len(split.train) / VIEWS, 1)
    seconds = processor_seconds(task, runtime, args.steps + 1, changed=changed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step_cpu_s": round(statistics.median(seconds[1:]), 3), "peak_mb": round(peak), **found}


def predict(args: argparse.Namespace) -> dict[str, float]:
    """Processor seconds of Steps 1 and 2 of 32 slices, without Step 0, which is the labels."""
    from _harness.training_steps import moved_labels

    from rfmedsam2.inference.refined_tiles import Tiling
    from rfmedsam2.inference.refinement import predict_refined_slabs

    task, *_ = prepared(args)
    model, inference, size = task.model.eval(), task.stage.inference, task.stage.patch_size
    batch = task._feed._validation.batch(0)
    fixed = moved_labels(batch.target, model.outputs)
    model.prompt_volumes = lambda _: fixed
    tiling = Tiling(patch_size=size, inference=inference, mirror_axes=())
    seconds = []
    for _ in range(args.steps):
        began = time.process_time()
        list(predict_refined_slabs([model], batch.image[0], tiling=tiling, device="cpu"))
        seconds.append(time.process_time() - began)
    return {"predict_cpu_s": round(statistics.median(seconds), 3)}


if __name__ == "__main__":
    main()
