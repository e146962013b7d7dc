#!/usr/bin/env python3
"""The same networks by torch and by OpenVINO on this CPU, float32, one run: seconds of a tile, largest difference.

usage: python scripts/benchmarks/cpu_backends.py [--network NAME ...] [--runs 3] [--quick]

Networks have random weights; plain, residual and 2d are nnU-Net's own sizes, small is that of the preset cpu for
Hippocampus. Each backend runs a tile once unseen, then both by turns; the fastest counts, and so do processor seconds,
which a busy machine disturbs less. Conversion is timed apart. The last line is JSON; ratios are torch's seconds over
OpenVINO's. Needs the extra `openvino`. Threads are torch's: OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rfmedsam2.inference.backends.backend import SourceNetwork
from rfmedsam2.inference.backends.cache import ConversionCache
from rfmedsam2.inference.backends.openvino_backend import OpenVinoBackend
from rfmedsam2.nn.unet import UNet
from rfmedsam2.records.model import UNetConfig

WIDE = (32, 64, 128, 256, 320, 320)
OWN: dict[str, Any] = {
    "features": WIDE,
    "kernel_sizes": ((1, 3, 3), *[(3, 3, 3)] * 5),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
    "encoder_blocks": (2,) * 6,
    "decoder_blocks": (2,) * 5,
}
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": (OWN, (32, 128, 128)),
    "residual": (
        {**OWN, "block": "residual", "encoder_blocks": (1, 3, 4, 6, 6, 6), "decoder_blocks": (1,) * 5},
        (32, 128, 128),
    ),
    "2d": (
        {
            "features": (32, 64, 128, 256, 512, 512, 512),
            "kernel_sizes": ((3, 3),) * 7,
            "strides": ((1, 1), *[(2, 2)] * 6),
            "encoder_blocks": (2,) * 7,
            "decoder_blocks": (2,) * 6,
        },
        (256, 256),
    ),
    "small": (
        {
            "features": (16, 32, 64, 128),
            "kernel_sizes": ((3, 3, 3),) * 4,
            "strides": ((1, 1, 1), *[(2, 2, 2)] * 3),
            "encoder_blocks": (2,) * 4,
            "decoder_blocks": (2,) * 3,
        },
        (40, 56, 40),
    ),
}


def main() -> None:
    """Time all networks and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--runs", type=int, default=3, help="of each, after the first")
    parser.add_argument("--quick", action="store_true", help="patches of a quarter of the size")
    args = parser.parse_args()
    figures: dict[str, Any] = {"name": "cpu_backends", "threads": torch.get_num_threads()}
    for name in args.network:
        fields, patch = NETWORKS[name]
        if args.quick and name != "small":
            patch = (*patch[:-2], patch[-2] // 2, patch[-1] // 2)
        figures[name] = compared(name, UNetConfig(**fields), patch, args.runs)
    print(json.dumps(figures))


def compared(name: str, config: UNetConfig, patch: tuple[int, ...], runs: int) -> dict[str, float]:
    """Figures of one network."""
    torch.manual_seed(0)
    network = UNet(config, channels=1, outputs=14).eval()
    source = SourceNetwork(network=network, model=config, input_shape=(1, *patch), weights_sha256=name)
    started = time.process_time()
    converted = OpenVinoBackend(ConversionCache(None)).prepare(source)
    conversion = time.process_time() - started
    tile = torch.randn(1, 1, *patch)
    sides: dict[str, Callable[[Tensor], Tensor]] = {"torch": network, "openvino": converted}
    wall: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    logits: dict[str, Tensor] = {}
    with torch.inference_mode():
        for _ in range(runs):
            for side, run in sides.items():
                before, cpu_before = time.perf_counter(), time.process_time()
                logits[side] = run(tile)
                wall[side].append(time.perf_counter() - before)
                cpu[side].append(time.process_time() - cpu_before)
    difference = float((logits["torch"] - logits["openvino"]).abs().max())
    ratio = min(wall["torch"]) / min(wall["openvino"])
    cpu_ratio = min(cpu["torch"]) / min(cpu["openvino"])
    seconds = " and ".join(f"{min(wall[side]):.3g} s ({min(cpu[side]):.3g} s)" for side in sides)
    print(
        f"{name}, {'x'.join(map(str, patch))}: torch and OpenVINO {seconds} wall (processor), {ratio:.2f} "
        f"({cpu_ratio:.2f}) times as fast; logits differ by {difference:.1e}; "
        f"converted, checked and measured in {conversion:.1f} processor seconds",
        flush=True,
    )
    return {
        "torch_s": round(min(wall["torch"]), 3),
        "openvino_s": round(min(wall["openvino"]), 3),
        "ratio": round(ratio, 2),
        "torch_cpu_s": round(min(cpu["torch"]), 3),
        "openvino_cpu_s": round(min(cpu["openvino"]), 3),
        "ratio_cpu": round(cpu_ratio, 2),
        "difference": difference,
    }


if __name__ == "__main__":
    main()
