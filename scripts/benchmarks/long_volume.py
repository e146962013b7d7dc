#!/usr/bin/env python3
"""Predict one volume of 1000 slices and 16 classes: peak memory of rfmed_predict and of nnUNetv2_predict, one run.

usage: python scripts/benchmarks/long_volume.py [--raw DATASET_FOLDER] [--work DIR] [--slices 1000] [--classes 16]
           [--limit-mib 20000] [--quick]

The volume repeats the slices of a test volume back and forth. Both run the same small random U-Net on the CPU, tiles
side by side, no mirroring, nnU-Net with one process that prepares and one that exports; it is killed if all its
processes together exceed the limit (0: it does not run). Prints wall seconds, peak memory, and what was written to disk
besides the output; the last line is JSON: figures are MiB, the ratio is theirs over ours (a lower bound if it was
killed). Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import json
import shutil

from _harness.peers import STAGE, Sides, add_side_arguments, set_up_sides, write_models, write_volume
from _harness.usage import Usage

from rfmedsam2.store.images import read_header


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_arguments(parser)
    parser.add_argument("--slices", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=16, help="with background")
    parser.add_argument("--limit-mib", type=int, default=20_000, help="of the peer")
    args = parser.parse_args()
    with set_up_sides(args) as sides:
        write_models(sides, classes=args.classes)
        volume = sides.work / "long" / "long_0000.nii.gz"
        write_volume(volume, min((sides.raw / "imagesTs").glob("*.nii.gz")), args.slices)
        for side in ("ours", "nnunet"):
            shutil.rmtree(sides.work / f"long_{side}", ignore_errors=True)
        mine = ours(sides)
        output = sum(file.stat().st_size for file in (sides.work / "long_ours").iterdir()) / 2**20
        z, y, x = read_header(volume).grid.shape_zyx
        print(f"{x}x{y}x{z}, {args.classes} classes: ours {mine}")
        print(f"Written: {mine.written_mib:.0f} MiB, of it the output {output:.0f} MiB")
        peer = nnunet(sides, args.limit_mib) if args.limit_mib else None
    figures = {"name": "long_volume", "ours": mine.peak_mib, "ours_s": round(mine.wall_s, 1)}
    figures |= {"written_beside_mib": round(max(0.0, mine.written_mib - output), 1)}
    if peer is not None:
        end = f"killed at the limit of {args.limit_mib} MiB" if peer.stopped else "finished"
        print(f"nnunetv2 {peer}; {end}")
        figures |= {
            "peer": peer.peak_mib,
            "ratio": round(peer.peak_mib / mine.peak_mib, 2),
            "peer_finished": not peer.stopped,
        }
    print(json.dumps(figures))


def ours(sides: Sides) -> Usage:
    """Predict with our command."""
    places = ("-i", sides.work / "long", "-o", sides.work / "long_ours", "-m", sides.work / "model")
    return sides.ours("rfmed_predict", *places, "--device", "cpu", "--mirror", "off", "--step-size", 1)


def nnunet(sides: Sides, limit_mib: int) -> Usage:
    """Predict with nnU-Net's command."""
    places = ("-i", sides.work / "long", "-o", sides.work / "long_nnunet", "-d", sides.number, "-c", STAGE)
    words = (
        *places,
        "-f",
        0,
        "-device",
        "cpu",
        "-npp",
        1,
        "-nps",
        1,
        "--disable_tta",
        "--disable_progress_bar",
        "-step_size",
        1,
    )
    return sides.nnunet("nnUNetv2_predict", *words, limit_mib=limit_mib)


if __name__ == "__main__":
    main()
