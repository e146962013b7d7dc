"""Preprocessing of one volume: transpose, crop to non-zero, normalize, resample (nnU-Net's order).

`Restore` holds what is needed to map a prediction back to the source grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rfmedsam2.errors import GeometryError, ImageError, PlanError
from rfmedsam2.geometry import Box, Grid, Shape, Triple
from rfmedsam2.records.case import CaseGeometry
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.system.memory import free_bytes
from rfmedsam2.transforms.crop import OUTSIDE_LABEL, nonzero_box, outside_mask
from rfmedsam2.transforms.normalize import normalize
from rfmedsam2.transforms.resample import planned_shape, resample_image, resample_label, separate_axis
from rfmedsam2.volume import Volume

MOST_ENLARGED = 1000
"""Resampling to more than this multiple of an image's voxels comes from a wrong spacing (5 mm to 0.5 mm gives 1000)."""
_SURELY_FITS = 1 << 30  # bytes
_FEW_VOXELS = 2_000_000  # quickly resampled and predicted, whatever the spacing


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """How to undo preprocessing, in this order: resample to `shape_cropped`, transpose back, insert into `box`.

    Attributes:
        source_grid: grid of the volume before preprocessing.
        box: crop, half-open ranges along source axes z, y, x.
        transpose_forward: planned axis i is source axis `transpose_forward[i]`.
        shape_cropped: shape before resampling, planned axes.
        shape_planned: shape after resampling, planned axes.
        spacing_source: spacing before resampling, mm, planned axes.
        spacing_planned: spacing after resampling, mm, planned axes.
    """

    source_grid: Grid
    box: Box
    transpose_forward: Shape
    shape_cropped: Shape
    shape_planned: Shape
    spacing_source: Triple
    spacing_planned: Triple

    def to_record(self) -> CaseGeometry:
        """Convert to the record stored with a preprocessed case."""
        grid = self.source_grid
        return CaseGeometry(
            shape_zyx=grid.shape_zyx,
            spacing_zyx_mm=grid.spacing_zyx_mm,
            origin_xyz_mm=grid.origin_xyz_mm,
            direction=grid.direction,
            box_zyx=self.box,
            transpose_forward=self.transpose_forward,
            shape_cropped=self.shape_cropped,
            shape_planned=self.shape_planned,
            spacing_source=self.spacing_source,
            spacing_planned=self.spacing_planned,
        )

    @classmethod
    def from_record(cls, record: CaseGeometry) -> Restore:
        """Convert from the record stored with a preprocessed case."""
        grid = Grid(
            shape_zyx=record.shape_zyx,
            spacing_zyx_mm=record.spacing_zyx_mm,
            origin_xyz_mm=record.origin_xyz_mm,
            direction=record.direction,
        )
        return cls(
            source_grid=grid,
            box=record.box_zyx,
            transpose_forward=record.transpose_forward,
            shape_cropped=record.shape_cropped,
            shape_planned=record.shape_planned,
            spacing_source=record.spacing_source,
            spacing_planned=record.spacing_planned,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A preprocessed volume, in planned axes and spacing.

    Attributes:
        image: (C, a, b, c) float32, contiguous.
        label: (a, b, c) int16, or None. If a channel is normalized over the non-zero region only, -1 marks voxels
            outside it, so that augmentation can keep them at 0; otherwise these are background.
        restore: how to undo preprocessing.
    """

    image: np.ndarray
    label: np.ndarray | None
    restore: Restore


def prepare(volume: Volume, plan: Plan, stage: str, *, label: np.ndarray | None = None, threads: int = 1) -> Prepared:
    """Preprocess one volume for a stage of a plan; the input arrays are not modified.

    Args:
        volume: (C, Z, Y, X); already reoriented to `plan.reorient`, if the plan sets it.
        plan: the plan.
        stage: name of one of the plan's stages.
        label: (Z, Y, X) or (1, Z, Y, X) integer label map on the same grid.
        threads: number of planes resampled in parallel.

    Raises:
        PlanError: the stage does not exist, or the number of channels differs from the plan's.
        ImageError: values that the planned normalization does not allow, or label values above 32767.
    """
    config = plan.stage(stage)
    if volume.array.shape[0] != len(plan.channels):
        raise PlanError(
            "The number of channels differs from the plan's",
            expected=f"{len(plan.channels)} ({', '.join(plan.channels)})",
            found=volume.array.shape[0],
        )
    if label is not None and label.max(initial=0) > np.iinfo(np.int16).max:
        raise ImageError("Label values are too large", expected="at most 32767", found=int(label.max()))
    box = nonzero_box(volume.array)
    restore = _restore(volume.grid, box, plan, config)
    _require_reasonable_size(restore, config.patch_size, channels=volume.array.shape[0])
    # crop and transpose are views and commute; the only copy is the conversion to float32
    cropped = _planned_view(volume.array, restore)
    marks = None if label is None else _planned_view(label.reshape((1, *volume.grid.shape_zyx)), restore)[0]
    resampled = restore.shape_planned != restore.shape_cropped
    masked = any(n.kind == "zscore" and n.use_mask for n in config.normalization)
    outside = outside_mask(cropped) if masked or (resampled and marks is not None) else None
    if marks is not None:
        marks = np.array(marks, dtype=np.int16, order="C")
        if outside is not None:
            np.copyto(marks, np.int16(OUTSIDE_LABEL), where=outside & (marks == 0))
    inside = None
    if outside is not None:
        # labeled voxels count as inside even if the image is zero there
        inside = ~outside if marks is None else marks >= 0
        del outside
    axis = separate_axis(restore.spacing_source, restore.spacing_planned, config.resampling.anisotropy_threshold)
    how = config.resampling
    # computed before the image becomes float32, so that only the two versions of the image are in memory at once
    if marks is not None:
        marks = resample_label(
            marks, restore.shape_planned, separate=axis, order=how.order_label, order_z=how.order_z, threads=threads
        )
        if not masked:
            np.maximum(marks, 0, out=marks)
    image = _normalized(cropped, plan, config, inside=inside)
    del inside
    image = resample_image(
        image, restore.shape_planned, separate=axis, order=how.order_image, order_z=how.order_z, threads=threads
    )
    return Prepared(image=image, label=marks, restore=restore)


def target_spacing(stage: Stage, spacing_source: Sequence[float]) -> Triple:
    """Spacing after preprocessing, planned axes; a 2D stage keeps the distance between slices."""
    a, b, c = stage.spacing_mm
    return (spacing_source[0], b, c) if stage.is_2d else (a, b, c)


def _restore(grid: Grid, box: Box, plan: Plan, stage: Stage) -> Restore:
    order = plan.transpose_forward
    a, b, c = (box[axis][1] - box[axis][0] for axis in order)
    spacing = (grid.spacing_zyx_mm[order[0]], grid.spacing_zyx_mm[order[1]], grid.spacing_zyx_mm[order[2]])
    target = target_spacing(stage, spacing)
    return Restore(
        source_grid=grid,
        box=box,
        transpose_forward=order,
        shape_cropped=(a, b, c),
        shape_planned=planned_shape((a, b, c), spacing, target),
        spacing_source=spacing,
        spacing_planned=target,
    )


def _require_reasonable_size(restore: Restore, patch_size: Sequence[int], *, channels: int) -> None:
    """Raise before an image is resampled to a size that does not fit into memory, or that no real spacing gives."""
    before, after = math.prod(restore.shape_cropped), math.prod(restore.shape_planned)
    need = 4 * channels * after
    patch = (1,) * (3 - len(patch_size)) + tuple(patch_size)
    predicted = math.prod(map(max, restore.shape_planned, patch))  # a needle is padded to patches
    enlarged = after > MOST_ENLARGED * before and predicted > max(_FEW_VOXELS, 2 * math.prod(patch))
    if not enlarged and need <= _SURELY_FITS:
        return
    limit = None
    if enlarged:
        limit = f"at most {MOST_ENLARGED} times the voxels"
    elif need > (free := free_bytes()):
        limit = f"at most the {free / 2**30:.1f} GiB of memory that are free"
    if limit is None:
        return
    raise GeometryError(
        "The image would become too large when it is resampled to the spacing of the plan",
        expected=limit,
        found=f"{_sizes(restore.shape_cropped)} voxels of {_sizes(restore.spacing_source)} mm that become "
        f"{_sizes(restore.shape_planned)} of {_sizes(restore.spacing_planned)} mm, {need / 2**30:.1f} GiB",
        remedy="Check the spacing in the image's header (its unit, pixdim, ElementSpacing), or plan a coarser one",
    )


def _sizes(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _planned_view(array: np.ndarray, restore: Restore) -> np.ndarray:
    cropped = array[(slice(None), *(slice(*limits) for limits in restore.box))]
    return cropped.transpose(0, *(axis + 1 for axis in restore.transpose_forward))


def _normalized(cropped: np.ndarray, plan: Plan, stage: Stage, *, inside: np.ndarray | None) -> np.ndarray:
    image = np.array(cropped, dtype=np.float32, order="C")
    for channel, how, statistics in zip(image, stage.normalization, plan.intensities, strict=True):
        normalize(channel, how, statistics, inside=inside)
    return image
