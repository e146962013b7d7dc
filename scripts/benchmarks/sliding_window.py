#!/usr/bin/env python3
"""Sliding-window prediction: nnunetv2 against ours with the same tiny network on the same image, one run.

usage: python scripts/benchmarks/sliding_window.py [--quick] [--mirror] [--device cpu]

The network is so small that the cost of cutting, weighting and summing tiles shows. Each side runs twice, the better
time counts. Prints seconds, growth of memory and the largest difference of logits (nnunetv2 sums in half precision);
the last line is JSON. Needs the extra `nnunet`. On a busy machine set OMP_NUM_THREADS=1: threads that wait for one
another would measure other programs.
"""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace
from typing import Any

import torch
from _harness.usage import time_and_memory
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn

from rfmedsam2.inference.sliding_window import predict_slabs
from rfmedsam2.records.plan import Inference

CLASSES = 14
AXES = (0, 1, 2)


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small image and patch")
    parser.add_argument("--mirror", action="store_true", help="average over all flips")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    shape, patch = ((60, 144, 144), (20, 96, 96)) if args.quick else ((100, 472, 472), (40, 224, 192))
    torch.manual_seed(0)
    network = nn.Conv3d(1, CLASSES, 1).to(args.device).eval()
    image = torch.randn(1, *shape)
    device = torch.device(args.device)

    def ours() -> Tensor:
        # slabs are exported as they come; a sum stands for the consumer here
        slabs = predict_slabs(
            [network],
            image,
            patch_size=patch,
            inference=Inference(mirror=args.mirror),
            mirror_axes=AXES,
            device=device,
            outputs=CLASSES,
        )
        return torch.cat([slab.logits[:, :, ::4, ::4].clone() for slab in slabs], dim=1)

    def peer() -> Tensor:
        predictor: Any = nnUNetPredictor(
            use_mirroring=args.mirror,
            device=device,
            perform_everything_on_device=device.type == "cuda",
            allow_tqdm=False,
        )
        predictor.network = network
        predictor.allowed_mirroring_axes = AXES
        predictor.configuration_manager = SimpleNamespace(patch_size=patch)
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=CLASSES)
        return predictor.predict_sliding_window_return_logits(image)[:, :, ::4, ::4].float()

    first = (time_and_memory(ours), time_and_memory(peer))
    mine, mine_s, mine_mib = min(first[0], time_and_memory(ours), key=lambda run: run[1])
    other, other_s, other_mib = min(first[1], time_and_memory(peer), key=lambda run: run[1])
    # memory once grown is used again by the second run
    mine_mib, other_mib = max(mine_mib, first[0][2]), max(other_mib, first[1][2])
    inside = (slice(None), *(slice(p // 4, -p // 4) for p in (patch[0], patch[1] // 4, patch[2] // 4)))
    difference = (mine - other)[inside].abs().max().item()
    print(
        f"nnunetv2 {other_s:.2f} s +{other_mib} MiB, ours {mine_s:.2f} s +{mine_mib} MiB, {other_s / mine_s:.1f}x; "
        f"largest difference inside {difference:.1e}"
    )
    result = {"name": "sliding_window", "ours": round(mine_s, 3), "peer": round(other_s, 3)}
    print(json.dumps({**result, "ratio": round(other_s / mine_s, 2)}))


if __name__ == "__main__":
    main()
