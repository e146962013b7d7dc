"""Turning volumes so that their index axes run in named anatomical directions, and back. No voxel is interpolated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from nibabel.orientations import io_orientation

from rfmedsam2.geometry import Grid
from rfmedsam2.volume import Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Orientation:
    """How a volume was turned.

    Attributes:
        source_axes: array axis z, y, x of the turned volume <- axis of the source, each 0 to 2.
        flipped: for each axis z, y, x of the turned volume, whether it runs against the source's.
    """

    source_axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    def apply(self, array_zyx: np.ndarray) -> np.ndarray:
        """A view of `array_zyx` (last three axes z, y, x; axes before them stay) as the turned volume has it."""
        lead = array_zyx.ndim - 3
        turned = array_zyx.transpose(*range(lead), *(lead + axis for axis in self.source_axes))
        return turned[(..., *(slice(None, None, -1 if f else 1) for f in self.flipped))]

    def undo(self, array_zyx: np.ndarray) -> np.ndarray:
        """A view in the source's axes of an array in the turned ones; inverse of `apply`."""
        lead = array_zyx.ndim - 3
        unflipped = array_zyx[(..., *(slice(None, None, -1 if f else 1) for f in self.flipped))]
        back = np.argsort(self.source_axes)
        return unflipped.transpose(*range(lead), *(lead + int(axis) for axis in back))


def reoriented(volume: Volume, to: Literal["RAS"] = "RAS") -> tuple[Volume, Orientation]:
    """The volume with x running to the right, y to the front, z to the head, as near as its axes allow (a view).

    The same as nibabel's closest canonical image, which nnU-Net's readers "WithReorient" give.
    """
    assert to == "RAS"
    found = io_orientation(volume.grid.affine_ras)
    order_xyz = np.argsort(found[:, 0])  # world axis -> index axis, both in x, y, z
    flips_xyz = found[order_xyz, 1] < 0
    source = [2 - int(order_xyz[2 - axis]) for axis in range(3)]
    flips = [bool(flips_xyz[2 - axis]) for axis in range(3)]
    turn = Orientation(
        source_axes=(source[0], source[1], source[2]),
        flipped=(flips[0], flips[1], flips[2]),
    )
    return Volume(array=turn.apply(volume.array), grid=_turned_grid(volume.grid, turn)), turn


def _turned_grid(grid: Grid, turn: Orientation) -> Grid:
    steps = grid.affine_lps[:3, :3][:, ::-1]  # columns z, y, x
    shape = [grid.shape_zyx[a] for a in turn.source_axes]
    spacing = [grid.spacing_zyx_mm[a] for a in turn.source_axes]
    signs = np.where(turn.flipped, -1.0, 1.0)
    origin = np.asarray(grid.origin_xyz_mm)
    for axis, flip, size in zip(turn.source_axes, turn.flipped, shape, strict=True):
        if flip:
            origin = origin + steps[:, axis] * (size - 1)
    columns = np.asarray(grid.direction)[:, ::-1][:, turn.source_axes] * signs
    x, y, z = origin.tolist()
    rows = [tuple(row) for row in columns[:, ::-1].tolist()]
    return replace(
        grid,
        shape_zyx=(shape[0], shape[1], shape[2]),
        spacing_zyx_mm=(spacing[0], spacing[1], spacing[2]),
        origin_xyz_mm=(x, y, z),
        direction=(rows[0], rows[1], rows[2]),
    )
