"""A synthetic abdominal CT or MR dataset with BTCV's 13 organs, generated from a seed.

It serves to try every command and to test installations without a download. The images look like abdominal scans and
can be learned from, but they are not a model of real anatomy or disease.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
from scipy import ndimage

from rfmedsam2.errors import UsageError
from rfmedsam2.geometry import Grid, Shape
from rfmedsam2.pipeline.datasets.builder import new_dataset, write_dataset_json
from rfmedsam2.pipeline.datasets.label_tables import BTCV_LABELS
from rfmedsam2.pipeline.datasets.phantom_anatomy import FIELD_MM, Part, spine, upper_abdomen
from rfmedsam2.store.formats.nifti import LONGEST_AXIS
from rfmedsam2.system.atomic import atomic
from rfmedsam2.system.progress import Track, silent

Modality = Literal["ct", "mr"]
Range = tuple[float, float]

NAMES = {"ct": "Dataset900_PhantomCT", "mr": "Dataset901_PhantomMR"}

# HU without contrast, in the arterial and in the portal venous phase (the usual ranges of radiology textbooks), then
# the signal of a T1-weighted MR with fat bright, arbitrary units
_TISSUES: dict[str, tuple[float, float, float, float]] = {
    "air": (-1000, -1000, -1000, 2),
    "fat": (-105, -105, -105, 420),
    "skin": (20, 25, 30, 200),
    "muscle": (55, 60, 65, 190),
    "bone": (480, 490, 500, 40),
    "marrow": (190, 200, 210, 260),
    "disc": (80, 80, 85, 170),
    "fluid": (15, 15, 15, 60),
    "lung": (-840, -835, -830, 15),
    "heart": (42, 220, 150, 110),
    "table": (-60, -60, -60, 2),
    "liver": (55, 68, 108, 300),
    "liver_vessel": (42, 80, 160, 140),
    "spleen": (48, 125, 118, 170),
    "kidney_cortex": (32, 185, 190, 200),
    "kidney_medulla": (30, 70, 170, 150),
    "kidney_sinus": (5, 20, 60, 220),
    "bile": (8, 8, 8, 90),
    "esophagus": (36, 55, 62, 175),
    "stomach_wall": (40, 75, 85, 180),
    "stomach_content": (18, 18, 18, 90),
    "bowel_wall": (38, 75, 85, 185),
    "bowel_content": (15, 18, 20, 110),
    "stool": (-10, -5, 0, 240),
    "gas": (-900, -900, -900, 4),
    "aorta": (42, 310, 155, 60),
    "cava": (40, 75, 140, 70),
    "portal": (42, 95, 168, 75),
    "pancreas": (40, 105, 92, 260),
    "adrenal": (28, 62, 72, 170),
}
_PHASES = ("native", "arterial", "portal venous", "T1")
# most abdominal scans, and all of BTCV's, are portal venous
_CT_PHASE_SHARES = (0.1, 0.2, 0.7)
_WARP_MM = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomCase:
    """One synthetic scan: image int16 and labels uint8, both (Z,Y,X), on one grid; name of the contrast phase."""

    image: np.ndarray
    labels: np.ndarray
    grid: Grid
    phase: str


def make_phantom(
    folder: Path,
    *,
    cases: int = 8,
    test_cases: int = 2,
    shape_zyx: Shape = (40, 96, 96),
    spacing_mm: tuple[Range, Range] = ((2.5, 4.0), (1.2, 1.6)),
    seed: int = 0,
    modality: Modality = "ct",
    force: bool = False,
    track: Track = silent,
) -> Path:
    """Write a synthetic dataset in nnU-Net's raw layout; returns its folder.

    Args:
        folder: the raw folder; the dataset becomes Dataset900_PhantomCT (or Dataset901_PhantomMR) in it.
        cases: number of labeled training cases, in imagesTr and labelsTr.
        test_cases: number of test cases, in imagesTs and labelsTs.
        shape_zyx: largest shape; each case is up to a tenth smaller. The same anatomy always fills the
            field of view, so a small shape is a small body.
        spacing_mm: range of the slice distance, and range of the pixel size.
        seed: random seed; case i depends only on seed and i.
        modality: "ct" (HU, with contrast phases) or "mr" (T1-like, with a bias field).
        force: replace an existing dataset.
        track: progress display.

    Raises:
        UsageError: an invalid number, or the dataset exists and `force` is not set.
        StoreError: the folder cannot be written.
    """
    _check(cases, test_cases, shape_zyx, spacing_mm)
    if seed < 0:
        raise UsageError("The seed must not be negative", found=seed)
    with new_dataset(folder, NAMES[modality], force=force) as building:
        for number in track(range(cases + test_cases), "Phantom", cases + test_cases):
            case = phantom_case(shape_zyx, spacing_mm=spacing_mm, seed=(seed, number), modality=modality)
            part, name = ("Tr" if number < cases else "Ts"), f"phantom_{number + 1:03d}"
            write_image(building / f"images{part}" / f"{name}_0000.nii.gz", case.image, case.grid)
            write_image(building / f"labels{part}" / f"{name}.nii.gz", case.labels, case.grid)
        write_dataset_json(
            building,
            channels=("CT" if modality == "ct" else "MR",),
            labels=BTCV_LABELS,
            training=cases,
            further={
                "name": NAMES[modality],
                "description": f"Synthetic abdominal {modality.upper()} with BTCV's organs, seed {seed}",
                "license": "Apache-2.0",
            },
        )
    return folder / NAMES[modality]


def phantom_case(
    shape_zyx: Shape = (40, 96, 96),
    *,
    spacing_mm: tuple[Range, Range] = ((2.5, 4.0), (1.2, 1.6)),
    seed: int | tuple[int, ...] = 0,
    modality: Modality = "ct",
) -> PhantomCase:
    """Make one synthetic scan in memory; see `make_phantom` for the arguments."""
    rng = np.random.default_rng(seed)
    grid = _draw_grid(rng, shape_zyx, spacing_mm)
    phase = 3 if modality == "mr" else int(rng.choice(3, p=_CT_PHASE_SHARES))
    scene = _Scene.empty(rng, grid.shape_zyx, phase)
    body, cavity = _paint_body(scene, rng)
    for part in [*spine(rng), *upper_abdomen(rng)]:
        _paint(scene, part, cavity if part.in_cavity else body)
    finish = _as_ct if modality == "ct" else _as_mr
    return PhantomCase(image=finish(scene.values, rng), labels=scene.labels, grid=grid, phase=_PHASES[phase])


def write_image(path: Path, array_zyx: np.ndarray, grid: Grid) -> None:
    """Write a (Z,Y,X) array as NIfTI in its own dtype on `grid` (scanner coordinates, millimeters), atomically.

    Raises:
        StoreError: the folder cannot be written or the disk is full.
    """
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine_lps
    image = nibabel.Nifti1Image(array_zyx.transpose(2, 1, 0), affine, dtype=array_zyx.dtype)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic(path) as temporary:
        nibabel.save(image, temporary)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """The canvas: position of each voxel in the (warped) body, its label and its intensity."""

    labels: np.ndarray
    values: np.ndarray
    """Intensities, float32 (Z,Y,X)."""
    places: tuple[np.ndarray, np.ndarray, np.ndarray]
    """x, y and z of every voxel in mm of the unwarped body, float32 (Z,Y,X)."""
    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    """x, y and z of the voxel centers before warping, ascending."""
    tissues: dict[str, float]

    @classmethod
    def empty(cls, rng: np.random.Generator, shape_zyx: Shape, phase: int) -> _Scene:
        """Make an empty canvas with this body's warp and tissue intensities."""
        axes = tuple(
            ((np.arange(n) + 0.5) / n - 0.5).astype(np.float32) * extent
            for n, extent in zip(shape_zyx[::-1], FIELD_MM, strict=True)
        )
        x, y, z = axes
        places = tuple(
            base + _smooth_field(rng, shape_zyx, _WARP_MM)
            for base in (x[None, None, :], y[None, :, None], z[:, None, None])
        )
        spread = 6.0 if phase < 3 else 15.0
        tissues = {
            name: v[phase] + float(rng.normal(0, spread if abs(v[phase]) < 350 else spread / 2))
            for name, v in _TISSUES.items()
        }
        return cls(
            labels=np.zeros(shape_zyx, np.uint8),
            values=np.full(shape_zyx, tissues["air"], np.float32),
            places=(places[0], places[1], places[2]),
            axes=(x, y, z),
            tissues=tissues,
        )

    def box(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, slice, slice]:
        """Index ranges (z, y, x) of the voxels that can be inside the box between two corners (x, y, z)."""
        margin = 3 * _WARP_MM
        ranges = [
            slice(int(np.searchsorted(axis, a - margin)), int(np.searchsorted(axis, b + margin)))
            for axis, a, b in zip(self.axes, low, high, strict=True)
        ]
        return (ranges[2], ranges[1], ranges[0])


def _paint(scene: _Scene, part: Part, allowed: np.ndarray) -> None:
    box = scene.box(*part.shape.bounds())
    x, y, z = (place[box] for place in scene.places)
    if not x.size:
        return
    inside = part.shape.level(x, y, z) < part.size
    inside &= allowed[box]
    if part.in_front_of_y is not None:
        inside &= y < part.in_front_of_y
    scene.values[box][inside] = scene.tissues[part.tissue]
    scene.labels[box][inside] = part.label


def _paint_body(scene: _Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paint skin, fat, wall, ribs, lungs, heart and table; returns the masks of body and abdominal cavity."""
    x, y, z = scene.places
    wide, deep = rng.uniform(148, 162), rng.uniform(108, 120)
    fat, wall = rng.uniform(9, 20), rng.uniform(9, 13)

    def ring(depth_mm: float, shift_y: float = 0.0) -> np.ndarray:
        a, b = np.float32(1 / (wide - depth_mm)), np.float32(1 / (deep - depth_mm))
        return (np.abs(x) * a) ** np.float32(2.4) + (np.abs(y - np.float32(shift_y)) * b) ** np.float32(2.4)

    body, inner = ring(2.5) < 1, ring(fat + wall, -3)
    for mask, tissue in ((ring(0) < 1, "skin"), (body, "fat"), (ring(fat) < 1, "muscle"), (inner < 1, "fat")):
        scene.values[mask] = scene.tissues[tissue]
    # ribs run obliquely through the wall of the upper part, and end before the midline in front
    strips = np.sin((z + 0.55 * y) * np.float32(2 * np.pi / 34)) > 0.45
    wall_middle = (ring(fat + 0.15 * wall, -1) < 1) & (ring(fat + 0.85 * wall, -3) > 1)
    scene.values[wall_middle & strips & (z > -35 - 0.5 * y) & (y > -75)] = scene.tissues["bone"]
    dome = _diaphragm(x, y, rng)
    cavity = (inner < 0.97) & (z < dome - 3)
    chest = (inner < 1) & (z > dome)
    scene.values[chest] = scene.tissues["lung"]
    middle = chest & (np.abs(x - 4) < 26 + 0.2 * (z - 90)) & (y > -60)
    scene.values[middle] = scene.tissues["fat"]
    heart = ((x - 22) / 62) ** 2 + ((y + 40) / 42) ** 2 + ((z - 152) / 40) ** 2 < 1
    scene.values[chest & heart] = scene.tissues["heart"]
    _paint_table(scene, deep)
    return body, cavity


def _diaphragm(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Height z of the diaphragm: two domes, the right one higher, falling off to the sides and the back."""
    height = rng.uniform(112, 124)
    right = height - ((x + 62) / 62) ** 2 * 34 - ((y + 12) / 82) ** 2 * 52
    left = height - 12 - ((x - 62) / 60) ** 2 * 34 - ((y + 12) / 82) ** 2 * 52
    return np.maximum(right, left)


def _paint_table(scene: _Scene, deep: float) -> None:
    # the table does not follow the body's warp
    x, y = scene.axes[0][None, :], scene.axes[1][:, None]
    surface = deep + 9 - (x / 150) ** 2 * 14
    shell = np.abs(y - surface - 2) < max(4.0, FIELD_MM[1] / scene.labels.shape[1] * 1.1)
    shell &= np.abs(x) < 160
    free = scene.values == np.float32(scene.tissues["air"])
    scene.values[shell[None] & free] = scene.tissues["table"]


def _as_ct(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add partial volume, texture and correlated noise, round to int16 HU without streaks; works in place."""
    ndimage.gaussian_filter(values, (0.35, 0.55, 0.55), output=values)
    values += ndimage.gaussian_filter(_noise(rng, values.shape), (0.8, 1.6, 1.6)) * np.float32(25)
    noise = ndimage.gaussian_filter(_noise(rng, values.shape), (0.3, 0.7, 0.7))
    values += noise * np.float32(rng.uniform(9, 16) / noise.std())
    return np.clip(np.rint(values), -1024, 3071).astype(np.int16)


def _as_mr(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add partial volume, a smooth bias field and Rician noise, int16; works in place."""
    ndimage.gaussian_filter(values, (0.35, 0.55, 0.55), output=values)
    values *= np.exp(_smooth_field(rng, _shape(values), 0.25))
    sd = np.float32(rng.uniform(6, 12))
    values = np.hypot(values + _noise(rng, values.shape) * sd, _noise(rng, values.shape) * sd)
    return np.clip(np.rint(values), 0, 4095).astype(np.int16)


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _smooth_field(rng: np.random.Generator, shape_zyx: Shape, amplitude: float) -> np.ndarray:
    """Draw a smooth field, float32, within about two amplitudes: separable Gaussian bumps on a coarse grid."""
    knots = 5
    field = rng.normal(0, amplitude, (knots, knots, knots)).clip(-2 * amplitude, 2 * amplitude).astype(np.float32)
    for n in shape_zyx:
        t = (np.arange(n, dtype=np.float32) + 0.5) / n
        weights = np.exp(-0.5 * ((t[:, None] - np.linspace(0, 1, knots, dtype=np.float32)) * (knots - 1) / 0.6) ** 2)
        # contracts the first axis and appends the new one: after three iterations the order is z, y, x again
        field = np.tensordot(field, weights / weights.sum(1, keepdims=True), axes=(0, 1))
    return field


def _draw_grid(rng: np.random.Generator, shape_zyx: Shape, spacing_mm: tuple[Range, Range]) -> Grid:
    z, y, x = (int(rng.integers(max(1, n - n // 10), n + 1)) for n in shape_zyx)
    slices, pixels = (float(np.round(rng.uniform(*limits), 3)) for limits in spacing_mm)
    a, b, c = np.round(rng.uniform(-120, 120, 3), 1).tolist()
    return Grid(shape_zyx=(z, y, x), spacing_zyx_mm=(slices, pixels, pixels), origin_xyz_mm=(a, b, c))


def _shape(array: np.ndarray) -> Shape:
    z, y, x = array.shape
    return (z, y, x)


def _check(cases: int, test_cases: int, shape_zyx: Shape, spacing_mm: tuple[Range, Range]) -> None:
    if cases < 1 or test_cases < 0:
        raise UsageError(
            "Invalid number of cases",
            expected="at least one training case, and zero or more test cases",
            found=f"{cases} and {test_cases}",
        )
    if min(shape_zyx) < 8:
        raise UsageError(
            "The shape is too small for an abdomen", expected="at least 8 voxels along each axis", found=shape_zyx
        )
    if max(shape_zyx) > LONGEST_AXIS:
        raise UsageError(
            "The shape is too large for NIfTI", expected=f"at most {LONGEST_AXIS} voxels along an axis", found=shape_zyx
        )
    if any(not 0 < low <= high < 100 for low, high in spacing_mm):
        raise UsageError(
            "Invalid spacing",
            expected="lowest and highest spacing, above 0 and below 100 mm",
            found=spacing_mm,
        )
