#!/usr/bin/env python3
"""Boundary IoU: the published erosion loop against ours, masks of 2048 x 2048 pixels, one run.

usage: python scripts/benchmarks/boundary_iou.py [--size 2048] [--repeats 7]

Peer: boundary-iou-api's mask_to_boundary (pad, 3 x 3 erosion in 2 % of the diagonal's iterations) and sam-hq's
boundary_iou, reimplemented; with OpenCV if it is installed, else with SciPy. For comparison also the erosion one
iteration at a time, which OpenCV otherwise merges into a single large erosion. Boundaries and results must be equal.
The best of `--repeats` runs counts; the last line is JSON, ratio is peer over ours.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Callable

import numpy as np
from _harness.usage import best_time
from scipy.ndimage import binary_erosion, gaussian_filter

from rfmedsam2.metrics.boundary import boundary_iou, boundary_width, mask_to_boundary

HAS_CV2 = importlib.util.find_spec("cv2") is not None
Erosion = Callable[[np.ndarray, int], np.ndarray]


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    ground_truth, predicted = masks(args.size)
    erode, one_by_one, name = erosions()
    pair = [m.astype(np.uint8) for m in (ground_truth, predicted)]
    for ours_mask, peer_mask in ((ground_truth, pair[0]), (predicted, pair[1])):
        if not np.array_equal(mask_to_boundary(ours_mask), published_boundary(peer_mask, erode).astype(bool)):
            raise SystemExit("boundaries differ")
    ours, ours_s = best_time(lambda: boundary_iou(ground_truth, predicted), args.repeats)
    peer, peer_s = best_time(lambda: published_iou(pair[0], pair[1], erode), args.repeats)
    slow, slow_s = best_time(lambda: published_iou(pair[0], pair[1], one_by_one), 1)
    if not ours == peer == slow:
        raise SystemExit(f"results differ: {ours}, {peer}, {slow}")
    print(
        f"{args.size} x {args.size}, boundary of {boundary_width(args.size, args.size)} pixels: {ours:.6f}; ours "
        f"{ours_s * 1e3:.2f} ms, published with {name} {peer_s * 1e3:.1f} ms, iteration by iteration "
        f"{slow_s * 1e3:.0f} ms ({slow_s / ours_s:.0f}x)"
    )
    result = {"name": "boundary_iou", "ours": round(ours_s, 6), "peer": round(peer_s, 6)}
    print(json.dumps({**result, "ratio": round(peer_s / ours_s, 1), "erosion": name}))


def masks(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two similar masks (size, size) bool with ragged outlines that reach the edge."""
    rng = np.random.default_rng(0)
    coarse = gaussian_filter(rng.standard_normal((256, 256)), 12)
    finer = coarse + 0.15 * gaussian_filter(rng.standard_normal((256, 256)), 4)
    index = np.arange(size) * 256 // size
    first, second = (np.ascontiguousarray((field > 0)[index][:, index]) for field in (coarse, finer))
    return first, second


def erosions() -> tuple[Erosion, Erosion, str]:
    """Erosion in many iterations, the same one iteration at a time, and the name of the library."""
    square = np.ones((3, 3), np.uint8)
    if not HAS_CV2:

        def erode(mask: np.ndarray, times: int) -> np.ndarray:
            return np.asarray(binary_erosion(mask, square, iterations=times)).astype(np.uint8)

        return erode, erode, "SciPy"
    cv2 = importlib.import_module("cv2")

    cv2.setNumThreads(1)

    def one_by_one(mask: np.ndarray, times: int) -> np.ndarray:
        for _ in range(times):
            mask = cv2.erode(mask, square)
        return mask

    return lambda mask, times: cv2.erode(mask, square, iterations=times), one_by_one, f"OpenCV {cv2.__version__}"


def published_boundary(mask: np.ndarray, erode: Erosion) -> np.ndarray:
    """(H, W) uint8 boundary of a mask (H, W) uint8."""
    height, width = mask.shape
    times = max(1, round(0.02 * np.sqrt(height**2 + width**2)))
    inner = erode(np.pad(mask, 1), times)[1 : height + 1, 1 : width + 1]
    return mask - inner


def published_iou(ground_truth: np.ndarray, predicted: np.ndarray, erode: Erosion) -> float:
    """Boundary IoU of two masks as computed by sam-hq."""
    first, second = (published_boundary(mask, erode) for mask in (ground_truth, predicted))
    return float(((first * second) > 0).sum() / ((first + second) > 0).sum())


if __name__ == "__main__":
    main()
