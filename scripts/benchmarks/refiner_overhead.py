#!/usr/bin/env python3
"""Cost of refiners compared to their base: HQ-SAM, SAM-REF, SAM2-REF and SAM2Refiner against SAM and SAM 2, one run.

usage: python scripts/benchmarks/refiner_overhead.py [--backbone vit_tiny] [--backbone2 hiera_t] [--size 1024] [--rounds
           5] [--device auto]
       python scripts/benchmarks/refiner_overhead.py --quick (256 pixels, 3 rounds)

Random weights, one frame of noise. Measured as in the papers: a frame is encoded and one click is decoded to a mask of
the frame's size; also one more click on the same frame, for refiners with the previous result. Method and
base run in turn, the median counts. The papers' figures are of a GPU (HQ-SAM's of ViT-L, SAM2Refiner's of Hiera-L); a
CPU pays in full for what a GPU does at once, above all for SAM2Refiner's five frames instead of one. The last line
is JSON, unsuffixed HQ-SAM's: seconds, and ratio is peer over ours, the share of the base's frames per second.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2.nn.segmenter import PromptBatch, Segmented
from rfmedsam2.system.devices import choose_device
from segment_anything_hq import models
from segment_anything_hq.choices import Backbone, Method, ZeroShot

METHODS: dict[Method, tuple[ZeroShot, float]] = {
    "hq_sam": ("sam", 0.97),
    "sam_ref": ("sam", 0.98),
    "sam2_ref": ("sam2", 0.93),
    "sam2_refiner": ("sam2", 0.85),
}
"""Each one's base, and the published share of its frames per second."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds of one side: the frame with its first click, and the second click."""

    frame: float
    click: float


class Side:
    """A network that is timed on one frame."""

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network, self.device = network.to(device), device
        side = network.frame_size
        self.image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def run(self) -> Seconds:
        """Encode, click, click again."""

        def encoded() -> Any:
            embedded = self.network.encode(self.network.normalize(self.image))
            prepare = getattr(self.network, "prepare", None)
            return embedded if prepare is None else prepare(embedded)

        embedded, encoding = self._timed(encoded)
        first, clicking = self._timed(lambda: self._masked(embedded, 1, None))
        _, again = self._timed(lambda: self._masked(embedded, 2, first))
        return Seconds(frame=encoding + clicking, click=again)

    def _masked(self, embedded: Any, clicks: int, before: Segmented | None) -> Segmented:
        side, device = self.network.frame_size, self.device
        points = torch.tensor([[[0.4, 0.5], [0.6, 0.3]]], device=device)[:, :clicks] * side
        prompted = PromptBatch(
            images=torch.zeros(1, dtype=torch.long, device=device),
            points=points,
            point_labels=torch.ones(1, clicks, dtype=torch.long, device=device),
            masks=None if before is None else before.logits,
        )
        answer = self.network.segment(embedded, prompted, previous=before)
        shown: Tensor = F.interpolate(answer.final[:, None], (side, side), mode="bilinear", align_corners=False) > 0
        assert shown.shape[-1] == side
        return answer

    def _timed(self, function: Callable[[], Any]) -> tuple[Any, float]:
        self._wait()
        started = time.perf_counter()
        result = function()
        self._wait()
        return result, time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Run every method beside its base and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_tiny", choices=("vit_tiny", "vit_b", "vit_l", "vit_h"))
    parser.add_argument("--backbone2", default="hiera_t", choices=("hiera_t", "hiera_s", "hiera_b+", "hiera_l"))
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="256 pixels, 3 rounds")
    args = parser.parse_args()
    size, rounds = (256, 3) if args.quick else (args.size, args.rounds)
    device = choose_device(args.device)
    torch.manual_seed(0)
    result: dict[str, Any] = {"name": "refiner_overhead"}
    for method, (base, published) in METHODS.items():
        backbone: Backbone = args.backbone2 if base == "sam2" else args.backbone
        ours, peer = compared(method, base, backbone, size=size, rounds=rounds, device=device)
        ratio = peer.frame / ours.frame
        print(
            f"{method} on {backbone}: frame and click {ours.frame:.3f} s, {base} {peer.frame:.3f} s, {ratio:.2f} of "
            f"its frames per second (published {published}); second click {ours.click:.4f} s, {base} {peer.click:.4f} s"
        )
        end = "" if method == "hq_sam" else f"_{method}"
        figures = {"ours": round(ours.frame, 4), "peer": round(peer.frame, 4), "ratio": round(ratio, 3)}
        result |= {f"{name}{end}": figure for name, figure in figures.items()}
    setting = {"size": size, "backbones": [args.backbone, args.backbone2], "device": device.type}
    print(json.dumps({**result, **setting, "threads": torch.get_num_threads()}))


def compared(
    method: Method, base: ZeroShot, backbone: Backbone, *, size: int, rounds: int, device: torch.device
) -> tuple[Seconds, Seconds]:
    """Medians of the method and of its base, which run in turn; the first run of each is not counted."""
    sides = [Side(models.build(each, backbone, frame_size=size), device) for each in (method, base)]
    runs = [[side.run() for side in sides] for _ in range(rounds + 1)][1:]
    return tuple(  # pyright: ignore[reportReturnType]
        Seconds(frame=median(one.frame for one in each), click=median(one.click for one in each))
        for each in zip(*runs, strict=True)
    )


if __name__ == "__main__":
    main()
