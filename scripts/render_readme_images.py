#!/usr/bin/env python3
"""Render the two pictures of the README from a finished quickstart folder: an overlay, and the report page.

usage: render_readme_images.py QUICKSTART_FOLDER [--out .github] [--browser chromium]

overlay.png: three planes of a test case, predicted organs in color, outlines of the ground truth. report.png: the page
report.html as headless Chromium shows it, its lower half beside the upper one. Only phantoms belong here, never scans
of people.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from rfmedsam2.pipeline.evaluation.overlays import Scene, read_scene
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.system.atomic import read_record

DATASET = Path("raw/Dataset900_PhantomCT")
LARGEST_BYTES = 200_000
PAGE_PIXELS = (1160, 6000)
"""Width, and more than its height."""
WINDOW_HU = (-160.0, 240.0)
BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
COLORS = (
    *("#e6553f", "#f0a63a", "#f6d84c", "#7cc36a", "#2fa392", "#b0643c", "#56b4e9", "#c94f7c", "#3f6fd1"),
    *("#8f6fd8", "#e68ac0", "#9bd1c1", "#b9d65a"),
)


def overlay(folder: Path, out: Path) -> None:
    """Draw the first test case: predicted organs filled, ground truth outlined."""
    labels = read_record(folder / DATASET / "dataset.json", DatasetJson).labels
    names = [name for name in labels if name != "background"]
    prediction = min((folder / "predictions").glob("*.nii.gz"))
    case = prediction.name.removesuffix(".nii.gz")
    ground_truth = folder / DATASET / "labelsTs" / prediction.name
    scene = read_scene(ground_truth, prediction, folder / DATASET / "imagesTs" / f"{case}_0000.nii.gz")
    _, y, x = (n * s for n, s in zip(scene.reference.shape, scene.spacing_zyx_mm, strict=True))
    figure = Figure(figsize=(10.6, 4.3), dpi=100, facecolor="#101418")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, gridspec_kw={"width_ratios": (x, x, y)})
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.14, wspace=0.02)
    for axis, (ax, name) in enumerate(zip(axes, ("axial", "coronal", "sagittal"), strict=True)):
        draw_plane(ax, scene, axis)
        ax.set_title(name, color="#dfe6ee", fontsize=10)
    patches = [Patch(color=color, label=name.replace("_", " ")) for name, color in zip(names, COLORS, strict=True)]
    figure.legend(handles=patches, loc="lower center", ncols=7, fontsize=8.5, frameon=False, labelcolor="#dfe6ee")
    figure.savefig(out, facecolor=figure.get_facecolor(), metadata={"Software": None})
    shrink(out)


def draw_plane(ax: Axes, scene: Scene, axis: int) -> None:
    """Draw the plane of this axis that crosses most organs; voxels keep their proportions."""
    others = tuple(a for a in range(3) if a != axis)
    present = [np.unique(plane).size for plane in np.moveaxis(scene.reference, axis, 0)]
    size = (scene.reference > 0).sum(axis=others)
    index = int(np.argmax(np.asarray(present) * 1e6 + size))
    arrays = (scene.image, scene.prediction, scene.reference)
    image, prediction, ground_truth = (np.take(array, index, axis) for array in arrays if array is not None)
    if axis > 0:  # head up
        image, prediction, ground_truth = image[::-1], prediction[::-1], ground_truth[::-1]
    spacing = [scene.spacing_zyx_mm[a] for a in others]
    kept = {"aspect": spacing[0] / spacing[1], "interpolation": "nearest"}
    ax.imshow(image, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], **(kept | {"interpolation": "bilinear"}))
    filled = np.ma.masked_equal(prediction, 0)
    ax.imshow(filled, cmap=ListedColormap(COLORS), vmin=0.5, vmax=len(COLORS) + 0.5, alpha=0.62, **kept)
    for label in np.unique(ground_truth[ground_truth > 0]):
        ax.contour(ground_truth == label, levels=[0.5], colors="white", linewidths=0.9)
    ax.set_axis_off()


def report(folder: Path, out: Path, browser: str) -> None:
    """Photograph the report page, in two columns at half its size."""
    with tempfile.TemporaryDirectory() as work:
        shot = Path(work) / "page.png"
        command = [browser, *BROWSER_FLAGS, f"--user-data-dir={work}/profile", f"--screenshot={shot}"]
        page = (folder / "report.html").resolve().as_uri()
        size = f"--window-size={PAGE_PIXELS[0]},{PAGE_PIXELS[1]}"
        subprocess.run([*command, size, page], check=True, capture_output=True, timeout=120)
        with Image.open(shot) as opened:
            columns = two_columns(np.asarray(opened.convert("RGB")))
    height, width, _ = columns.shape
    Image.fromarray(columns).resize((width // 2, height // 2), Image.Resampling.LANCZOS).save(out)
    shrink(out)


def two_columns(page: np.ndarray) -> np.ndarray:
    """Cut a page (H, W, 3) between two of its boxes, nearest to the middle, and put its halves side by side."""
    empty = (page == page[0, 0]).all(axis=(1, 2))
    end = int(np.flatnonzero(~empty)[-1]) + 1
    gaps = np.flatnonzero(empty[:end])
    cut = int(gaps[np.argmin(np.abs(gaps - end / 2))])
    columns = np.full((max(cut, end - cut) + 20, 2 * page.shape[1], 3), page[0, 0], page.dtype)
    columns[:cut, : page.shape[1]] = page[:cut]
    columns[10 : 10 + end - cut, page.shape[1] :] = page[cut:end]
    return columns


def shrink(path: Path) -> None:
    """Rewrite a PNG within LARGEST_BYTES: in full color, else in 256 colors."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.save(path, optimize=True)
    if path.stat().st_size > LARGEST_BYTES:
        image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > LARGEST_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes; expected at most {LARGEST_BYTES}")
    print(f"{path}: {path.stat().st_size} bytes, {image.width} x {image.height} pixels")


def main() -> None:
    """Render both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where scripts/quickstart.sh has finished")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / ".github")
    parser.add_argument("--browser", default="chromium")
    args = parser.parse_args()
    overlay(args.folder, args.out / "overlay.png")
    report(args.folder, args.out / "report.png", args.browser)


if __name__ == "__main__":
    main()
