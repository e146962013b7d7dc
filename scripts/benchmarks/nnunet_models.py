#!/usr/bin/env python3
"""A model that nnU-Net trained: nnUNetv2_predict against rfmed_predict with the same folder, and its import, one run.

usage: python scripts/benchmarks/nnunet_models.py [--raw DATASET_FOLDER] [--work DIR] [--model NNUNET_MODEL]
           [--slices 48] [--plane 256] [--ours fp32:torch bf16:torch fp32:openvino] [--long 300]
           [--long-plane 256] [--classes 118] [--limit-mib 16000] [--only network|classes|import] [--quick]

Three parts, each without mirroring and with one process of nnU-Net that prepares and one that exports. network: its
own 3d_fullres network, all of it counted, on a test volume cropped to slices and plane; ours once for every precision
and backend of --ours; without --model the weights are
random, so that labels are near ties (nnU-Net sums up in half precision). classes: a tiny network with 117 classes on
300 slices of 1.5 mm, its seconds taken off both; nnU-Net is killed beyond the limit of memory. import: five
folds with their optimizer's state, as trainers write them. The last line is JSON; ratios are theirs over ours.
Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from _harness.peers import STAGE, Sides, add_side_arguments, set_up_sides, write_models, write_volume
from _harness.predictions import NNUNET, OURS, Network, differences, mean_dice, timed_prediction
from _harness.usage import Usage

FOLDS = 5
PARTS = ("network", "import", "classes")
MM = 1.5


def main() -> None:
    """Run the parts and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_arguments(parser)
    parser.add_argument("--model", type=Path, help="folder of a model that nnU-Net trained, for the dataset of --raw")
    parser.add_argument("--slices", type=int, default=48, help="of the volume for nnU-Net's own network")
    parser.add_argument("--plane", type=int, default=256, help="side of its slices")
    parser.add_argument("--ours", nargs="+", default=["fp32:torch"], help="precision and backend of our network")
    parser.add_argument("--long", type=int, default=300, help="slices of the volume with many classes")
    parser.add_argument("--long-plane", type=int, default=256, help="side of its slices")
    parser.add_argument("--classes", type=int, default=118, help="with background")
    parser.add_argument("--limit-mib", type=int, default=16_000, help="of nnU-Net with many classes")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    args = parser.parse_args()
    figures: dict[str, Any] = {"name": "nnunet_models"}
    run = {"network": own_network, "import": import_of_folds, "classes": many_classes}
    with set_up_sides(args) as sides:
        for part in PARTS if args.only is None else (args.only,):
            figures |= run[part](sides, args)
    print(json.dumps(figures))


def own_network(sides: Sides, args: argparse.Namespace) -> dict[str, Any]:
    """nnU-Net's own network, counted with all else."""
    _place_model(sides, args)
    first = min((sides.raw / "imagesTs").glob("*.nii.gz"))
    write_volume(sides.work / "small" / "small_0000.nii.gz", first, args.slices, plane=args.plane)
    peer, network = _theirs(sides, "small")
    print(f"own network, nnunetv2: {peer}, {_of_it(network)}")
    figures: dict[str, Any] = {"peer_s": round(peer.wall_s, 1)}
    for way in args.ours:
        precision, _, backend = way.partition(":")
        mine, network = _ours(sides, "small", "--precision", precision, "--backend", backend or "torch")
        places = [sides.work / f"small_{side}" for side in ("nnunet", "ours")]
        (different, voxels), dice = differences(*places), mean_dice(*places)
        print(f"own network, ours, {way}: {mine}, {_of_it(network)}")
        print(f"{different} of {voxels} voxels differ, mean DSC {dice:.4f}")
        figures[way] = {
            "ours_s": round(mine.wall_s, 1),
            "ratio": round(peer.wall_s / mine.wall_s, 2),
            "ratio_cpu": round(peer.cpu_s / mine.cpu_s, 2),
            "ratio_memory": round(peer.peak_mib / mine.peak_mib, 2),
            "dice": round(dice, 4),
        }
    return figures


def import_of_folds(sides: Sides, args: argparse.Namespace) -> dict[str, Any]:
    """Five folds of nnU-Net's own network."""
    _place_model(sides, args)
    source = sides.nnunet_model
    weights_mib = _five_folds(source)
    shutil.rmtree(sides.root / "results", ignore_errors=True)
    usage = sides.ours("rfmed_import_model", source)
    files = [path for path in (sides.root / "results").rglob("*") if path.is_file()]
    copied_mib = sum(path.stat().st_size for path in files) / 2**20
    print(f"import of {FOLDS} folds: {usage}; {copied_mib:.0f} MiB written, of them {weights_mib:.0f} MiB weights")
    shutil.rmtree(sides.root / "results")
    for fold in range(1, FOLDS):
        shutil.rmtree(source / f"fold_{fold}")
    return {"import_s": round(usage.wall_s, 2), "import_mib": round(copied_mib), "weights_mib": round(weights_mib)}


def many_classes(sides: Sides, args: argparse.Namespace) -> dict[str, Any]:
    """As many classes as TotalSegmentator's, without the network."""
    write_models(sides, classes=args.classes, spacing_mm=MM)
    first = min((sides.raw / "imagesTs").glob("*.nii.gz"))
    write_volume(sides.work / "long" / "long_0000.nii.gz", first, args.long, plane=args.long_plane, spacing_mm=MM)
    peer, theirs = _theirs(sides, "long", limit_mib=args.limit_mib)
    mine, ours = _ours(sides, "long")
    end = f"killed at the limit of {args.limit_mib} MiB" if peer.stopped else _of_it(theirs)
    print(f"{args.classes - 1} classes, nnunetv2: {peer}; {end}")
    print(f"{args.classes - 1} classes, ours: {mine}, {_of_it(ours)}")
    figures: dict[str, Any] = {
        "classes_ours_s": round(mine.wall_s - ours.wall_s, 1),
        "classes_ratio_memory": round(peer.peak_mib / mine.peak_mib, 2),
        "classes_peer_finished": not peer.stopped,
    }
    if not peer.stopped:
        different, voxels = differences(sides.work / "long_nnunet", sides.work / "long_ours")
        print(f"{different} of {voxels} voxels differ")
        figures["classes_ratio"] = round((peer.wall_s - theirs.wall_s) / (mine.wall_s - ours.wall_s), 2)
        figures["classes_ratio_cpu"] = round((peer.cpu_s - theirs.cpu_s) / (mine.cpu_s - ours.cpu_s), 2)
    return figures


def _place_model(sides: Sides, args: argparse.Namespace) -> None:
    if args.model is None:
        write_models(sides, features=None)
    else:
        shutil.rmtree(sides.nnunet_model, ignore_errors=True)
        shutil.copytree(args.model, sides.nnunet_model)


def _five_folds(model: Path) -> float:
    """Give a model five folds that hold what trainers save; gives the MiB of their weights."""
    content = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    # under several names are the same tensors
    tensors = {tensor.data_ptr(): tensor for tensor in content["network_weights"].values()}.values()
    content["optimizer_state"] = {"state": {i: {"momentum_buffer": t.clone()} for i, t in enumerate(tensors)}}
    for fold in range(FOLDS):
        (model / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(content, model / f"fold_{fold}" / "checkpoint_final.pth")
    return FOLDS * sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def _theirs(sides: Sides, name: str, *, limit_mib: int | None = None) -> tuple[Usage, Network]:
    """Predict work/NAME with nnU-Net's command."""
    words = ["-i", sides.work / name, "-o", sides.work / f"{name}_nnunet", "-d", sides.number, "-c", STAGE, "-f", 0]
    words += ["-device", "cpu", "-npp", 1, "-nps", 1, "--disable_tta", "--disable_progress_bar"]
    return timed_prediction(sides, NNUNET, words, limit_mib=limit_mib)


def _ours(sides: Sides, name: str, *more: object) -> tuple[Usage, Network]:
    """Predict work/NAME with our command."""
    words = ["-i", sides.work / name, "-o", sides.work / f"{name}_ours", "-m", sides.nnunet_model, "-f", 0]
    return timed_prediction(sides, OURS, [*words, "--device", "cpu", "--mirror", "off", *more])


def _of_it(network: Network) -> str:
    return f"of it {network.wall_s:.1f} s ({network.cpu_s:.1f} CPU-s) in the network"


if __name__ == "__main__":
    main()
