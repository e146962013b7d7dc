#!/usr/bin/env python3
"""Predict the test volumes end to end: nnUNetv2_predict against rfmed_predict with the same small network, one run.

usage: python scripts/benchmarks/predict.py [--raw DATASET_FOLDER] [--work DIR] [--processes 2] [--mirror] [--quick]

Both run a U-Net of some hundred random weights on the CPU and write .nii.gz; nnU-Net with one process that prepares
and one that exports. What is compared is everything but the network: the time of its forward passes is subtracted from
both. Prints wall seconds, those of the network, peak memory of all processes together, and how many voxels
differ; the last line is JSON: ratios are theirs over ours. Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import json

from _harness.peers import STAGE, Sides, add_side_arguments, set_up_sides, write_models
from _harness.predictions import NNUNET, OURS, differences, timed_prediction


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_arguments(parser)
    parser.add_argument("--mirror", action="store_true", help="average over flips, as both do by default")
    args = parser.parse_args()
    with set_up_sides(args) as sides:
        write_models(sides)
        volumes = len(list((sides.raw / "imagesTs").iterdir()))
        peer, peer_s = timed_prediction(sides, NNUNET, nnunet_words(sides, mirror=args.mirror))
        mine, mine_s = timed_prediction(sides, OURS, our_words(sides, mirror=args.mirror))
        different, voxels = differences(sides.work / "preds_nnunet", sides.work / "preds_ours")
    for name, usage, network in (("nnunetv2", peer, peer_s), ("ours", mine, mine_s)):
        print(f"{name}: {volumes} volumes, {usage}, of it {network.wall_s:.1f} s in the network")
    print(f"{different} of {voxels} voxels differ")
    ours, theirs = mine.wall_s - mine_s.wall_s, peer.wall_s - peer_s.wall_s
    figures = {"name": "predict", "ours": round(ours, 2), "peer": round(theirs, 2), "ratio": round(theirs / ours, 2)}
    figures |= {"ours_mib": mine.peak_mib, "peer_mib": peer.peak_mib}
    print(json.dumps({**figures, "ratio_memory": round(peer.peak_mib / mine.peak_mib, 2)}))


def nnunet_words(sides: Sides, *, mirror: bool) -> list[object]:
    """Arguments of nnUNetv2_predict."""
    places = ["-i", sides.raw / "imagesTs", "-o", sides.work / "preds_nnunet", "-d", sides.number, "-c", STAGE]
    words = [*places, "-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1, "--disable_progress_bar"]
    return words if mirror else [*words, "--disable_tta"]


def our_words(sides: Sides, *, mirror: bool) -> list[object]:
    """Arguments of rfmed_predict."""
    places = ["-i", sides.raw / "imagesTs", "-o", sides.work / "preds_ours", "-m", sides.work / "model"]
    return [*places, "--device", "cpu", "--mirror", "on" if mirror else "off"]


if __name__ == "__main__":
    main()
