#!/usr/bin/env python3
"""Cross-validation of three models over five folds: nnUNetv2_find_best_configuration against rfmed_select.

usage: python scripts/benchmarks/selection.py --raw DATASET_FOLDER [--ensembles [--kept]] [--cases 260] [--folds 5]

The label maps of the validation are the reference labels with errors: moved surfaces, islands and holes, more of them
in each model. nnU-Net scores them again and rewrites them for every step of postprocessing that it tries (the largest
component); ours reads the scores of the trainings, which are not counted on either side, and tries smallest volumes
and holes, too. The last line is JSON; ratios are theirs over ours. Needs the extra `nnunet`.

With --ensembles all pairs of models compete as well. nnU-Net averages probabilities that its trainings have saved
(`--npz`): those of each fold are predicted beforehand by its own program with a small network, whose seconds are given
for one model and not counted in the ratio, and whose files are counted as disk. Ours predicts every case with the same
network of each model, which is counted. With --kept, our trainings have saved theirs, too (`--probabilities`): written
and given to all models in the same way, and counted as disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from _harness.peers import STAGE, Sides, add_side_arguments, set_up_sides, write_models
from scipy import ndimage

from rfmedsam2.pipeline.evaluation.evaluate import evaluate
from rfmedsam2.pipeline.evaluation.label_tables import LabelTable
from rfmedsam2.store.raw import open_dataset

MODELS = 3


def main() -> None:
    """Make the models, run both commands and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_arguments(parser)
    parser.add_argument("--ensembles", action="store_true", help="also all pairs of models")
    parser.add_argument("--kept", action="store_true", help="with probabilities that our trainings have saved, too")
    parser.add_argument("--cases", type=int, help="use the first of the data set")
    parser.add_argument("--folds", type=int, default=5)
    args = parser.parse_args()
    with set_up_sides(args) as sides:
        trainers = write_validations(sides, cases=args.cases, folds=args.folds)
        before = [disk_mib(sides.nnunet_model.parent), disk_mib(sides.root / "results")]
        saving = save_probabilities(sides, trainers, args.cases, args.folds) if args.ensembles else 0.0
        keeping = keep_probabilities(sides, args.cases, args.folds) if args.kept else 0.0
        words = ("-d", sides.raw.name, "--workers", sides.processes)
        if args.ensembles:
            mine = sides.ours("rfmed_select", *words, "--device", "cpu")
        else:
            mine = sides.ours("rfmed_select", *words, "--no-ensembles")
        find = ("nnUNetv2_find_best_configuration", sides.number, "-c", STAGE, "-f", *map(str, range(args.folds)))
        alone = () if args.ensembles else ("--disable_ensembling",)
        peer = sides.nnunet(*find, *alone, "-np", sides.processes, "-tr", *trainers)
        after = [disk_mib(sides.nnunet_model.parent), disk_mib(sides.root / "results")]
        peer_mib, mine_mib = (b - a for a, b in zip(before, after, strict=True))
        found = json.loads((sides.root / "results" / sides.raw.name / "selection.json").read_text())
    print(mine.output)
    said = ("Best", "were improved", "nnUNetTrainer")
    print("\n".join(line for line in peer.output.splitlines() if any(word in line for word in said)))
    print(f"nnunetv2: {peer}, {peer_mib:.2f} MiB on disk")
    print(f"ours: {mine}, {mine_mib:.2f} MiB on disk")
    figures = {
        "name": "selection",
        "cases": found["candidates"][0]["dsc"]["cases"],
        "candidates": len(found["candidates"]),
        "peer_saving_s_of_one_model": round(saving, 1),
        "ours_saving_s_of_one_model": round(keeping, 1),
        "ours_cpu_s": round(mine.cpu_s, 1),
        "peer_cpu_s": round(peer.cpu_s, 1),
        "ratio_cpu": round(peer.cpu_s / mine.cpu_s, 2),
        "ours_s": round(mine.wall_s, 1),
        "peer_s": round(peer.wall_s, 1),
        "ratio": round(peer.wall_s / mine.wall_s, 2),
        "ratio_memory": round(peer.peak_mib / mine.peak_mib, 2),
        "ours_mib": round(mine_mib, 2),
        "peer_mib": round(peer_mib, 2),
        "ratio_disk": round(peer_mib / mine_mib, 1),
    }
    print(json.dumps(figures))


def save_probabilities(sides: Sides, trainers: Sequence[str], cases: int | None, folds: int) -> float:
    """Probabilities of nnU-Net's validations, predicted for one model and given to all; processor seconds of one."""
    seconds = 0.0
    for fold in range(folds):
        images, out = sides.work / f"images_{fold}", sides.work / f"probabilities_{fold}"
        images.mkdir(exist_ok=True)
        for case in open_dataset(sides.raw).training[:cases][fold::folds]:
            for number, path in enumerate(case.images):
                link = images / f"{case.id}_{number:04d}.nii.gz"
                link.unlink(missing_ok=True)
                link.symlink_to(path.resolve())
        model = sides.nnunet_model
        if not (weights := model / f"fold_{fold}" / "checkpoint_final.pth").exists():
            weights.parent.mkdir(exist_ok=True)
            shutil.copy(model / "fold_0" / "checkpoint_final.pth", weights)
        words = ("-i", images, "-o", out, "-m", model, "-f", fold, "-device", "cpu", "--save_probabilities")
        if not (out / "predict_from_raw_data_args.json").exists():  # a kept --work has them from another run
            seconds += sides.nnunet("nnUNetv2_predict_from_modelfolder", *words, "-npp", 1, "-nps", 1).cpu_s
        for trainer in trainers:
            home = model.with_name(model.name.replace("nnUNetTrainer", trainer)) / f"fold_{fold}" / "validation"
            for path in (*out.glob("*.npz"), *out.glob("*.pkl")):
                shutil.copy(path, home / path.name)
    return seconds


def keep_probabilities(sides: Sides, cases: int | None, folds: int) -> float:
    """Probabilities of our validations, predicted for one model and given to all; processor seconds of one."""
    results, seconds = sides.root / "results" / sides.raw.name, 0.0
    for fold in range(folds):
        out = sides.work / f"kept_{fold}"
        images = [path for case in open_dataset(sides.raw).training[:cases][fold::folds] for path in case.images]
        model = results / f"model0__{STAGE}"
        words = ("-i", *images, "-o", out, "-m", model, "-f", fold, "--device", "cpu", "--probabilities")
        seconds += sides.ours("rfmed_predict", *words).cpu_s
        for number in range(MODELS):
            for path in (*out.glob("*.b2nd"), out / "predictions.json"):
                shutil.copy(path, results / f"model{number}__{STAGE}" / f"fold_{fold}" / "validation" / path.name)
    return seconds


def write_validations(sides: Sides, *, cases: int | None, folds: int) -> list[str]:
    """Models of both sides with the same label maps in the validation of every fold; nnU-Net's names of trainers."""
    mine, theirs = write_models(sides), sides.nnunet_model
    raw = open_dataset(sides.raw)
    references = sides.nnunet_folder / "gt_segmentations"
    if not references.exists():
        references.symlink_to(sides.raw / "labelsTr")
    table = LabelTable(labels=raw.json.label_set, source=str(sides.raw))
    trainers = [f"nnUNetTrainer{number}" for number in range(MODELS)]
    for number, trainer in enumerate(trainers):
        results = sides.root / "results" / raw.name / f"model{number}__{STAGE}"
        copy = theirs.with_name(theirs.name.replace("nnUNetTrainer", trainer))
        shutil.copytree(theirs, copy, dirs_exist_ok=True)
        for fold in range(folds):
            shutil.copytree(mine / "fold_0", results / f"fold_{fold}", dirs_exist_ok=True)
            places = [folder / f"fold_{fold}" / "validation" for folder in (results, copy)]
            chosen = raw.training[:cases][fold::folds]
            for seed, case in enumerate(chosen):
                assert case.label is not None
                write_spoiled(places[0] / f"{case.id}.nii.gz", case.label, seed=seed * folds + fold, errors=number + 1)
            shutil.copytree(places[0], places[1], dirs_exist_ok=True)
            evaluate(places[0], sides.raw / "labelsTr", table, out=places[0], cases=[case.id for case in chosen])
    return trainers


def write_spoiled(path: Path, label: Path, *, seed: int, errors: int) -> None:
    """Write a label map with some errors."""
    rng = np.random.default_rng(seed)
    image = nib.load(label)
    labels = np.asarray(image.dataobj).astype(np.uint8)
    moved = ndimage.shift(labels, rng.normal(0, 0.3 * errors, 3), order=0)
    for value in np.unique(labels)[1:]:
        for _ in range(rng.integers(0, 1 + errors)):
            corner = [int(rng.integers(0, max(1, n - 3))) for n in labels.shape]
            moved[tuple(slice(c, c + int(rng.integers(1, 4))) for c in corner)] = value
    moved[(rng.random(labels.shape) < 0.001 * errors) & (moved > 0)] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(moved, image.affine, image.header), path)


def disk_mib(folder: Path) -> float:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


if __name__ == "__main__":
    main()
