"""Reorienting volumes to a named anatomical orientation (RAS) and back, by transposing and flipping axes only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from nibabel.orientations import io_orientation

from rfmedsam2.geometry import Grid
from rfmedsam2.volume import Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Orientation:
    """How a volume was reoriented.

    Attributes:
        source_axes: for each axis z, y, x of the reoriented volume, the axis of the source (0 to 2).
        flipped: for each axis z, y, x of the reoriented volume, whether it runs against the source's.
    """

    source_axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    def apply(self, array_zyx: np.ndarray) -> np.ndarray:
        """Reorient `array_zyx` (last three axes z, y, x; leading axes stay); a view."""
        lead = array_zyx.ndim - 3
        turned = array_zyx.transpose(*range(lead), *(lead + axis for axis in self.source_axes))
        return turned[(..., *(slice(None, None, -1 if f else 1) for f in self.flipped))]

    def undo(self, array_zyx: np.ndarray) -> np.ndarray:
        """Bring a reoriented array back to the source's axes (inverse of `apply`); a view."""
        lead = array_zyx.ndim - 3
        unflipped = array_zyx[(..., *(slice(None, None, -1 if f else 1) for f in self.flipped))]
        back = np.argsort(self.source_axes)
        return unflipped.transpose(*range(lead), *(lead + int(axis) for axis in back))


def reoriented(volume: Volume, to: Literal["RAS"] = "RAS") -> tuple[Volume, Orientation]:
    """Reorient a volume so that x, y, z run as close to right, anterior, superior as its axes allow (a view).

    Equal to nibabel's closest canonical image, which nnU-Net's ...WithReorient readers reorientation.
    """
    assert to == "RAS"
    found = io_orientation(volume.grid.affine_ras)
    order_xyz = np.argsort(found[:, 0])  # world axis -> index axis, both in x, y, z
    flips_xyz = found[order_xyz, 1] < 0
    source = [2 - int(order_xyz[2 - axis]) for axis in range(3)]
    flips = [bool(flips_xyz[2 - axis]) for axis in range(3)]
    orientation = Orientation(
        source_axes=(source[0], source[1], source[2]),
        flipped=(flips[0], flips[1], flips[2]),
    )
    return Volume(array=orientation.apply(volume.array), grid=_reoriented_grid(volume.grid, orientation)), orientation


def _reoriented_grid(grid: Grid, orientation: Orientation) -> Grid:
    steps = grid.affine_lps[:3, :3][:, ::-1]  # columns z, y, x
    shape = [grid.shape_zyx[a] for a in orientation.source_axes]
    spacing = [grid.spacing_zyx_mm[a] for a in orientation.source_axes]
    signs = np.where(orientation.flipped, -1.0, 1.0)
    origin = np.asarray(grid.origin_xyz_mm)
    for axis, flip, size in zip(orientation.source_axes, orientation.flipped, shape, strict=True):
        if flip:
            origin = origin + steps[:, axis] * (size - 1)
    columns = np.asarray(grid.direction)[:, ::-1][:, orientation.source_axes] * signs
    x, y, z = origin.tolist()
    rows = [tuple(row) for row in columns[:, ::-1].tolist()]
    return replace(
        grid,
        shape_zyx=(shape[0], shape[1], shape[2]),
        spacing_zyx_mm=(spacing[0], spacing[1], spacing[2]),
        origin_xyz_mm=(x, y, z),
        direction=(rows[0], rows[1], rows[2]),
    )
