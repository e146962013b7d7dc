#!/usr/bin/env python3
"""Train nnU-Net's own trainer and ours on Hippocampus with the same small plan, then compare DSC on the fold.

usage: python scripts/benchmarks/hippocampus_vs_nnunet.py DATASET004_FOLDER WORK_FOLDER [--side both|nnunet|ours]
           [--optimizer adamw|sgd] [--lr 0.003] [--epochs 20] [--iterations 50] [--fold 0]

Same network (features 16-128), patch, batch, optimizer, learning rate, poly schedule per epoch, number of iterations,
split, mirroring and step size; each side uses its own preprocessing, loading, augmentation, engine, prediction and
export. The score of both is nnU-Net's own evaluation of the label maps that each side wrote. The last line is JSON.
Needs the extra `nnunet`. On two cores each side takes about ten minutes with the default figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from _harness.plans import shrink

FEATURES, PATCH, BATCH = (16, 32, 64, 128), (40, 56, 40), 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--side", choices=("both", "nnunet", "ours"), default="both")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--fold", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tag = f"{args.optimizer}_lr{args.lr:g}_{args.epochs}x{args.iterations}_fold{args.fold}"
    sides = ("nnunet", "ours") if args.side == "both" else (args.side,)
    for side in sides:
        result = (nnunet if side == "nnunet" else ours)(args, args.work / side / tag)
        (args.work / f"{side}_{tag}.json").write_text(json.dumps(result))
    found = {s: json.loads(f.read_text()) for s in ("nnunet", "ours") if (f := args.work / f"{s}_{tag}.json").exists()}
    for side, result in found.items():
        print(side, json.dumps(result))
    if len(found) == 2:
        mine, peer = found["ours"]["mean_dsc"], found["nnunet"]["mean_dsc"]
        print(json.dumps({"name": f"hippocampus_{tag}", "ours": mine, "peer": peer, "ratio": round(mine / peer, 4)}))


def nnunet(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Train and validate with nnU-Net 2.8 in this process."""
    base = args.work / "nnunet"
    for name in ("raw", "preprocessed"):
        (base / name).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(base / name)
    os.environ.update(nnUNet_results=str(folder), nnUNet_n_proc_DA="1", nnUNet_def_n_proc="1", nnUNet_compile="f")
    link = base / "raw" / args.dataset.resolve().name
    if not link.exists():
        link.symlink_to(args.dataset.resolve())
    number = str(int(link.name[7:10]))
    plans_file = base / "preprocessed" / link.name / "nnUNetPlans.json"
    if not plans_file.exists():
        command = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
        subprocess.run([str(command), "-d", number, "-c", "3d_fullres", "-np", "2"], check=True)
    return _nnunet_training(args, plans_file)


def _nnunet_training(args: argparse.Namespace, plans_file: Path) -> dict[str, object]:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class SmallTrainer(nnUNetTrainer):
        # nnU-Net reads its own arguments back by these names
        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.num_iterations_per_epoch = args.epochs, args.iterations
            self.num_val_iterations_per_epoch, self.initial_lr, self.save_every = 5, args.lr, 10**6

        def configure_optimizers(self):
            optimizer, schedule = super().configure_optimizers()
            if args.optimizer == "adamw":
                weights = self.network.parameters()
                optimizer = torch.optim.AdamW(weights, self.initial_lr, weight_decay=self.weight_decay)
                schedule = type(schedule)(optimizer, self.initial_lr, self.num_epochs)
            return optimizer, schedule

    plans = json.loads(plans_file.read_text())
    stage = plans["configurations"]["3d_fullres"]
    stage.update(patch_size=list(PATCH), batch_size=BATCH)
    shrink(stage, FEATURES)
    dataset_json = json.loads((plans_file.parent / "dataset.json").read_text())
    plans["continue_training"] = False
    trainer = SmallTrainer(plans, "3d_fullres", args.fold, dataset_json, device=torch.device("cpu"))
    began = time.perf_counter()
    trainer.run_training()
    trained = time.perf_counter() - began
    trainer.perform_actual_validation(False)
    summary = json.loads((Path(trainer.output_folder) / "validation" / "summary.json").read_text())
    return _result(summary, trained)


def ours(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Train and validate with this package's commands, score with nnU-Net's evaluation."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple

    root = folder
    (root / "raw").mkdir(parents=True, exist_ok=True)
    link = root / "raw" / args.dataset.resolve().name
    if not link.exists():
        link.symlink_to(args.dataset.resolve())
    stage = "3d_fullres"
    schedule = [f"{stage}.train.schedule.kind=poly", f"{stage}.train.precision=fp32", f"{stage}.inference.mirror=true"]
    fields = [
        f"{stage}.train.optimizer.kind={args.optimizer}",
        f"{stage}.train.weight_decay=3e-5",
        f"{stage}.patch_size={json.dumps(list(PATCH))}",
        f"{stage}.batch_size={BATCH}",
        f"{stage}.loss.batch_dice=false",
    ]
    _command("rfmed_plan_and_preprocess", "-d", link.name, "--preset", "cpu", "--set", *schedule, *fields, root=root)
    began = time.perf_counter()
    numbers = ["--epochs", args.epochs, "--iterations", args.iterations, "--lr", args.lr]
    _command("rfmed_train", link.name, stage, args.fold, *numbers, "--restart", root=root)
    taken = time.perf_counter() - began
    predicted = root / "results" / link.name / f"rfmed_cpu__{stage}" / f"fold_{args.fold}" / "validation"
    scores = folder / "nnunet_summary.json"
    references = str(link / "labelsTr")
    compute_metrics_on_folder_simple(references, str(predicted), [1, 2], str(scores), num_processes=1, chill=True)
    return _result(json.loads(scores.read_text()), taken)


def _command(*words: object, root: Path) -> None:
    program = Path(sys.executable).parent / str(words[0])
    subprocess.run([str(program), *map(str, words[1:]), "--root", str(root)], check=True)


def _result(summary: dict, seconds: float) -> dict[str, object]:
    by_class = {label: round(values["Dice"], 4) for label, values in summary["mean"].items()}
    return {
        "mean_dsc": round(summary["foreground_mean"]["Dice"], 4),
        "dsc": by_class,
        "cases": len(summary["metric_per_case"]),
        "train_seconds": round(seconds),
    }


if __name__ == "__main__":
    main()
