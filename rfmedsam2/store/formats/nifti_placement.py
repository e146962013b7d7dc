"""Where the voxels of a NIfTI file lie: read as ITK reads it, beside nibabel's reading where that differs.

ITK takes the sform if its axes are perpendicular and it has code 1, equals the qform, or stands alone; else the qform.
(Straight forms that only mirror each other count as equal.) Without either the axes run to the left, to the back and up
from the origin. Spacing is pixdim, and an axis whose pixdim is negative is turned around; lengths are converted
to mm. Where pixdim is empty ITK takes 1; we take the sform's spacing, also where pixdim is 1 (as nibabel writes empty
ones) and there is no qform. nibabel takes the sform whenever there is one, and converts no units.
(itkNiftiImageIO.cxx of ITK 5.4, checked against SimpleITK 2.5.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.spatialimages import HeaderDataError

from rfmedsam2.errors import GeometryError
from rfmedsam2.geometry import Grid, Shape, flattened, scaled
from rfmedsam2.store.formats.image_header import checked_spacing, repaired
from rfmedsam2.volume import unit_mm

_LONGEST_QUATERNION = 1.001
"""Squared length of (b, c, d) up to which it is rounding; beyond it the quaternion is damaged."""
_PERPENDICULAR = 1e-4  # ITK's tolerance for the products of the axes of a sform
_SAME_FORM = 1e-4  # ITK's tolerance for a sform that merely repeats the qform, mm


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The two readings of a NIfTI header.

    Attributes:
        grid: ours, mm, of three axes; they need not be perpendicular if there is no qform.
        nibabel: as nibabel reads it, in the unit of the file; None if that is the same, or no grid at all.
        itk: as ITK reads it, mm; None if that is the same.
        mirrored: ITK turns axes around.
        unit_mm: the file's unit of length, mm.
    """

    grid: Grid
    nibabel: Grid | None
    itk: Grid | None
    mirrored: bool
    unit_mm: float


def placement(path: Path, raw: Nifti1Header, shape_xyz: tuple[int, int, int]) -> Placement:
    """Read the placement of a volume of `shape_xyz` voxels.

    Raises:
        GeometryError: no usable form, an invalid spacing, or a sform whose scale contradicts pixdim.
    """
    flat = is_flat(raw)
    shape = (shape_xyz[2], shape_xyz[1], shape_xyz[0])
    sform = _sform(raw)
    zooms = checked_spacing(_zooms(raw, sform), where=path)
    qform = _qform(raw, zooms) if int(raw["qform_code"]) > 0 else None
    if sform is None and qform is None and _has_form(raw):
        raise _unusable(path, raw)
    found = Grid.from_affine_ras(_affine(raw, sform, zooms), shape)
    stated = np.array(raw["pixdim"][1:4], dtype=float)
    if sform is not None and qform is None and not _scales_agree(found, zooms, flat=flat):
        stated[np.abs(stated) == 1] = 0  # nibabel's for empty ones
        zooms = checked_spacing(_filled(stated, sform), where=path)
    if qform is None and not _scales_agree(found, zooms, flat=flat):
        _ = repaired(found, where=path)  # skew raises its own error
        raise GeometryError(
            "The NIfTI header gives two different spacings",
            where=path,
            expected=f"the affine's spacing to be pixdim's, {tuple(round(z, 4) for z in zooms)} mm (x, y, z)",
            found=tuple(round(s, 4) for s in found.spacing_zyx_mm[::-1]),
            remedy="Correct pixdim or the affine",
        )
    unit = unit_mm(int(raw["xyzt_units"]))
    source = grid = _in_mm(found, zooms, unit)
    itk, other = grid, _as_nibabel(raw, shape, qform)
    if _empty(stated).any():
        ones = checked_spacing(np.where(_empty(stated), 1.0, zooms).tolist(), where=path)  # niftilib's for empty ones
        itk = _in_mm(Grid.from_affine_ras(_affine(raw, sform, ones), shape), ones, unit)
    if flat:
        grid, itk, other = flattened(grid), flattened(itk), other and flattened(other)
    same = other is not None and grid.mismatch(other) is None
    return Placement(
        grid=source,
        nibabel=None if same else other,
        itk=None if grid.mismatch(itk) is None else itk,
        mirrored=bool((_turns(raw) < 0).any()),
        unit_mm=unit,
    )


def is_flat(raw: Nifti1Header) -> bool:
    """Whether an image has two axes, as ITK counts them: its channels are the fifth."""
    shape = raw.get_data_shape()
    return len(shape) == 2 or (len(shape) == 5 and shape[2:4] == (1, 1))


def _affine(raw: Nifti1Header, sform: np.ndarray | None, zooms: tuple[float, float, float]) -> np.ndarray:
    """The form that ITK takes for these spacings."""
    form = _qform(raw, zooms) if int(raw["qform_code"]) > 0 else None
    if sform is not None and (form is None or _itk_prefers(sform, form, int(raw["sform_code"]))):
        form = sform
    return (np.diag([-zooms[0], -zooms[1], zooms[2], 1.0]) if form is None else form) * _turns(raw)


def _turns(raw: Nifti1Header) -> np.ndarray:
    """-1 for axes (x, y, z) that ITK turns around, else 1; and 1 for the origin."""
    return np.array([-1.0 if mm < 0 else 1.0 for mm in raw["pixdim"][1:4]] + [1.0])


def _empty(pixdim: np.ndarray) -> np.ndarray:
    return ~np.isfinite(pixdim) | (pixdim == 0)


def _in_mm(grid: Grid, zooms: tuple[float, float, float], unit: float) -> Grid:
    return scaled(replace(grid, spacing_zyx_mm=zooms[::-1]), unit)


def _has_form(raw: Nifti1Header) -> bool:
    return int(raw["sform_code"]) > 0 or int(raw["qform_code"]) > 0


def _unusable(path: Path, raw: Nifti1Header) -> GeometryError:
    if int(raw["qform_code"]) > 0 and int(raw["sform_code"]) <= 0:
        b, c, d = (float(raw[f"quatern_{letter}"]) for letter in "bcd")
        return GeometryError(
            "The NIfTI qform is invalid",
            where=path,
            expected="a quaternion of length 1 and a finite offset",
            found=f"b, c, d = {b:g}, {c:g}, {d:g}",
            remedy="Convert the file again",
        )
    return GeometryError(
        "The NIfTI affine is not finite or has a zero column", where=path, remedy="Convert the file again"
    )


def _sform(raw: Nifti1Header) -> np.ndarray | None:
    """The sform if it has a code, is finite, and has three axes."""
    if int(raw["sform_code"]) <= 0:
        return None
    affine = np.asarray(raw.get_sform(), dtype=float)
    usable = np.isfinite(affine).all() and (np.linalg.norm(affine[:3, :3], axis=0) > 0).all()
    return affine if usable else None


def _zooms(raw: Nifti1Header, sform: np.ndarray | None) -> list[float]:
    """Spacing in pixdim along x, y, z, in the file's unit; where pixdim is empty (0 or NaN), that of the sform."""
    zooms = np.abs(np.array(raw["pixdim"][1:4], dtype=float))
    zooms = zooms if sform is None else np.array(_filled(zooms, sform))
    if is_flat(raw) and not zooms[2] > 0:
        zooms[2] = 1.0  # a file with two axes need not say anything about a third
    return zooms.tolist()


def _filled(zooms: np.ndarray, sform: np.ndarray) -> list[float]:
    return np.where(_empty(zooms), np.linalg.norm(sform[:3, :3], axis=0), np.abs(zooms)).tolist()


def _qform(raw: Nifti1Header, zooms: tuple[float, float, float]) -> np.ndarray | None:
    """The qform as ITK's niftilib computes it: a quaternion that is too long by rounding is shortened, qfac is a sign.

    None if the quaternion or its offset is damaged.
    """
    bcd = np.array([float(raw[f"quatern_{letter}"]) for letter in "bcd"])
    offset = np.array([float(raw[f"qoffset_{axis}"]) for axis in "xyz"])
    squared = float(bcd @ bcd)
    if not (squared <= _LONGEST_QUATERNION and np.isfinite(offset).all()):
        return None
    rest = 1.0 - squared
    a = 0.0 if rest < 1e-7 else float(np.sqrt(rest))
    b, c, d = bcd / np.sqrt(squared) if rest < 1e-7 else bcd
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * [zooms[0], zooms[1], -zooms[2] if float(raw["pixdim"][0]) < 0 else zooms[2]]
    affine[:3, 3] = offset
    return affine


def _itk_prefers(sform: np.ndarray, qform: np.ndarray, code: int) -> bool:
    """Whether ITK takes the sform where there are both."""
    axes = sform[:3, :3] / np.linalg.norm(sform[:3, :3], axis=0)
    perpendicular = np.abs(axes @ axes.T - np.eye(3)).max() <= _PERPENDICULAR
    return bool(perpendicular) and (code == 1 or np.abs(_unsigned(sform) - _unsigned(qform)).max() <= _SAME_FORM)


def _unsigned(form: np.ndarray) -> np.ndarray:
    """A form without the directions of its axes if it is straight: ITK compares singular vectors, which have none."""
    off_axis = form[:3, :3] - np.diag(np.diag(form)[:3])
    if np.abs(off_axis).max() > _SAME_FORM:
        return form  # of others rounding decides
    return np.hstack([np.abs(form[:, :3]), form[:, 3:]])


def _scales_agree(grid: Grid, zooms: tuple[float, float, float], *, flat: bool) -> bool:
    """Whether the sform's scale is pixdim's. A sform of scale 1 has none: some programs write only directions."""
    axes = 2 if flat else 3
    scales = grid.spacing_zyx_mm[::-1][:axes]
    return bool(np.allclose(scales, zooms[:axes], rtol=1e-2) or np.allclose(scales, 1.0, rtol=1e-6))


def _as_nibabel(raw: Nifti1Header, shape_zyx: Shape, qform: np.ndarray | None) -> Grid | None:
    """The affine of nibabel, without conversion of units; None if it cannot be used."""
    try:
        if int(raw["sform_code"]) > 0:
            affine = _sform(raw)
        elif int(raw["qform_code"]) > 0:
            affine = qform
        else:
            plain = raw.copy()
            plain["pixdim"] = np.abs(plain["pixdim"])  # as nibabel does when it opens a file
            affine = np.asarray(plain.get_base_affine(), dtype=float)
        return None if affine is None else Grid.from_affine_ras(affine, shape_zyx)
    except (HeaderDataError, ValueError):
        return None
