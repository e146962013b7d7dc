#!/usr/bin/env python3
"""Automatic masks and single prompts: the published segment_anything_hq 0.3 against ours, equal weights, one run.

usage: python scripts/benchmarks/hq_package.py [--points-per-side 16] [--backbone vit_tiny] [--published FOLDER]
           [--rounds 2] [--device cpu]

Both sides run in turn in separate processes (both packages have the same name), on one image with the same weights:
MobileSAM's real ones and an image of ECSSD (RFMED_TEST_DATA), else random ones; what HQ-SAM adds is random. The best of
`--rounds` counts. The figure is `set_image` and all points of the grid, through to masks of the image's size, nothing
filtered, so that every point is computed in full. Also printed: `set_image` alone, one box, and the same grid with the
published thresholds (where ours makes no masks that would be dropped). The published package is installed into a folder
of its own unless --published names one. The last line is JSON, ratio is peer over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "segment-anything-hq==0.3"
LOOSE = {"pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points-per-side", type=int, default=16)
    parser.add_argument("--backbone", default="vit_tiny", choices=("vit_tiny", "vit_b", "vit_l", "vit_h"))
    parser.add_argument("--published", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        one_side(args.side, args.device)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        published = args.published or installed(work / "published")
        torch.save(task(args.backbone, args.points_per_side), work / "task.pt")
        rounds = [(asked(work, published, args.device), asked(work, ROOT, args.device)) for _ in range(args.rounds)]
    peer, ours = (best(answers) for answers in zip(*rounds, strict=True))
    worst = differing_share(ours["masks"], peer["masks"])
    for what in ("automatic", "set_image", "box", "thresholds"):
        a, b = ours["seconds"][what], peer["seconds"][what]
        print(f"{what}: ours {a:.3f} s, published {b:.3f} s, {b / a:.2f}x")
    print(f"{len(ours['masks'])} masks; where they differ most, {worst:.2e} of the pixels do")
    if worst > 1e-3:
        raise SystemExit("masks differ")
    a, b = (round(side["seconds"]["automatic"], 3) for side in (ours, peer))
    result = {"name": "hq_package", "ours": a, "peer": b, "ratio": round(b / a, 2), "points": args.points_per_side**2}
    print(json.dumps({**result, "backbone": args.backbone, "device": args.device, "threads": torch.get_num_threads()}))


def installed(folder: Path) -> Path:
    """The published package in a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return folder


def task(backbone: str, points_per_side: int) -> dict[str, Any]:
    """Image and weights for both sides."""
    from segment_anything_hq import sam_model_registry

    torch.manual_seed(0)
    sam = sam_model_registry[backbone]()
    weights = dict(sam.state_dict())
    data = Path(os.environ.get("RFMED_TEST_DATA", ROOT.parent / "shared" / "data"))
    real, images = data / "weights-mobilesam" / "mobile_sam.pt", sorted((data / "ecssd-300").rglob("*.jpg"))
    if backbone == "vit_tiny" and real.is_file():
        weights |= torch.load(real, map_location="cpu", weights_only=True)
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = np.asarray(Image.open(images[0]).convert("RGB")) if images else noise
    image = torch.from_numpy(image.copy())
    return {"backbone": backbone, "points_per_side": points_per_side, "weights": weights, "image": image}


def asked(work: Path, package: Path, device: str) -> dict[str, Any]:
    """What one side takes and gives."""
    environment = {**os.environ, "PYTHONPATH": str(package.resolve())}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--side", str(work), "--device", device]
    subprocess.run(command, check=True, env=environment, cwd=work)
    return torch.load(work / "answer.pt", weights_only=True)


def best(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The shortest time of each kind, in seconds."""
    seconds = {what: min(answer["seconds"][what] for answer in answers) for what in answers[0]["seconds"]}
    return {**answers[0], "seconds": seconds}


def one_side(work: Path, device: str) -> None:
    """Run the `segment_anything_hq` package that is importable here."""
    from segment_anything_hq import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry

    given = torch.load(work / "task.pt", weights_only=True)
    sam = sam_model_registry[given["backbone"]]()
    sam.load_state_dict(given["weights"], strict=False)
    # the published TinyViT attends with the biases of the last call of eval(), not with those loaded since
    sam.to(device).eval()
    image, points = given["image"].numpy(), given["points_per_side"]
    predictor, box = SamPredictor(sam), np.array([image.shape[1] * 0.2, image.shape[0] * 0.2, *image.shape[1::-1]])
    seconds = {}
    _, seconds["set_image"] = timed(lambda: predictor.set_image(image))
    seconds["box"] = min(timed(lambda: predictor.predict(box=box, multimask_output=False))[1] for _ in range(3))
    masks, seconds["automatic"] = timed(SamAutomaticMaskGenerator(sam, points, **LOOSE), image)
    _, seconds["thresholds"] = timed(SamAutomaticMaskGenerator(sam, points), image)
    order = sorted(range(len(masks)), key=lambda i: masks[i]["point_coords"])
    maps = torch.stack([torch.from_numpy(masks[i]["segmentation"]) for i in order])
    torch.save({"seconds": seconds, "masks": maps}, work / "answer.pt")


def timed(function: Any, *image: Any) -> tuple[Any, float]:
    """Result and seconds of a call, of a generator's `generate` where an image is given."""
    started = time.perf_counter()
    result = function.generate(*image) if image else function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def differing_share(ours: torch.Tensor, peer: torch.Tensor) -> float:
    """Share of differing pixels in the mask that differs most."""
    if ours.shape != peer.shape:
        raise SystemExit(f"not the same masks: {tuple(ours.shape)} and {tuple(peer.shape)}")
    return float((ours != peer).float().mean((1, 2)).max())


if __name__ == "__main__":
    main()
