"""Resampling of one CT-sized case: this package against nnU-Net's function, on the same arrays.

Both resample an image (order 3) and a 13-class label map (order 1), slice by slice; with --quick also in 3D. Prints
wall and processor seconds; the last line is JSON: ratios are theirs over ours, of processor seconds for images and for
labels each. Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg
from scipy.ndimage import gaussian_filter, zoom

from rfmedsam2.geometry import Shape
from rfmedsam2.transforms.resample import resample_image, resample_label

Seconds = tuple[float, float]
"""Wall and processor seconds of the quickest of several calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison: wall and processor seconds of both, and the difference of the results."""

    what: str
    ours: Seconds
    peer: Seconds
    difference: str


def arrays(shape: Shape, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Make a smooth volume with noise in normalized units, and a label map with one blob per class."""
    rng = np.random.default_rng(0)
    coarse = tuple(max(2, n // 8) for n in shape)
    fields = gaussian_filter(rng.normal(size=(classes, *coarse)), (0, 1.5, 1.5, 1.5))
    label = np.asarray(zoom(fields.argmax(0).astype(np.uint8), np.divide(shape, coarse), order=0))
    image = np.asarray(zoom(fields[0] / fields[0].std(), np.divide(shape, coarse), order=1, output=np.float32))
    image += rng.normal(scale=0.1, size=shape).astype(np.float32)
    return image[None], label.astype(np.int16)


def timed(function: Callable[[], np.ndarray], repeats: int) -> tuple[np.ndarray, Seconds]:
    """The result, and the shortest times of a call."""
    found = []
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
        if len(found) >= repeats:
            return result, min(found)


def compare(shape: Shape, new: Shape, axis: int | None, options: argparse.Namespace) -> list[Row]:
    """Time image and labels once each; `axis` is resampled apart, or None for 3D."""
    image, label = arrays(shape, options.classes)
    small = (slice(None), slice(0, 4), slice(0, 16), slice(0, 16))
    resample_image(image[small], (6, 24, 24), separate=axis)  # compile, or load what was compiled before
    resample_label(label[small[1:]], (6, 24, 24), separate=axis)
    where = "slices" if axis is not None else "3D"
    rows = []
    ours, fast = timed(lambda: resample_image(image, new, separate=axis, threads=options.threads), 3)
    peer, slow = timed(lambda: resample_data_or_seg(image, new, False, axis, 3, axis is not None), 1)
    difference = f"max {np.abs(ours - peer).max():.1e}"
    rows.append(Row(what=f"image, cubic, {where}", ours=fast, peer=slow, difference=difference))
    ours, fast = timed(lambda: resample_label(label, new, separate=axis, threads=options.threads), 3)
    peer, slow = timed(lambda: resample_data_or_seg(label[None], new, True, axis, 1, axis is not None), 1)
    difference = f"{np.count_nonzero(ours != peer[0])} voxels"
    rows.append(Row(what=f"labels, linear, {where}", ours=fast, peer=slow, difference=difference))
    return rows


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(100, 512, 512), help="source voxels")
    parser.add_argument("--new", type=int, nargs=3, default=(100, 472, 472), help="target voxels")
    parser.add_argument("--classes", type=int, default=13)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small volume, seconds instead of minutes")
    options = parser.parse_args()
    shape, new = tuple(options.shape), tuple(options.new)
    if options.quick:
        shape, new = (24, 128, 128), (30, 118, 118)
    rows = compare(shape, new, 0, options) + (compare(shape, new, None, options) if options.quick else [])
    print(f"{shape} -> {new}, {options.classes} classes, {options.threads} thread(s)")
    for row in rows:
        (wall, cpu), (their_wall, their_cpu) = row.ours, row.peer
        print(
            f"{row.what:24s} ours {wall:7.3f} s, {cpu:7.3f} CPU-s   nnU-Net {their_wall:7.3f} s, {their_cpu:7.3f} CPU-s"
            f"   {their_wall / wall:6.1f} x, CPU {their_cpu / cpu:6.1f} x   difference {row.difference}"
        )
    print(f"peak memory of the whole run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    ours, peer = sum(row.ours[0] for row in rows), sum(row.peer[0] for row in rows)
    figures = {"name": "resample", "ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(peer / ours, 2)}
    figures |= {
        f"ratio_cpu_{name}": round(r.peer[1] / r.ours[1], 1)
        for name, r in zip(("image", "labels"), rows[:2], strict=True)
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
