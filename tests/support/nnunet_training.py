"""Program: nnU-Net plans, preprocesses, trains and predicts a small dataset in its own folders, as its users do.

usage: python nnunet_training.py FOLDER        (with nnUNet_raw, nnUNet_preprocessed, nnUNet_results in the environment)
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

NAME = "Dataset001_Blobs"
STAGES = {"3d_fullres": (0, 1, 2), "2d": (0,)}
FIRST, SECOND = "3d_lowres", "3d_cascade_fullres"
CASCADE = {FIRST: (0, 1), SECOND: (0,)}


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
    add_cascade(plans["configurations"])
    plans_file.write_text(json.dumps(plans))
    prepared = (*STAGES, FIRST)  # the cascade shares the cases of 3d_fullres
    preprocess([1], configurations=prepared, num_processes=(1,) * len(prepared))
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112 - load patches in this process; planning would fail with it
    SmallTrainer.__name__ = "nnUNetTrainer"  # as its folders and checkpoints call it
    dataset = json.loads((home / "dataset.json").read_text())
    for stage, folds in {**STAGES, **CASCADE}.items():
        if stage == SECOND:
            write_first_stage(home / "nnUNetPlans_3d_fullres", Path(nnUNet_results) / NAME)
        for fold in folds:
            trainer = SmallTrainer({**plans, "continue_training": False}, stage, fold, dataset, torch.device("cpu"))
            if stage in CASCADE:
                trainer.num_iterations_per_epoch = 15
            trainer.run_training()
            # the export asks for what a whole validation would write
            summary = Path(trainer.output_folder) / "validation" / "summary.json"
            summary.parent.mkdir(exist_ok=True)
            summary.write_text("{}")
        model = Path(trainer.output_folder_base)
        previous = str(out / FIRST) if stage == SECOND else None
        predict(model, folds, out / stage, mirror=True, previous=previous)
        if stage in STAGES:
            predict(model, folds[:1], out / f"{stage}_one_fold", mirror=False)
    export_pretrained_model(1, str(out / "model.zip"), configurations=tuple(STAGES), folds=(0,), strict=False)


def add_cascade(configurations: dict[str, Any]) -> None:
    """Plan a cascade, for which the cases are too small."""
    low = copy.deepcopy(configurations["3d_fullres"])
    low |= {"data_identifier": f"nnUNetPlans_{FIRST}", "batch_dice": False, "next_stage": SECOND}
    low["spacing"] = [1.5 * mm for mm in low["spacing"]]
    configurations[FIRST] = low
    configurations[SECOND] = {"inherits_from": "3d_fullres", "previous_stage": FIRST}


def write_first_stage(cases: Path, results: Path) -> None:
    """Stand in for the first stage's validation, which takes long: the labels themselves."""
    out = results / f"nnUNetTrainer__nnUNetPlans__{FIRST}" / "predicted_next_stage" / SECOND
    out.mkdir(parents=True, exist_ok=True)
    stored = nnUNetDatasetBlosc2(str(cases))
    for case in stored.identifiers:
        label = np.asarray(stored.load_case(case)[1])[0]
        stored.save_seg(label.clip(0).astype(np.uint8), str(out / case))


def predict(model: Path, folds: tuple[int, ...], out: Path, *, mirror: bool, previous: str | None = None) -> None:
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
    predictor.predict_from_files_sequential(chosen, names, True, folder_with_segs_from_prev_stage=previous)


if __name__ == "__main__":
    main()
