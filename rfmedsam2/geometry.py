"""Voxel grids in world coordinates.

A `Grid` ties array indices (z, y, x) to millimeters in LPS world coordinates (DICOM and ITK: +x left, +y posterior,
+z superior). It holds no voxels; a `volume.Volume` is an array with its grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import index

import numpy as np

from rfmedsam2.errors import GeometryError

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Half-open index ranges ((z0, z1), (y0, y1), (x0, x1))."""

_UNIT_TOLERANCE = 1e-2  # files hold directions with few digits
MAX_SKEW_DEGREES = 1.0
"""Axes further than this from 90 degrees are rejected.

Rounded quaternions and affines with few digits give hundredths of a degree; a tilted gantry gives 5 to 30. At one
degree treating the axes as perpendicular is wrong by at most 1.8 % of any length, far below what augmentation does to
training patches. Written labels keep the source's own axes, so that they fit their image to the last digit.
"""
FLAT_SPACING_MM = 999.0
"""Spacing of the missing axis of a 2D image, in multiples of the larger of its two (nnU-Net's convention for 2D)."""
_UPRIGHT = 1e-3  # length of a unit vector seen along z, below which it says nothing
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Its own inverse: NIfTI's and FreeSurfer's world runs to the right and to the front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A regular voxel grid.

    Attributes:
        shape_zyx: number of voxels along the array axes z, y, x.
        spacing_zyx_mm: distance of voxel centers along the array axes, mm, all positive.
        origin_xyz_mm: LPS world position of the center of voxel (0, 0, 0).
        direction: 3x3 matrix, row major; column j is the LPS unit vector of index axis j in the order x, y, z
            (as in ITK's direction cosines).
    """

    shape_zyx: Shape
    spacing_zyx_mm: Triple
    origin_xyz_mm: Triple = (0.0, 0.0, 0.0)
    direction: tuple[Triple, Triple, Triple] = IDENTITY

    def __post_init__(self) -> None:
        """Take lists and arrays of numbers, too; a grid holds tuples of Python's own numbers, and can be a key."""
        try:
            shape: tuple[int, ...] = tuple(map(index, self.shape_zyx))
        except TypeError:
            shape = ()
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError("A grid has no voxels", expected="at least one voxel per axis", found=self.shape_zyx)
        rows = self.direction if len(np.shape(self.direction)) == 2 else ()
        for name, value in (
            ("shape_zyx", shape),
            ("spacing_zyx_mm", spacing_of(self.spacing_zyx_mm)),
            ("origin_xyz_mm", triple_of(self.origin_xyz_mm, "origin_xyz_mm")),
            ("direction", tuple(triple_of(row, "a row of direction") for row in rows)),
        ):
            object.__setattr__(self, name, value)
        if len(self.direction) != 3:
            raise GeometryError("A direction is not a 3x3 matrix", expected="three rows", found=rows)
        if not np.all(np.isfinite(self.direction)) or not np.all(np.isfinite(self.origin_xyz_mm)):
            found = (self.origin_xyz_mm, self.direction)
            raise GeometryError("A grid's origin or direction is not finite", found=found)
        lengths = np.linalg.norm(self.direction, axis=0)
        if np.abs(lengths - 1).max() > _UNIT_TOLERANCE:  # else positions and spacing would contradict each other
            raise GeometryError(
                "The columns of a direction are not unit vectors",
                expected="three columns of length 1; lengths belong into the spacing",
                found=f"lengths {', '.join(f'{length:.4g}' for length in lengths)}",
            )

    @property
    def affine_lps(self) -> np.ndarray:
        """4x4 matrix, index (x, y, z) -> LPS mm."""
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(self.direction) * np.asarray(self.spacing_zyx_mm[::-1])[None]
        affine[:3, 3] = self.origin_xyz_mm
        return affine

    @property
    def affine_ras(self) -> np.ndarray:
        """4x4 matrix, index (x, y, z) -> RAS mm: the affine of NIfTI and nibabel."""
        return _RAS_TO_LPS @ self.affine_lps

    @classmethod
    def from_affine_ras(cls, affine: np.ndarray, shape_zyx: Shape) -> Grid:
        """The grid of a 4x4 matrix that maps index (x, y, z) to RAS mm (NIfTI's and nibabel's affine)."""
        matrix = np.asarray(affine, dtype=float)
        return cls.from_affine_lps(_RAS_TO_LPS @ matrix if matrix.shape == (4, 4) else matrix, shape_zyx)

    @classmethod
    def from_affine_lps(cls, affine: np.ndarray, shape_zyx: Shape) -> Grid:
        """The grid of a 4x4 matrix that maps index (x, y, z) to LPS mm."""
        if np.shape(affine) != (4, 4) or len(shape_zyx) != 3:
            found = f"{np.shape(affine)} for a shape {tuple(shape_zyx)}"
            raise GeometryError("An affine is not a 4x4 matrix for a volume of three axes", found=found)
        matrix = np.asarray(affine, dtype=float)[:3, :3]
        spacing = np.linalg.norm(matrix, axis=0)
        if not np.all(spacing > 0):
            raise GeometryError("An affine has a zero column", expected="three index axes", found=matrix.tolist())
        direction = matrix / spacing
        return cls(
            shape_zyx=_triple_int(shape_zyx),
            spacing_zyx_mm=_triple(spacing[::-1]),
            origin_xyz_mm=_triple(np.asarray(affine, dtype=float)[:3, 3]),
            direction=(_triple(direction[0]), _triple(direction[1]), _triple(direction[2])),
        )

    @property
    def skew_degrees(self) -> float:
        """Largest deviation from 90 degrees between any two index axes; 0 for an orthonormal direction."""
        gram = np.asarray(self.direction).T @ np.asarray(self.direction)
        cosines = np.abs(gram[np.triu_indices(3, 1)])
        return float(np.degrees(np.arcsin(np.clip(cosines.max(), 0, 1))))

    def orthonormalized(self) -> Grid:
        """The grid with the nearest orthonormal direction (polar decomposition)."""
        u, _, vt = np.linalg.svd(np.asarray(self.direction))
        direction = u @ vt
        return replace(self, direction=(_triple(direction[0]), _triple(direction[1]), _triple(direction[2])))

    def cropped(self, box: Box) -> Grid:
        """The grid of `array[z0:z1, y0:y1, x0:x1]`."""
        start_xyz = np.array([box[2][0], box[1][0], box[0][0], 1.0])
        origin = (self.affine_lps @ start_xyz)[:3]
        shape = _triple_int([stop - start for start, stop in box])
        return replace(self, shape_zyx=shape, origin_xyz_mm=_triple(origin))

    def mismatch(self, other: Grid, *, tolerance_mm: float = 1e-2, tolerance_degrees: float = 0.1) -> str | None:
        """None if the grids are equal within tolerance, else a phrase describing the difference.

        `tolerance_mm` holds for ordinary voxels; for smaller ones it is a twentieth of this grid's smallest spacing, so
        that grids in micrometers are compared by their own scale.
        """
        if self.shape_zyx != other.shape_zyx:
            return f"shape {self.shape_zyx} against {other.shape_zyx} (z, y, x)"
        tolerance = min(tolerance_mm, 0.05 * min(self.spacing_zyx_mm))
        drift = np.abs(np.subtract(self.spacing_zyx_mm, other.spacing_zyx_mm)) * np.asarray(self.shape_zyx)
        if (drift > 10 * np.maximum(tolerance, 1e-3 * np.asarray(self.spacing_zyx_mm))).any():
            return f"spacing {_short(self.spacing_zyx_mm)} against {_short(other.spacing_zyx_mm)} mm (z, y, x)"
        cosines = np.einsum("ij,ij->j", np.asarray(self.direction), np.asarray(other.direction))
        angle = float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))
        if angle > tolerance_degrees:
            return f"directions differ by {angle:.2f} degrees"
        shift = float(np.linalg.norm(np.subtract(self.origin_xyz_mm, other.origin_xyz_mm)))
        if shift > max(tolerance, 1e-2 * min(self.spacing_zyx_mm)):
            return f"origins differ by {shift:.3g} mm"
        return None


def scaled(grid: Grid, unit_mm: float) -> Grid:
    """A grid whose lengths are in another unit, in mm."""
    return replace(
        grid,
        spacing_zyx_mm=_triple(np.multiply(grid.spacing_zyx_mm, unit_mm)),
        origin_xyz_mm=_triple(np.multiply(grid.origin_xyz_mm, unit_mm)),
    )


def flattened(grid: Grid) -> Grid:
    """The grid of a single plane in the plane's own two axes, as ITK reads images with two axes.

    z gets a spacing far above the others, so that it counts as the coarse axis (as in nnU-Net); the plane's position
    and tilt are dropped. Where its axes, seen along z, are not perpendicular, ITK's direction in two axes is none, and
    all of the place is dropped. A grid of several planes stays as it is.
    """
    if grid.shape_zyx[0] != 1:
        return grid
    _, y, x = grid.spacing_zyx_mm
    coarse = Grid(shape_zyx=grid.shape_zyx, spacing_zyx_mm=(FLAT_SPACING_MM * max(y, x), y, x))
    axes = np.asarray(grid.direction)[:2, :2]
    lengths = np.linalg.norm(axes, axis=0)
    if lengths.min() < _UPRIGHT or abs(np.dot(*(axes / lengths).T)) > np.sin(np.radians(MAX_SKEW_DEGREES)):
        return coarse
    u, _, vt = np.linalg.svd(axes / lengths)
    (a, b), (c, d) = (u @ vt).tolist()
    left, back, _ = grid.origin_xyz_mm
    return replace(coarse, origin_xyz_mm=(left, back, 0.0), direction=((a, b, 0.0), (c, d, 0.0), (0.0, 0.0, 1.0)))


def triple_of(values: object, name: str) -> Triple:
    """Three numbers from any sequence or array of them.

    Raises:
        GeometryError: something else; names it.
    """
    try:
        a, b, c = np.asarray(values, dtype=float).tolist()
        return (float(a), float(b), float(c))
    except (TypeError, ValueError):
        raise GeometryError(f"{name} is not three numbers", expected="three numbers", found=repr(values)) from None


def spacing_of(values: object) -> Triple:
    """A voxel spacing along z, y, x, mm, from any sequence or array of three numbers.

    Raises:
        GeometryError: not three numbers, or not positive and finite.
    """
    spacing = triple_of(values, "spacing_zyx_mm")
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise GeometryError("A voxel spacing is not positive", expected="three spacings above 0 mm", found=spacing)
    return spacing


def _triple(values: object) -> Triple:
    a, b, c = np.asarray(values, dtype=float).tolist()
    return (a, b, c)


def _triple_int(values: object) -> Shape:
    a, b, c = np.asarray(values).astype(int).tolist()
    return (a, b, c)


def _short(values: Triple) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
