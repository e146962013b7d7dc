#!/usr/bin/env python3
"""From logits to a label map: nnunetv2's resample + arg-max against ours by slab, same arrays, one run.

usage: python scripts/benchmarks/export.py [--quick] [--seed N]

Two cases in the manner of BTCV (14 classes, planned 3 x 0.76 x 0.76 mm): the distance of slices kept, and changed.
Logits are made from the labels of a real CT (RFMED_TEST_DATA): blurred, with noise, with the confidence of a trained
U-Net; if the data sets are not available, smooth random fields of all classes. Prints seconds, growth of memory
beyond the logits, and voxels that differ (nnunetv2 in float32, and rounded to half precision as it predicts); the last
line is JSON. Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from _harness.data import labels_with_most_organs
from _harness.usage import time_and_memory
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from scipy.ndimage import gaussian_filter, zoom

from rfmedsam2.geometry import Grid
from rfmedsam2.inference.export import labels_from_slabs
from rfmedsam2.inference.sliding_window import PLANES_A_SLAB, Slab
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Resampling
from rfmedsam2.transforms.prepare import Restore

CLASSES = 14
LABELS = LabelSet.model_validate({"names": {"background": 0} | {f"organ {i}": i for i in range(1, CLASSES)}})


@dataclass(frozen=True)
class Setting:
    """Planned and source grid of a case."""

    name: str
    planned: tuple[int, int, int]
    source: tuple[int, int, int]
    spacing_planned: tuple[float, float, float]
    spacing_source: tuple[float, float, float]


FULL = (
    Setting("z kept", (100, 472, 472), (100, 512, 512), (3.0, 0.76, 0.76), (3.0, 0.70, 0.70)),
    Setting("z changes", (100, 552, 552), (120, 512, 512), (3.0, 0.76, 0.76), (2.5, 0.82, 0.82)),
)
QUICK = (
    Setting("z kept", (20, 236, 236), (20, 256, 256), (3.0, 0.76, 0.76), (3.0, 0.70, 0.70)),
    Setting("z changes", (20, 276, 276), (24, 256, 256), (3.0, 0.76, 0.76), (2.5, 0.82, 0.82)),
)


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small arrays")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warm = QUICK[0]
    ours(logits_of((2, 8, 8), args.seed), restore((2, 8, 8), (4, 9, 9), warm), torch.empty(CLASSES * 2 * 64))
    seconds, grown = {"ours": 0.0, "peer": 0.0}, []
    for setting in QUICK if args.quick else FULL:
        logits = logits_of(setting.planned, args.seed)
        how = restore(setting.planned, setting.source, setting)
        memory = torch.zeros(CLASSES * PLANES_A_SLAB * setting.planned[1] * setting.planned[2])
        mine, mine_s, mine_mib = time_and_memory(lambda: ours(logits, how, memory))  # noqa: B023 - called at once
        peer, peer_s, peer_mib = time_and_memory(lambda: nnunet(logits, how))  # noqa: B023
        half = nnunet(logits.astype(np.float16), how)
        voxels = mine.size
        print(
            f"{setting.name}: nnunetv2 {peer_s:.2f} s +{peer_mib} MiB, ours {mine_s:.2f} s +{mine_mib} MiB, "
            f"{peer_s / mine_s:.1f}x; {np.count_nonzero(mine != peer)} of {voxels} voxels differ, "
            f"{np.count_nonzero(mine != half)} from nnunetv2 on half-precision logits"
        )
        grown.append((mine_mib, peer_mib))
        seconds["ours"] += mine_s
        seconds["peer"] += peer_s
    ratio = seconds["peer"] / seconds["ours"]
    result = {name: round(value, 3) for name, value in seconds.items()}
    growth = {"ours_mib": max(mine for mine, _ in grown), "peer_mib": max(peer for _, peer in grown)}
    print(json.dumps({"name": "export", **result, "ratio": round(ratio, 2), **growth}))


def logits_of(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Logits (K, *shape), float32, from a real CT's labels or else of random fields."""
    rng = np.random.default_rng(seed)
    out = np.empty((CLASSES, *shape), np.float32)
    found = labels_with_most_organs(min(shape[0], 96))
    for number, volume in enumerate(out):
        if found is None:
            small = rng.standard_normal([max(2, n // 12) for n in shape]).astype(np.float32)
        else:
            small = 2 * gaussian_filter((found == number).astype(np.float32), 0.7)
            small += 0.05 * rng.standard_normal(small.shape, dtype=np.float32)
        zoom(5 * small, [n / c for n, c in zip(shape, small.shape, strict=True)], order=1, output=volume)
    return out


def restore(planned: tuple[int, int, int], source: tuple[int, int, int], setting: Setting) -> Restore:
    """The restoration of an uncropped case to its source grid."""
    return Restore(
        source_grid=Grid(shape_zyx=source, spacing_zyx_mm=setting.spacing_source),
        box=((0, source[0]), (0, source[1]), (0, source[2])),
        transpose_forward=(0, 1, 2),
        shape_cropped=source,
        shape_planned=planned,
        spacing_source=setting.spacing_source,
        spacing_planned=setting.spacing_planned,
    )


def ours(logits: np.ndarray, how: Restore, memory: torch.Tensor) -> np.ndarray:
    """Export slab by slab; all slabs share `memory`, as in the sliding window."""
    tensor = torch.from_numpy(logits)

    def slabs() -> Iterator[Slab]:
        for start in range(0, tensor.shape[1], PLANES_A_SLAB):
            part = tensor[:, start : start + PLANES_A_SLAB]
            yield Slab(start=start, logits=memory[: part.numel()].view(part.shape).copy_(part))

    return labels_from_slabs(slabs(), how, LABELS, Resampling())


def nnunet(logits: np.ndarray, how: Restore) -> np.ndarray:
    """Resample everything, then take the arg-max."""
    resampled = resample_data_or_seg_to_shape(
        logits, how.shape_cropped, how.spacing_planned, how.spacing_source, order=1, order_z=0, force_separate_z=None
    )
    return resampled.argmax(0).astype(np.uint8)


if __name__ == "__main__":
    main()
