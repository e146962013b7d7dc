#!/usr/bin/env python3
"""Prediction of an abdominal CT with RFMedSAM 2: Steps 1 and 2 beside the U-Net alone, and what is spent outside SAM 2.

usage: python scripts/benchmarks/refinement.py [--slices 100] [--backbone sam2_tiny] [--mirror] [--device auto]
           [--unet-tiles 1]

A volume of 512 x 512 x `--slices` with the plan plans/btcv.json, 256-pixel tiles at half a tile's distance, random
weights. The output of Step 0 is derived from labels, so that as many objects are decoded as in a real abdomen: those of
a real CT (RFMED_TEST_DATA), or of the phantom if the data sets are not available. The U-Net is timed on `--unet-tiles`
of its tiles (0: on all) and extrapolated to the volume.

Inside SAM 2: image encoder, decoder with prompt encoder, memory encoder, memory attention. Everything else that Steps 1
and 2 take is overhead: tiles, prompts, mask prompts, class maps, averaging. Its share is of the time that this process
computes (`cpu_overhead`) and that passes (`overhead`; other programs disturb that). The last line is JSON; ratio is
the U-Net with refinement over the U-Net alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from _harness.data import labels_with_most_organs
from torch import Tensor

from rfmedsam2.inference.refined_tiles import RefinedTiles, Request, Tiling
from rfmedsam2.inference.sliding_window import Execution, Slab, tile_starts
from rfmedsam2.nn import refiner
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.pipeline.datasets.phantom import phantom_case
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.devices import choose_device

SIDE = 512
CLASSES = 13
REAL_SLICES = 96
"""Larger volumes are stretched from this number of slices; organs fill an upper abdomen of 29 cm."""
PLAN = Path(__file__).resolve().parents[2] / "plans" / "btcv.json"


def main() -> None:
    """Run both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--backbone", default="sam2_tiny")
    parser.add_argument("--mirror", action="store_true", help="average over flips in the plane")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--unet-tiles", type=int, default=1)
    args = parser.parse_args()
    device = choose_device(args.device)
    stage = read_record(PLAN, Plan).stage("3d_fullres")
    torch.manual_seed(0)
    config = stage.model.model_copy(update={"backbone": args.backbone})
    network: Any = RFMedSam2(config, channels=1, outputs=CLASSES + 1, compute=stage.compute).eval().to(device)
    labels = label_maps(args.slices)
    tiling = Tiling(
        patch_size=stage.patch_size,
        inference=stage.inference.model_copy(update={"mirror": args.mirror}),
        mirror_axes=(1, 2),
    )
    unet_s = unet_seconds(network, stage, args.slices, count=args.unet_tiles, flips=4 if args.mirror else 1)
    tiles = RefinedTiles([network], torch.randn(1, *labels.shape), tiling=tiling, device=device, request=Request())
    clock = Clock(device)
    inside, given = Stopwatch(clock), Stopwatch(clock)
    with ExitStack() as stack:
        for place, name in parts_of(network):
            stack.enter_context(mock.patch.object(place, name, inside.timed(getattr(place, name))))
        started = clock()
        for _ in tiles.slabs(given.each(slabs_of(labels, device)), Execution()):
            pass  # exported as they come
        total = np.subtract(np.subtract(clock(), started), given.seconds)
    wall, cpu = 1 - np.divide(inside.seconds, total)
    frames = args.slices * len(tile_starts((SIDE,), (stage.patch_size[1],), 0.5)[0]) ** 2 * (4 if args.mirror else 1)
    print(
        f"{SIDE}x{SIDE}x{args.slices}: Steps 1 and 2 {total[0]:.1f} s ({tiles.encoded} of {frames} tiles of frames "
        f"encoded), outside SAM 2's modules {100 * wall:.1f} % (of processor time {100 * cpu:.1f} %); "
        f"U-Net alone {unet_s:.1f} s; by part {inside.summary()}"
    )
    result = {"name": "refinement", "ours": round(unet_s + total[0], 2), "peer": round(unet_s, 2)}
    result |= {"ratio": round((unet_s + total[0]) / unet_s, 3), "overhead": round(wall, 4)}
    print(json.dumps({**result, "cpu_overhead": round(cpu, 4), "slices": args.slices, "device": device.type}))


class Clock:
    """(seconds, processor seconds) now, after the device is idle."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> tuple[float, float]:
        """Read it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


class Stopwatch:
    """Sums the time of calls."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds = np.zeros(2)
        self.parts: dict[str, float] = {}

    def _add(self, name: str, started: tuple[float, float]) -> None:
        spent = np.subtract(self.clock(), started)
        self.seconds = self.seconds + spent
        self.parts[name] = self.parts.get(name, 0.0) + spent[0]

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(function.__name__, started)

        return wrapper

    def each(self, items: Iterator[Slab]) -> Iterator[Slab]:
        """Wrap an iterator."""
        while True:
            started = self.clock()
            item = next(items, None)
            self._add("given", started)
            if item is None:
                return
            yield item

    def summary(self) -> str:
        """Seconds by function."""
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.parts.items())


def parts_of(network: RFMedSam2) -> list[tuple[object, str]]:
    """Where SAM 2's modules are called."""
    sam = network.sam
    own: list[tuple[object, str]] = [(sam, name) for name in ("pyramid", "features", "decode", "encode_memory")]
    return own + [(refiner, name) for name in ("prepare_frames", "condition_on_memory")]


def unet_seconds(network: RFMedSam2, stage: Stage, slices: int, *, count: int, flips: int) -> float:
    """Seconds of Step 0 for the volume, from `count` of its tiles."""
    sizes = tuple(max(n, p) for n, p in zip((slices, SIDE, SIDE), stage.patch_size, strict=True))
    tiles = math.prod(len(starts) for starts in tile_starts(sizes, stage.patch_size, stage.inference.step_size)) * flips
    device = next(network.parameters()).device
    clock, tile = Clock(device), torch.randn(1, 1, *stage.patch_size, device=device)
    runs = min(count or tiles, tiles)
    with torch.inference_mode():
        if device.type == "cuda":
            network.prompt_volumes(tile)
        started = clock()
        for _ in range(runs):
            network.prompt_volumes(tile)
    return (clock()[0] - started[0]) / runs * tiles


def slabs_of(labels: Tensor, device: torch.device, planes: int = 16) -> Iterator[Slab]:
    """Logits like those of a trained U-Net: confident, with noise."""
    noise = torch.Generator().manual_seed(1)
    for start in range(0, len(labels), planes):
        part = labels[start : start + planes]
        logits = torch.randn(CLASSES + 1, *part.shape, generator=noise)
        logits.scatter_add_(0, part[None], torch.full_like(logits[:1], 12))
        yield Slab(start=start, logits=logits.to(device))


def label_maps(slices: int) -> Tensor:
    """(slices, SIDE, SIDE) int64, values 0..CLASSES."""
    found = labels_with_most_organs(min(slices, REAL_SLICES))
    if found is None:
        print("The real data sets are not available (RFMED_TEST_DATA): organs of the phantom")
        found = phantom_case((min(slices, REAL_SLICES), 128, 128)).labels
    planes, rows, columns = (np.arange(n) * own // n for n, own in zip((slices, SIDE, SIDE), found.shape, strict=True))
    cut = np.minimum(found, CLASSES)[planes][:, rows][:, :, columns]
    return torch.from_numpy(cut.astype(np.int64))


if __name__ == "__main__":
    main()
