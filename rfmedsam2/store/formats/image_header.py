"""Image headers (grid, channels, dtype, source geometry), and checks and errors that all formats share.

`ImageHeader` holds enough to write a label map with exactly the geometry of its source. Directions whose axes are not
perpendicular are corrected here if the deviation is small, and rejected otherwise.
"""

from __future__ import annotations

import math
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from pydicom.errors import BytesLengthException, InvalidDicomError

from rfmedsam2.errors import GeometryError, ImageError, RfMedSamError
from rfmedsam2.geometry import MAX_SKEW_DEGREES, Grid, flattened, scaled
from rfmedsam2.records.verify import FaultKind
from rfmedsam2.system.memory import free_bytes
from rfmedsam2.system.ordinary_files import require_ordinary

_SURELY_FREE = 256 << 20  # bytes; looking up the free memory would take longer than reading less

Format = Literal["nifti", "itk", "mgz", "dicom", "raster"]


class TruncatedImageError(ImageError):
    """A file that ends early, or whose compressed stream is damaged."""


class ChangedWhileReadingError(ImageError):
    """A file that another program wrote to while it was read."""


class NotLabelsError(ImageError):
    """A label map whose values are not whole numbers from 0 to 65535."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiGeometry:
    """The header block of a NIfTI file, so that affine, qform and sform with codes, pixdim and units are preserved.

    Attributes:
        block: the 348 (NIfTI-1) or 540 (NIfTI-2) header bytes, little endian.
        sform_code: 0 when the file has no sform.
        qform_code: 0 when the file has no qform.
        nibabel: the grid that nibabel reads, in the file's unit, if it differs from ours.
        itk: the grid that ITK reads, if it differs from ours: it takes an empty pixdim for 1, we for the sform's.
        mirrored: ITK turns axes around, as their pixdim is negative; nibabel does not.
        unit_mm: the file's unit of length, mm.
        unit_known: False: the header does not say; millimeters are assumed, as in ITK.
        scaling: slope and intercept; None if voxels are not scaled.
    """

    block: bytes
    sform_code: int
    qform_code: int
    nibabel: Grid | None = None
    itk: Grid | None = None
    mirrored: bool = False
    unit_mm: float = 1.0
    unit_known: bool = True
    scaling: tuple[float, float] | None = None

    @property
    def ambiguity(self) -> str | None:
        """Why ITK and nibabel place the voxels differently; None if they agree."""
        if self.itk is not None:
            return "the header's pixdim does not state every spacing of its sform"
        if self.nibabel is None:
            return None
        if self.mirrored:
            return "a spacing of the header's pixdim is negative"
        if self.unit_mm != 1:
            return f"the header's unit of length is the {'meter' if self.unit_mm > 1 else 'micrometer'}, not the mm"
        if self.sform_code <= 0 and self.qform_code <= 0:
            return "the header has neither a sform nor a qform"
        if self.sform_code > 0 and self.qform_code > 0:
            return f"the header's sform (code {self.sform_code}) and qform (code {self.qform_code}) disagree"
        return "the header's sform and pixdim disagree"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """Everything about an image except its voxels.

    Attributes:
        grid: the voxel grid, with perpendicular axes.
        source_grid: the grid as stored in the file; differs from `grid` only if axes were corrected.
        channels: number of channels in the file.
        dtype: name of the NumPy dtype that reading returns.
        format: file format family; determines how the geometry is written back.
        skew_degrees: how far the file's axes were from perpendicular.
        flat: the file has only two axes; z was added.
        spacing_known: False: the file says nothing of its spacing; 1 mm is assumed.
        ignored_unit: a unit of length that is neither the millimeter nor converted, as in ITK.
        ignored_scaling: slope and intercept in the header that are not applied to the voxels, as in ITK.
        nifti: header of a NIfTI source.
    """

    grid: Grid
    source_grid: Grid
    channels: int
    dtype: str
    format: Format
    skew_degrees: float = 0.0
    flat: bool = False
    spacing_known: bool = True
    ignored_unit: str | None = None
    ignored_scaling: str | None = None
    nifti: NiftiGeometry | None = None

    @property
    def says_spacing(self) -> bool:
        """Whether the file itself gives the spacing: a single plane in PNG, BMP or TIFF has none."""
        return self.spacing_known and not (self.format == "raster" and self.flat)

    @property
    def itk_grid(self) -> Grid:
        """The grid that ITK reads, which for a NIfTI file without pixdim is not `source_grid`."""
        return self.source_grid if self.nifti is None or self.nifti.itk is None else self.nifti.itk

    @property
    def nibabel_grid(self) -> Grid:
        """The grid that nibabel reads, which for some NIfTI files is not `grid`."""
        return self.source_grid if self.nifti is None or self.nifti.nibabel is None else self.nifti.nibabel

    @property
    def nibabel_grid_mm(self) -> Grid:
        """`nibabel_grid` in mm, if the file has another unit, which nibabel does not convert."""
        if self.nifti is None or self.nifti.nibabel is None:
            return self.source_grid
        return scaled(self.nifti.nibabel, self.nifti.unit_mm)


def repaired(grid: Grid, *, where: object) -> tuple[Grid, float]:
    """The grid with its axes made perpendicular, and their deviation from 90 degrees.

    Raises:
        GeometryError: the deviation is above `MAX_SKEW_DEGREES`, or axes coincide.
    """
    if abs(np.linalg.det(np.asarray(grid.direction))) < 1e-3:
        raise GeometryError(
            "Two index axes of the image point the same way",
            where=where,
            expected="three different directions",
            found=np.round(grid.direction, 4).tolist(),
            remedy="Convert the file again from its source",
        )
    skew = grid.skew_degrees
    if skew > MAX_SKEW_DEGREES:
        raise GeometryError(
            "The image axes are not perpendicular",
            where=where,
            expected=f"at most {MAX_SKEW_DEGREES:g} degree from 90 (less is corrected)",
            found=f"{skew:.2f} degrees of skew",
            remedy="Resample the image to an orthogonal grid first (a tilted CT gantry gives such files)",
        )
    # less than a thousandth of a degree is rounding; such directions stay unchanged, so that grids compare equal
    return (grid.orthonormalized() if skew > 1e-3 else grid), skew


def checked_spacing(spacing: Sequence[float], *, where: object) -> tuple[float, float, float]:
    """Check three spacings in mm (any axis order): positive and finite.

    Raises:
        GeometryError: one of them is zero, negative or not a number.
    """
    a, b, c = (float(s) for s in spacing)
    if not all(np.isfinite(s) and s > 0 for s in (a, b, c)):
        raise GeometryError(
            "The voxel spacing is not positive",
            where=where,
            expected="three spacings above 0 mm",
            found=(a, b, c),
            remedy="Correct the header (pixdim, ElementSpacing, space directions), or convert the file again",
        )
    return (a, b, c)


def require_memory(path: Path, header: ImageHeader, *, extra: int = 0) -> None:
    """Raise before voxels are read that do not fit into memory; a system may promise memory that it does not have.

    Args:
        path: the image file.
        header: its header.
        extra: bytes that reading takes beside the array.

    Raises:
        ImageError: says how much is missing.
    """
    need = header.channels * math.prod(header.grid.shape_zyx) * np.dtype(header.dtype).itemsize + extra
    if need > _SURELY_FREE and need > (free := free_bytes()):
        raise _memory_error(path, found=f"{need / 2**30:.1f} GiB of voxels and {free / 2**30:.1f} GiB free")


def _memory_error(path: Path, *, found: str) -> ImageError:
    return ImageError(
        "There is not enough memory to read the image, or its header is damaged",
        where=path,
        found=found,
        remedy="Run again with fewer workers; if the file is small, copy or convert it again",
    )


def displacement_mm(one: Grid, other: Grid) -> float:
    """Largest distance in mm between the positions of a corner voxel in the two grids. The shape is that of `one`."""
    sizes = np.asarray(one.shape_zyx[::-1]) - 1
    corners = np.array(np.meshgrid(*([0, n] for n in sizes))).reshape(3, -1)
    indices = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.linalg.norm(((one.affine_lps - other.affine_lps) @ indices)[:3], axis=0).max())


def disagreement(one: Grid, other: Grid) -> tuple[str, bool] | None:
    """None if the grids agree; else a phrase, and whether it is harmless (same shape, shifts below half a voxel)."""
    phrase = one.mismatch(other)
    if phrase is None:
        return None
    harmless = one.shape_zyx == other.shape_zyx and displacement_mm(one, other) < 0.5 * min(one.spacing_zyx_mm)
    return phrase, harmless


def grids_differ(one: ImageHeader, other: ImageHeader) -> tuple[str, bool] | None:
    """None if two files are on one grid as ITK reads both, or as nibabel reads both; else as from `disagreement`.

    Either reading will do: labels of an image are written by programs that read it in one way or the other. If a file
    says nothing of its spacing, only the shapes are compared.
    """
    if not (one.says_spacing and other.says_spacing) and one.grid.shape_zyx == other.grid.shape_zyx:
        return None
    kinds = ("grid", "itk_grid", "nibabel_grid", "nibabel_grid_mm")
    readings: list[tuple[Grid, Grid]] = [(getattr(one, kind), getattr(other, kind)) for kind in kinds]
    if one.flat != other.flat:  # two axes, and three of which one has a single plane
        readings = [(flattened(a), flattened(b)) for a, b in readings]
    found = [disagreement(a, b) for a, b in readings]
    if None in found:
        return None
    return next((each for each in found if each is not None and each[1]), found[0])


def header_of_lengths(one: ImageHeader, other: ImageHeader) -> ImageHeader:
    """Whose spacing counts of two files on one grid: the first's, unless only the second says it, or its unit."""
    silent = one.nifti is not None and not one.nifti.unit_known
    says = other.nifti is not None and other.nifti.unit_known
    better = (silent and says) or (other.says_spacing and not one.says_spacing)
    return other if better else one


def assumptions(header: ImageHeader) -> dict[FaultKind, str]:
    """What was assumed where a header is ambiguous, silent or not followed: sentences without a full stop, by kind."""
    found: dict[FaultKind, str] = {}
    if (ambiguity := readers_differ(header)) is not None:
        found["forms-differ"] = ambiguity
    if header.ignored_unit is not None:
        found["unit-ignored"] = (
            f"The unit of length in the header, {header.ignored_unit}, is not converted; lengths count as mm"
        )
    if header.ignored_scaling is not None:
        found["scaling-ignored"] = (
            f"The intensity function in the header ({header.ignored_scaling}) is not applied to the voxels"
        )
    if not header.spacing_known:
        found["no-spacing"] = "The file says nothing of its spacing; 1 mm is assumed"
    return found


def readers_differ(header: ImageHeader) -> str | None:
    """A sentence if ITK and nibabel place an image differently by more than a tenth of a voxel, else None."""
    nifti = header.nifti
    if nifti is None or nifti.ambiguity is None:
        return None
    away = displacement_mm(header.grid if nifti.itk is None else nifti.itk, header.nibabel_grid)
    if away <= 0.1 * min(header.grid.spacing_zyx_mm):
        return None
    read = "read as by ITK" if nifti.itk is None else "read with the sform's spacing"
    return f"ITK and nibabel place this image differently, by up to {away:.4g} mm: {nifti.ambiguity}; {read}"


@contextmanager
def unchanged(paths: Sequence[Path]) -> Iterator[None]:
    """Raise if the size or modification time of a file changes while the `with` block runs.

    Raises:
        ImageError: a file does not exist or cannot be accessed.
        ChangedWhileReadingError: a file was written to.
    """
    before = [_state(path) for path in paths]
    yield
    for path, old in zip(paths, before, strict=True):
        if _state(path) != old:
            raise ChangedWhileReadingError(
                "The file changed while it was read",
                where=path,
                expected="a file that no other program writes to",
                remedy="Wait until copying or converting has ended, then run the same command again",
            )


_PARSER_ERRORS = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    HeaderDataError,
    ImageFileError,
    InvalidDicomError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,  # Pillow's, of damaged TIFF
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn what the libraries' parsers raise on damaged bytes (nearly anything, found by fuzzing) into an `ImageError`.

    Raises:
        ImageError: names the file.
    """
    try:
        yield
    except RfMedSamError:
        raise
    except MemoryError as error:
        raise _memory_error(path, found=f"{free_bytes() / 2**30:.1f} GiB free") from error
    except InvalidDicomError as error:
        raise ImageError(
            "The file is not a complete DICOM file",
            where=path,
            expected="the mark DICM after 128 bytes, and file meta information",
            remedy="Export the series again, or complete the file (dcmtk: dcmconv --write-file IN OUT)",
        ) from error
    except _PARSER_ERRORS as error:
        raise ImageError(
            "The image cannot be read",
            where=path,
            found=f"{type(error).__name__}: {str(error)[:200]}",
            remedy="Check what wrote the file; copy or convert it again",
        ) from error


def require_ordinary_file(path: Path) -> None:
    """Raise unless a path is an ordinary file.

    Raises:
        ImageError: missing, not accessible, a folder, a pipe, a socket or a device (also at the end of a link).
    """
    _ = _state(path)


def _state(path: Path) -> tuple[int, int]:
    try:
        status = require_ordinary(path)
    except FileNotFoundError:
        raise ImageError("The file does not exist", where=path) from None
    except OSError as error:
        raise ImageError(f"The file cannot be read ({error.strerror})", where=path) from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("The file cannot be read (it is a folder)", where=path)
    return status.st_size, status.st_mtime_ns
