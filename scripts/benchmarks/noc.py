#!/usr/bin/env python3
"""Evaluation by clicks: RITM's loop against ours, 50 images x 20 clicks, one model of negligible cost.

usage: python scripts/benchmarks/noc.py [--images 50] [--clicks 20] [--repeats 3]

Real images' masks with ignored pixels (RFMED_TEST_DATA: vgg-iseg-151), blobs if the data sets are not available. Peer:
RITM's evaluate_sample, Clicker and get_iou, reimplemented; distances by OpenCV as there, if it is installed, else by
SciPy. Clicks and IoUs must be equal to that loop's with exact distances. OpenCV's differ from those in the last bit, by
version and even by where an array lies in memory, and so may select another of equally deep pixels; the number of
images that this changes is printed. The best of `--repeats` runs counts; the last line is JSON, ratio is peer over
ours.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from _harness.usage import best_time
from scipy.ndimage import distance_transform_edt, gaussian_filter

from segment_anything_hq.data.datasets import open_folders
from segment_anything_hq.evaluation.interactive import ClickProtocol, simulate_clicks
from segment_anything_hq.prompts.prompt import Click

HAS_CV2 = importlib.util.find_spec("cv2") is not None
Distances = Callable[[np.ndarray], np.ndarray]


class Painter:
    """A model: each click paints a disk whose size depends on the number of clicks."""

    def predict(self, clicks: Sequence[Click], previous: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
        """Probabilities (H, W) float32."""
        painted = np.full(shape, 0.1, np.float32) if previous is None else previous.copy()
        click, radius = clicks[-1], max(4, max(shape) // (2 + 2 * len(clicks)))
        top, left = max(click.y - radius, 0), max(click.x - radius, 0)
        part = painted[top : click.y + radius + 1, left : click.x + radius + 1]
        y, x = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
        part[(y - click.y) ** 2 + (x - click.x) ** 2 <= radius**2] = 0.9 if click.positive else 0.1
        return painted


class Shaped:
    """The painter for images of one shape, as our evaluation calls a model."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def set_image(self, image: np.ndarray) -> None:
        """Take an image; the painter does not look at it."""

    def predict(self, clicks: Sequence[Click], previous: np.ndarray | None) -> np.ndarray:
        """Probabilities (H, W) float32."""
        return Painter().predict(clicks, previous, self.shape)


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    ground_truths, source = masks(args.images)
    protocol = ClickProtocol(targets=(0.9, 0.95), max_clicks=args.clicks, miou_at=(), stop=False)

    def ours() -> list[tuple]:
        runs = [simulate_clicks(Shaped(ground_truth.shape), ground_truth, protocol) for ground_truth in ground_truths]
        return [(run.clicks, np.array(run.ious, np.float32)) for run in runs]

    distances, name = chosen_distances()
    ours()  # compiles
    found, ours_s = best_time(ours, args.repeats)
    published, peer_s = best_time(
        lambda: [ritm(ground_truth, args.clicks, distances) for ground_truth in ground_truths], args.repeats
    )
    exact = published
    if HAS_CV2:
        exact = [
            ritm(ground_truth, args.clicks, lambda m: np.sqrt(np.rint(distances(m) ** 2)))
            for ground_truth in ground_truths
        ]
    for (clicks, ious), (peer_clicks, peer_ious) in zip(found, exact, strict=True):
        if clicks != tuple(peer_clicks) or not np.array_equal(ious, peer_ious):
            raise SystemExit("clicks or IoUs differ")
    others = sum(a[0] != b[0] for a, b in zip(exact, published, strict=True))
    _, model_s = best_time(lambda: [replay(t, clicks) for t, (clicks, _) in zip(ground_truths, found, strict=True)], 1)
    count = sum(len(clicks) for clicks, _ in found)
    print(
        f"{len(ground_truths)} masks ({source}), {count} clicks, all equal (rounding changes {others} images); "
        f"ours {ours_s:.2f} s, RITM's loop with {name} {peer_s:.2f} s, the model itself {model_s:.2f} s of both"
    )
    result = {"name": "noc", "ours": round(ours_s, 4), "peer": round(peer_s, 4), "ratio": round(peer_s / ours_s, 1)}
    print(json.dumps({**result, "distances": name, "clicks": count}))


def masks(count: int) -> tuple[list[np.ndarray], str]:
    """Ground truths (H, W) int8 with ignored pixels, and their source."""
    root = os.environ.get("RFMED_TEST_DATA")
    folder = Path(root) / "vgg-iseg-151" if root else None
    if folder is not None and folder.is_dir():
        found = open_folders(folder / "images", folder / "masks", rule="ignore_128")
        return [sample.ground_truth() for sample in found.samples[:count]], "VGG interactive segmentation"
    rng = np.random.default_rng(0)
    fields = [gaussian_filter(rng.standard_normal((375, 500)), 25) for _ in range(count)]
    ground_truths = [np.where(f > 0.004, 1, np.where(f > 0.003, -1, 0)).astype(np.int8) for f in fields]
    return ground_truths, "random blobs"


def chosen_distances() -> tuple[Distances, str]:
    """Exact distances as RITM computes them, and the name of the library."""
    if not HAS_CV2:
        return lambda mask: np.asarray(distance_transform_edt(mask)).astype(np.float32), "SciPy"
    cv2 = importlib.import_module("cv2")

    cv2.setNumThreads(1)
    return lambda mask: cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 0), f"OpenCV {cv2.__version__}"


def ritm(ground_truth: np.ndarray, max_clicks: int, distances: Distances) -> tuple[list[Click], np.ndarray]:
    """Clicks and IoUs of one image: evaluate_sample without early stopping."""
    is_object, counts = ground_truth == 1, ground_truth != -1
    not_clicked = np.full(ground_truth.shape, True)
    clicks: list[Click] = []
    ious: list[float] = []
    predicted, probabilities = np.zeros_like(ground_truth), None
    for _ in range(max_clicks):
        missed = np.logical_and(np.logical_and(is_object, np.logical_not(predicted)), counts)
        wrong = np.logical_and(np.logical_and(np.logical_not(is_object), predicted), counts)
        missed_depth, wrong_depth = (
            distances(np.pad(e, ((1, 1), (1, 1)), "constant"))[1:-1, 1:-1] * not_clicked for e in (missed, wrong)
        )
        positive = np.max(missed_depth) > np.max(wrong_depth)
        depth = missed_depth if positive else wrong_depth
        rows, columns = np.where(depth == np.max(depth))
        clicks.append(Click(x=int(columns[0]), y=int(rows[0]), positive=bool(positive)))
        not_clicked[rows[0], columns[0]] = False
        probabilities = Painter().predict(clicks, probabilities, ground_truth.shape)
        predicted = probabilities > 0.49
        kept = ground_truth != -1
        both = np.logical_and(np.logical_and(predicted, ground_truth == 1), kept).sum()
        either = np.logical_and(np.logical_or(predicted, ground_truth == 1), kept).sum()
        ious.append(both / either)
    return clicks, np.array(ious, np.float32)


def replay(ground_truth: np.ndarray, clicks: Sequence[Click]) -> None:
    """The model's own work for these clicks."""
    probabilities = None
    for number in range(1, len(clicks) + 1):
        probabilities = Painter().predict(clicks[:number], probabilities, ground_truth.shape)


if __name__ == "__main__":
    main()
