#!/usr/bin/env python3
"""Evaluation of label maps in files: rfmed_evaluate against nnunetv2's command, and against surface-distance.

usage: python scripts/benchmarks/evaluate.py [--raw DATASET_FOLDER] [--volumes 20] [--peer-volumes 2] [--repeats 1]
           [--quick]

References are the label maps of a raw dataset (else of phantoms of 512x512x100), in turn; predictions are the same
moved by some voxels, with islands of wrong labels. Ours: DSC, IoU, NSD, HD95 and volume errors; nnunetv2
(nnUNetv2_evaluate_simple): Dice and IoU; two workers each, a process of its own, imports and reading included.
surface-distance's NSD and HD95 of each class are computed here on some volumes in one thread and extrapolated to all.
Prints seconds, memory of all processes and the largest differences of results, which must not exceed 1e-6. The last
line is JSON; ratio is nnunetv2's wall time over ours: larger is better for us. Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import SimpleITK
import surface_distance.metrics as deepmind
from _harness.usage import Usage, installed_program, run_measured

from rfmedsam2.metrics.volumes import NSD_TOLERANCE_MM
from rfmedsam2.pipeline.datasets.phantom import make_phantom

WORKERS = 2
LARGEST_DIFFERENCE = 1e-6
FULL, QUICK = (100, 512, 512), (24, 128, 128)
Scores = dict[str, dict[str, dict[str, float | None]]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="a raw dataset; without: phantoms")
    parser.add_argument("--volumes", type=int, default=20)
    parser.add_argument("--peer-volumes", type=int, default=2, help="that surface-distance scores")
    parser.add_argument("--repeats", type=int, default=1, help="in turns; the best counts")
    parser.add_argument("--quick", action="store_true", help="4 small phantoms")
    args = parser.parse_args()
    volumes = 4 if args.quick else args.volumes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = args.raw or make_phantom(folder, cases=2, test_cases=0, shape_zyx=QUICK if args.quick else FULL)
        classes = {n: int(v) for n, v in json.loads((raw / "dataset.json").read_text())["labels"].items() if v}
        voxels = write_pairs(raw / "labelsTr", folder, volumes)
        one = folder / "one"
        write_pairs(raw / "labelsTr", one, 1)
        ours(one, raw / "dataset.json")  # so that compiled kernels are there, as after the first use
        pairs = [(ours(folder, raw / "dataset.json"), nnunet(folder, classes)) for _ in range(args.repeats)]
        mine, peer = (min(usages, key=lambda u: u.wall_s) for usages in zip(*pairs, strict=True))
        compare(folder, classes, args.peer_volumes, volumes)
    what = f"{volumes} volumes, {voxels / 1e6:.0f} million voxels, {len(classes)} classes"
    print(f"{what}\n  ours, all metrics: {mine}\n  nnunetv2, Dice:    {peer}\n  load {os.getloadavg()[0]:.1f}")
    line = {"name": "evaluate", "ours": round(mine.wall_s, 2), "peer": round(peer.wall_s, 2)}
    memory = {"ours_mib": mine.peak_mib, "peer_mib": peer.peak_mib}
    print(json.dumps(line | {"ratio": round(peer.wall_s / mine.wall_s, 2), **memory}))


def write_pairs(labels: Path, folder: Path, volumes: int) -> int:
    """Write `volumes` pairs into references/ and predictions/; return the references' labeled voxels."""
    random = np.random.default_rng(0)
    sources = sorted(labels.glob("*.nii.gz"))
    voxels = 0
    for side in ("references", "predictions"):
        (folder / side).mkdir(parents=True)
    for number in range(volumes):
        source = SimpleITK.ReadImage(str(sources[number % len(sources)]), SimpleITK.sitkUInt8)
        array = SimpleITK.GetArrayFromImage(source)
        voxels += array.size
        reference = moved(array, random, 8) if number >= len(sources) else array
        prediction = with_islands(moved(reference, random, 2), random)
        for side, values in (("references", reference), ("predictions", prediction)):
            image = SimpleITK.GetImageFromArray(values)
            image.CopyInformation(source)
            SimpleITK.WriteImage(image, str(folder / side / f"case_{number:03d}.nii.gz"), useCompression=True)
    return voxels


def moved(labels: np.ndarray, random: np.random.Generator, reach: int) -> np.ndarray:
    """Labels (Z, Y, X) shifted by up to `reach` voxels in plane, and half as far along z."""
    steps = [int(random.integers(-n, n + 1)) for n in (reach // 2, reach, reach)]
    return np.roll(labels, steps, (0, 1, 2))


def with_islands(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Labels with small blocks of wrong values within the body's box, as networks produce."""
    values = np.unique(labels)
    box = [(int(found.min()), int(found.max())) for found in np.nonzero(labels)]
    for _ in range(20):
        at = [int(random.integers(low, high + 1)) for low, high in box]
        labels[tuple(slice(a, a + n) for a, n in zip(at, (2, 6, 6), strict=True))] = random.choice(values)
    return labels


def ours(folder: Path, labels: Path) -> Usage:
    """Run rfmed_evaluate."""
    where = ("-p", folder / "predictions", "-g", folder / "references", "-o", folder / "ours")
    return run_measured([installed_program("rfmed_evaluate"), *where, "--labels", labels, "--workers", WORKERS])


def nnunet(folder: Path, classes: dict[str, int]) -> Usage:
    """Run nnunetv2's command."""
    where = (folder / "references", folder / "predictions", "-o", folder / "nnunet.json")
    values = ("-l", *classes.values(), "-np", WORKERS)
    return run_measured([installed_program("nnUNetv2_evaluate_simple"), *where, *values])


def compare(folder: Path, classes: dict[str, int], checked: int, volumes: int) -> None:
    """Print the largest differences of the scores, and the time of surface-distance.

    Raises:
        SystemExit: a score differs by more than LARGEST_DIFFERENCE.
    """
    cases = {c["id"]: c["classes"] for c in json.loads((folder / "ours" / "metrics.json").read_text())["cases"]}
    by_counts = json.loads((folder / "nnunet.json").read_text())["metric_per_case"]
    dice: Scores = {
        Path(case["reference_file"]).name.removesuffix(".nii.gz"): {
            name: {"dsc": case["metrics"][str(value)]["Dice"]} for name, value in classes.items()
        }
        for case in by_counts
    }
    began = time.perf_counter()
    surfaces = {name: by_surface(folder, name, classes) for name in sorted(cases)[:checked]}
    seconds = (time.perf_counter() - began) / max(len(surfaces), 1)
    found = {
        "DSC": largest_difference(cases, dice, "dsc"),
        "NSD": largest_difference(cases, surfaces, "nsd"),
        "HD95": largest_difference(cases, surfaces, "hd95_mm"),
    }
    print(f"surface-distance: {seconds:.2f} s a volume, {seconds * volumes:.0f} s for all")
    print("largest difference: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    if max(found.values()) > LARGEST_DIFFERENCE:
        raise SystemExit(f"the results differ by more than {LARGEST_DIFFERENCE}")


def by_surface(folder: Path, name: str, classes: dict[str, int]) -> dict[str, dict[str, float | None]]:
    """NSD and HD95 of every class of a case by surface-distance; None if a mask is empty."""
    files = [folder / side / f"{name}.nii.gz" for side in ("references", "predictions")]
    reference, prediction = (SimpleITK.ReadImage(str(file)) for file in files)
    spacing = reference.GetSpacing()[::-1]
    arrays = [SimpleITK.GetArrayFromImage(image) for image in (reference, prediction)]
    scores: dict[str, dict[str, float | None]] = {}
    for label, value in classes.items():
        masks = arrays[0] == value, arrays[1] == value
        scores[label] = {"nsd": None, "hd95_mm": None}
        if not any(mask.any() for mask in masks):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            distances = deepmind.compute_surface_distances(masks[0], masks[1], spacing)
        scores[label]["nsd"] = float(deepmind.compute_surface_dice_at_tolerance(distances, NSD_TOLERANCE_MM))
        hd95 = float(deepmind.compute_robust_hausdorff(distances, 95))
        scores[label]["hd95_mm"] = hd95 if np.isfinite(hd95) else None
    return scores


def largest_difference(ours_by_case: Scores, theirs: Scores, metric: str) -> float:
    """Over all cases and classes that the peer scored; infinite if only one side has a score."""
    differences = [0.0]
    for case, classes in theirs.items():
        for name, scores in classes.items():
            mine, other = ours_by_case[case][name][metric], scores[metric]
            missing = mine is None, other is None or bool(np.isnan(other))
            if mine is not None and other is not None and not any(missing):
                differences.append(abs(mine - other))
            elif not all(missing):
                differences.append(np.inf)
    return max(differences)


if __name__ == "__main__":
    main()
