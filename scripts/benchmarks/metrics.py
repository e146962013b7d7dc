"""Metrics of all classes of one case: ours against surface-distance (NSD, HD95) and nnU-Net (Dice) on the same masks.

The last line is JSON: seconds of both, their ratio (how many times faster ours is) and the largest difference found.
Ours computes DSC, IoU, NSD, HD95 and volumes; the peers share the work. Usage: python scripts/benchmarks/metrics.py
[--quick].
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import surface_distance.metrics as deepmind
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from scipy import ndimage

from rfmedsam2.metrics import NSD_TOLERANCE_MM, case_metrics
from rfmedsam2.records.dataset import LabelSet

T = TypeVar("T")
SPACING = (3.0, 0.8, 0.8)
CLASSES = 13


def organs(shape: tuple[int, int, int], classes: int) -> np.ndarray:
    """Blobs of different sizes in a label map (Z, Y, X) uint8: ellipsoids with an uneven rim."""
    random = np.random.default_rng(0)
    grid = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    rim = ndimage.zoom(random.normal(0, 0.15, (6, 12, 12)).astype(np.float32), np.divide(shape, (6, 12, 12)), order=1)
    labels = np.zeros(shape, np.uint8)
    for value in range(1, classes + 1):
        centre = random.uniform(-0.6, 0.6, 3)
        radius = random.uniform(0.08, 0.35, 3)
        inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius, strict=True)) + rim < 1
        labels[inside] = value
    return labels


def ours(reference: np.ndarray, prediction: np.ndarray) -> dict[int, tuple[float, float, float]]:
    """DSC, NSD, HD95 by class."""
    labels = LabelSet(names={"background": 0, **{str(i): i for i in range(1, CLASSES + 1)}})
    found = case_metrics(reference, prediction, labels, SPACING)
    return {int(name): (s.dsc or 0.0, s.nsd or 0.0, s.hd95_mm or 0.0) for name, s in found.items()}


def peers(reference: np.ndarray, prediction: np.ndarray) -> dict[int, tuple[float, float, float]]:
    """Give the same by nnU-Net's counting and surface-distance."""
    result = {}
    for value in range(1, CLASSES + 1):
        masks = region_or_label_to_mask(reference, value), region_or_label_to_mask(prediction, value)
        tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks)
        distances = deepmind.compute_surface_distances(*masks, SPACING)
        nsd = deepmind.compute_surface_dice_at_tolerance(distances, NSD_TOLERANCE_MM)
        result[value] = (2 * tp / (2 * tp + fp + fn), nsd, deepmind.compute_robust_hausdorff(distances, 95))
    return result


def timed(function: Callable[[], T], repeats: int) -> tuple[float, T]:
    """Best of several runs, and what came out."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a volume of 32x128x128")
    parser.add_argument("--shape", type=int, nargs=3, default=None, metavar=("Z", "Y", "X"))
    given = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    shape = tuple(given.shape or ((32, 128, 128) if given.quick else (100, 512, 512)))
    reference = organs(shape, CLASSES)
    prediction = np.roll(reference, (1, 2, -1), (0, 1, 2))
    ours(reference[:4, :32, :32].copy(), prediction[:4, :32, :32].copy())  # compiles, or loads the compiled kernels
    seconds, found = timed(lambda: ours(reference, prediction), 2)
    peer_seconds, expected = timed(lambda: peers(reference, prediction), 1)
    difference = max(float(np.abs(np.subtract(found[i], expected[i])).max()) for i in expected)
    print(f"{CLASSES} classes, {'x'.join(map(str, shape))}: ours {seconds:.3f} s, peers {peer_seconds:.3f} s")
    line = {"name": "metrics", "ours": round(seconds, 4), "peer": round(peer_seconds, 4)}
    print(json.dumps(line | {"ratio": round(peer_seconds / seconds, 2), "largest_difference": difference}))


if __name__ == "__main__":
    main()
