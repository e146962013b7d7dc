#!/usr/bin/env python3
"""Prompts from masks: a Python loop over (slice, class) pairs against ours, 32 x 13 masks of 256 x 256, one run.

usage: python scripts/benchmarks/prompts.py [--device auto] [--repeats 15]

Label maps of a real abdominal CT (RFMED_TEST_DATA), random blocks if the data sets are not available. Peer: for each
frame and class the mask `labels == k`, its box by SAM 2's own `mask_to_box`, and its presence. Also timed: a loop
that looks only for the extent of the mask's pixels. Boxes must be equal. The best of `--repeats` runs counts; the last
line is JSON, ratio is peer over ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _harness.data import labels_with_most_organs
from sam2.utils.misc import mask_to_box
from torch import Tensor

from rfmedsam2.prompts import center_points, prompts_from_labels, prompts_from_members
from rfmedsam2.system.devices import choose_device

FRAMES, CLASSES, SIZE = 32, 13, 256


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    device = choose_device(args.device)
    labels = label_maps().to(device)
    members = labels[:, None] == torch.arange(1, CLASSES + 1, device=device).view(1, -1, 1, 1)
    ours, ours_s = best(lambda: prompts_from_labels(labels, CLASSES), args.repeats, device)
    peer, peer_s = best(lambda: loop(labels, box_by_grid), args.repeats, device)
    ends, ends_s = best(lambda: loop(labels, box_by_ends), args.repeats, device)
    _, members_s = best(lambda: prompts_from_members(members), args.repeats, device)
    _, points_s = best(lambda: center_points(labels, CLASSES), args.repeats, device)
    if not (torch.equal(ours.boxes, peer[0]) and torch.equal(ours.present, peer[1]) and torch.equal(peer[0], ends[0])):
        raise SystemExit("boxes differ")
    print(
        f"{int(ours.present.sum())} of {ours.present.numel()} cells present; ours {ours_s * 1e3:.2f} ms; "
        f"loop with mask_to_box {peer_s * 1e3:.1f} ms ({peer_s / ours_s:.0f}x), "
        f"loop over ends {ends_s * 1e3:.1f} ms ({ends_s / ours_s:.0f}x); "
        f"ours from overlapping masks {members_s * 1e3:.2f} ms, points {points_s * 1e3:.2f} ms"
    )
    result = {"name": "prompts", "ours": round(ours_s, 5), "peer": round(peer_s, 5)}
    print(json.dumps({**result, "ratio": round(peer_s / ours_s, 1), "device": device.type}))


def label_maps() -> Tensor:
    """(FRAMES, SIZE, SIZE) int64, as an arg-max gives them."""
    real = labels_with_most_organs(FRAMES)
    if real is not None:
        maps = torch.from_numpy(real)[:, None].float()
        return F.interpolate(maps, (SIZE, SIZE), mode="nearest-exact")[:, 0].long()
    torch.manual_seed(0)
    blocks = torch.randint(-10, CLASSES + 1, (FRAMES, 1, 6, 6)).clamp_min(0).float()
    return F.interpolate(blocks, (SIZE, SIZE), mode="nearest-exact")[:, 0].long()


def loop(labels: Tensor, box_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes and presence of every (slice, class), one after another."""
    boxes = torch.zeros(len(labels), CLASSES, 4, device=labels.device)
    present = torch.zeros(len(labels), CLASSES, dtype=torch.bool, device=labels.device)
    for frame in range(len(labels)):
        for k in range(CLASSES):
            mask = labels[frame] == k + 1
            if mask.any():
                present[frame, k] = True
                boxes[frame, k] = box_of(mask)
    return boxes, present


def box_by_grid(mask: Tensor) -> Tensor:
    """As SAM 2 derives prompts from reference masks."""
    return mask_to_box(mask[None, None]).flatten().float()


def box_by_ends(mask: Tensor) -> Tensor:
    """From the extent of the mask's pixels."""
    ys, xs = torch.where(mask)
    return torch.stack([xs.min(), ys.min(), xs.max(), ys.max()]).float()


def best(function: Callable, repeats: int, device: torch.device) -> tuple:
    """The result, and the shortest time in seconds."""
    seconds, result = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)


if __name__ == "__main__":
    main()
