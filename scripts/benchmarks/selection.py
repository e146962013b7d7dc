#!/usr/bin/env python3
"""Cross-validation of three models over five folds: nnUNetv2_find_best_configuration against rfmed_select.

usage: python scripts/benchmarks/selection.py --raw DATASET_FOLDER [--work DIR] [--processes 2]

The label maps of the validation are the reference labels with errors: moved surfaces, islands and holes, more of them
in each model. nnU-Net scores them again and rewrites them for every step of postprocessing that it tries (the largest
component); ours reads the scores of the trainings, which are not counted on either side, and tries smallest volumes
and holes, too. Both without ensembles. The last line is JSON; ratios are theirs over ours. Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from _harness.peers import STAGE, Sides, add_side_arguments, set_up_sides, write_models
from scipy import ndimage

from rfmedsam2.pipeline.evaluation.evaluate import evaluate
from rfmedsam2.pipeline.evaluation.label_tables import LabelTable
from rfmedsam2.store.raw import open_dataset

FOLDS = 5
MODELS = 3


def main() -> None:
    """Make the models, run both commands and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_arguments(parser)
    args = parser.parse_args()
    with set_up_sides(args) as sides:
        trainers = write_validations(sides)
        before = [disk_mib(sides.nnunet_model.parent), disk_mib(sides.root / "results")]
        words = ("-d", sides.raw.name, "--workers", sides.processes)
        mine = sides.ours("rfmed_select", *words)
        find = ("nnUNetv2_find_best_configuration", sides.number, "-c", STAGE, "--disable_ensembling")
        peer = sides.nnunet(*find, "-np", sides.processes, "-tr", *trainers)
        after = [disk_mib(sides.nnunet_model.parent), disk_mib(sides.root / "results")]
        peer_mib, mine_mib = (b - a for a, b in zip(before, after, strict=True))
        found = json.loads((sides.root / "results" / sides.raw.name / "selection.json").read_text())
    print(mine.output)
    print("\n".join(line for line in peer.output.splitlines() if "Best" in line or "were improved" in line))
    print(f"nnunetv2: {peer}, {peer_mib:.2f} MiB on disk")
    print(f"ours: {mine}, {mine_mib:.2f} MiB on disk")
    figures = {
        "name": "selection",
        "cases": found["candidates"][0]["dsc"]["cases"],
        "ours_s": round(mine.wall_s, 1),
        "peer_s": round(peer.wall_s, 1),
        "ratio": round(peer.wall_s / mine.wall_s, 2),
        "ratio_memory": round(peer.peak_mib / mine.peak_mib, 2),
        "ratio_disk": round(peer_mib / mine_mib, 1),
    }
    print(json.dumps(figures))


def write_validations(sides: Sides) -> list[str]:
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
        for fold in range(FOLDS):
            shutil.copytree(mine / "fold_0", results / f"fold_{fold}", dirs_exist_ok=True)
            places = [folder / f"fold_{fold}" / "validation" for folder in (results, copy)]
            cases = raw.training[fold::FOLDS]
            for seed, case in enumerate(cases):
                assert case.label is not None
                write_spoiled(places[0] / f"{case.id}.nii.gz", case.label, seed=seed * FOLDS + fold, errors=number + 1)
            shutil.copytree(places[0], places[1], dirs_exist_ok=True)
            evaluate(places[0], sides.raw / "labelsTr", table, out=places[0], cases=[case.id for case in cases])
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
