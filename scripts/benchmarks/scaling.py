#!/usr/bin/env python3
"""How time and memory of predicting grow with the number of slices: rfmed_predict beside nnUNetv2_predict, one run.

usage: python scripts/benchmarks/scaling.py [--raw DATASET_FOLDER] [--work DIR] [--slices 100 200 400 800]
           [--peer-slices 100 200] [--quick]

Volumes repeat the slices of a test volume back and forth; a small random U-Net on the CPU, tiles side by side, no
mirroring. Prints wall seconds and peak memory by number of slices and, from the last two rows, the cost of one more
slice, next to the size of its voxels in the input (int16), as the network sees them (float32) and in the output
(uint8). The last line is JSON: figures are seconds per slice, the ratio is theirs over ours. Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence

from _harness.peers import STAGE, Sides, add_side_arguments, set_up_sides, write_models, write_volume
from _harness.usage import Usage

from rfmedsam2.store.images import read_header

Row = tuple[int, Usage]
"""Slices, and what they took."""


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_arguments(parser)
    parser.add_argument("--slices", type=int, nargs="+", default=[100, 200, 400, 800])
    parser.add_argument("--peer-slices", type=int, nargs="*", default=[100, 200])
    args = parser.parse_args()
    with set_up_sides(args) as sides:
        write_models(sides)
        source = min((sides.raw / "imagesTs").glob("*.nii.gz"))
        _, rows, columns = read_header(source).grid.shape_zyx
        for slices in sorted({*args.slices, *args.peer_slices}):
            write_volume(sides.work / f"slices_{slices}" / "volume_0000.nii.gz", source, slices)
        mine = [(n, ours(sides, n)) for n in args.slices]
        peer = [(n, nnunet(sides, n)) for n in args.peer_slices]
    for name, table in (("ours", mine), ("nnunetv2", peer)):
        for slices, usage in table:
            print(f"{name}, {columns}x{rows}x{slices}: {usage}, {usage.wall_s / slices:.3f} s a slice")
    seconds, mib = growth(mine)
    print(f"One slice more: {seconds:.3f} s and {mib:.2f} MiB; its voxels in int16, float32, uint8: ", end="")
    print(", ".join(f"{size * rows * columns / 2**20:.2f}" for size in (2, 4, 1)) + " MiB")
    figures = {"name": "scaling", "ours": round(seconds, 4), "ours_mib_a_slice": round(mib, 2)}
    figures["ours_seconds"] = {n: round(usage.wall_s, 1) for n, usage in mine}
    figures["ours_mib"] = {n: usage.peak_mib for n, usage in mine}
    if len(peer) > 1:
        theirs, their_mib = growth(peer)
        figures |= {"peer": round(theirs, 4), "peer_mib_a_slice": round(their_mib, 2)}
        figures["ratio"] = round(theirs / seconds, 2)
    print(json.dumps(figures))


def growth(table: Sequence[Row]) -> tuple[float, float]:
    """Seconds and MiB of one more slice, from the last two rows."""
    (few, small), (many, large) = table[-2:]
    return (large.wall_s - small.wall_s) / (many - few), (large.peak_mib - small.peak_mib) / (many - few)


def ours(sides: Sides, slices: int) -> Usage:
    """Predict with our command."""
    out = sides.work / f"ours_{slices}"
    shutil.rmtree(out, ignore_errors=True)
    places = ("-i", sides.work / f"slices_{slices}", "-o", out, "-m", sides.work / "model")
    return sides.ours("rfmed_predict", *places, "--device", "cpu", "--mirror", "off", "--step-size", 1)


def nnunet(sides: Sides, slices: int) -> Usage:
    """Predict with nnU-Net's command."""
    out = sides.work / f"nnunet_{slices}"
    shutil.rmtree(out, ignore_errors=True)
    places = ("-i", sides.work / f"slices_{slices}", "-o", out, "-d", sides.number, "-c", STAGE, "-f", 0)
    words = ("-device", "cpu", "-npp", 1, "-nps", 1, "--disable_tta", "--disable_progress_bar", "-step_size", 1)
    return sides.nnunet("nnUNetv2_predict", *places, *words)


if __name__ == "__main__":
    main()
