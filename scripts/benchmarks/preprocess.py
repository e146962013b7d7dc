#!/usr/bin/env python3
"""Fingerprint, plan and preprocess a dataset: nnunetv2's commands against ours, as a user types them, one run.

usage: python scripts/benchmarks/preprocess.py [--raw DATASET_FOLDER] [--work DIR] [--processes 2] [--quick]

Both plan by nnU-Net's rules and preprocess 3d_fullres. Ours runs three times: without compiled kernels (cold), then
twice with compiled kernels on disk; the better counts. Each run reads all data and writes all results again. Prints
wall and processor seconds, peak memory of all processes together, and by how much the arrays differ where both used the
same plans (ours counts all voxels of the foreground, nnU-Net a sample, so that intensities differ in the fourth digit).
The last line is JSON: ratios are theirs over ours. Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from typing import Any

import blosc2
import numpy as np
from _harness.peers import STAGE, Sides, add_side_arguments, set_up_sides
from _harness.usage import Usage

from rfmedsam2.store.preprocessed import CaseStore

PLAN = "benchmark"


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_arguments(parser)
    with set_up_sides(parser.parse_args()) as sides:
        peer = nnunet(sides)
        cold = ours(sides, cold=True)
        warm = min((ours(sides, cold=False) for _ in range(2)), key=lambda usage: usage.wall_s)
        image, label, voxels = differences(sides)
    for name, usage in (("nnunetv2", peer), ("ours, cold", cold), ("ours, warm", warm)):
        print(f"{name}: {usage}")
    print(f"Images differ by at most {image:.1e}; {label} of {voxels} labels differ")
    figures = {"name": "preprocess", "ours": round(warm.wall_s, 2), "peer": round(peer.wall_s, 2)}
    figures |= {"ratio": round(peer.wall_s / warm.wall_s, 2), "ratio_cold": round(peer.wall_s / cold.wall_s, 2)}
    figures |= {"ratio_cpu": round(peer.cpu_s / warm.cpu_s, 2), "ours_mib": warm.peak_mib, "peer_mib": peer.peak_mib}
    print(json.dumps({**figures, "ratio_memory": round(peer.peak_mib / warm.peak_mib, 2)}))


def nnunet(sides: Sides) -> Usage:
    """Fingerprint, plan, preprocess."""
    shutil.rmtree(sides.nnunet_folder, ignore_errors=True)
    count = sides.processes
    return sides.nnunet(
        "nnUNetv2_plan_and_preprocess", "-d", sides.number, "-c", STAGE, "-npfp", count, "-np", count, "--no_pbar"
    )


def ours(sides: Sides, *, cold: bool) -> Usage:
    """Verify, fingerprint, plan, preprocess."""
    shutil.rmtree(sides.root / "preprocessed", ignore_errors=True)
    kernels = sides.work / "compiled"
    if cold:
        shutil.rmtree(kernels, ignore_errors=True)
    words = ("-d", sides.number, "-c", STAGE, "--preset", "nnunet", "-p", PLAN, "--workers", sides.processes)
    return sides.ours("rfmed_plan_and_preprocess", *words, env={"NUMBA_CACHE_DIR": str(kernels)})


def differences(sides: Sides) -> tuple[float, int, int]:
    """Largest difference of images; number of differing labels, and of all; both with nnU-Net's plans."""
    words = ("-d", sides.number, "-c", STAGE, "--nnunet-plans", sides.nnunet_folder / "nnUNetPlans.json", "-p", PLAN)
    sides.ours("rfmed_plan_and_preprocess", *words)
    folder = sides.root / "preprocessed" / sides.raw.name / f"{PLAN}_{STAGE}"
    theirs = sides.nnunet_folder / f"nnUNetPlans_{STAGE}"
    store, image, label, voxels = CaseStore(folder), 0.0, 0, 0
    for name in store.ids():
        case = store.open(name)
        arrays: list[Any] = [blosc2.open(str(theirs / f"{name}{part}.b2nd")) for part in ("", "_seg")]
        expected_image, expected_label = (array[...] for array in arrays)
        image = max(image, float(np.abs(case.image() - expected_image).max()))
        # nnU-Net marks zeros outside the body as -1, and takes them for background when it trains
        label += int(np.count_nonzero(case.label() != np.maximum(expected_label[0], 0)))
        voxels += expected_label.size
    return image, label, voxels


if __name__ == "__main__":
    main()
