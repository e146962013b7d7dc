"""Program: nnU-Net plans, preprocesses, trains and predicts a small dataset in its own folders, as its users do.

usage: python nnunet_training.py FOLDER        (with nnUNet_raw, nnUNet_preprocessed, nnUNet_results in the environment)
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

NAME = "Dataset001_Blobs"
STAGES = {"3d_fullres": (0, 1, 2), "2d": (0,)}


class SmallTrainer(nnUNetTrainer):
    """nnU-Net's trainer with few iterations."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 40, 1


def main() -> None:
    """Make the models, then predict the first two cases with each."""
    out = Path(sys.argv[1])
    np.random.seed(0)  # noqa: NPY002 - the one that nnU-Net draws patches with
    torch.manual_seed(0)
    # new interpreters for its pools would take longer than all their work
    contexts = multiprocessing.get_context
    multiprocessing.get_context = lambda _=None: contexts("fork")
    extract_fingerprints([1], num_processes=1)
    plan_experiments([1])
    home = Path(nnUNet_preprocessed) / NAME
    plans_file = home / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    for stage in STAGES:
        arguments = plans["configurations"][stage]["architecture"]["arch_kwargs"]
        widths = arguments["features_per_stage"]
        arguments["features_per_stage"] = [min(8 * 2**i, 32) for i in range(len(widths))]
    plans_file.write_text(json.dumps(plans))
    preprocess([1], configurations=tuple(STAGES), num_processes=(1,) * len(STAGES))
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112 - load patches in this process; planning would fail with it
    SmallTrainer.__name__ = "nnUNetTrainer"  # as its folders and checkpoints call it
    dataset = json.loads((home / "dataset.json").read_text())
    for stage, folds in STAGES.items():
        for fold in folds:
            trainer = SmallTrainer({**plans, "continue_training": False}, stage, fold, dataset, torch.device("cpu"))
            trainer.run_training()
            # the export asks for what a whole validation would write
            summary = Path(trainer.output_folder) / "validation" / "summary.json"
            summary.parent.mkdir(exist_ok=True)
            summary.write_text("{}")
        model = Path(trainer.output_folder_base)
        predict(model, folds, out / stage, mirror=True)
        predict(model, folds[:1], out / f"{stage}_one_fold", mirror=False)
    export_pretrained_model(1, str(out / "model.zip"), configurations=tuple(STAGES), folds=(0,), strict=False)


def predict(model: Path, folds: tuple[int, ...], out: Path, *, mirror: bool) -> None:
    """Labels and probabilities of nnU-Net's own predictor."""
    predictor = nnUNetPredictor(
        use_mirroring=mirror, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(model), folds, "checkpoint_final.pth")
    images = Path(nnUNet_raw) / NAME / "imagesTr"
    chosen = [[str(images / f"blob_{i}_0000.nii.gz")] for i in range(2)]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    names = [str(out / f"blob_{i}") for i in range(2)]
    predictor.predict_from_files_sequential(chosen, names, save_probabilities=True)


if __name__ == "__main__":
    main()
