"""Reading a DICOM series (a folder of slices or one multi-frame file) as one volume.

Slices are ordered by position, never by name or instance number. Missing slices, a tilted gantry, several volumes in
one series and several series in one folder are rejected, because each would silently give a wrong volume.
"""

from __future__ import annotations

import filecmp
import logging
from collections.abc import Sequence
from itertools import groupby, islice, pairwise
from pathlib import Path

import numpy as np

from rfmedsam2.errors import GeometryError, ImageError, shortlist
from rfmedsam2.geometry import MAX_SKEW_DEGREES, Grid
from rfmedsam2.store.formats.dicom_files import dicom_files, is_dicom_file, text
from rfmedsam2.store.formats.dicom_pixels import stored_values
from rfmedsam2.store.formats.dicom_rescale import result_type
from rfmedsam2.store.formats.dicom_slices import NoSlicesError, Slice, slices_of
from rfmedsam2.store.formats.image_header import ImageHeader, checked_spacing, parsing, repaired

logger = logging.getLogger(__name__)

_EVEN_TOLERANCE = 0.05
"""Tolerance of slice distances, as a fraction of the usual one (positions are stored with few digits)."""

_ROUNDED = 0.1
"""Distances between slices may differ more where each slice is at its place but for this fraction of the usual one:
thin slices whose positions were rounded."""

_IN_TENTHS = 0.075
"""Most mm that a slice is away from even places where positions were rounded to tenths: half of one, and a half of that
for the line through all, which follows what was rounded."""

_DRIFTED = 0.25
"""Largest distance of a slice from its place, as a fraction of the usual distance, however little distances differ."""

_ASIDE = 0.5
"""Largest shift of a slice against the others within its plane, in pixels."""

_EVEN_REMEDY = "Export the complete series again, or resample it to even distances"

_MOST_LOOKED_AT = 10_000
"""Files and folders that are looked at to find a series below a folder without DICOM files."""


def read_dicom_header(path: Path) -> ImageHeader:
    """Read the header of a series folder or a single file; no voxels are read.

    Raises:
        ImageError: no image series, several series, several volumes in one series, or slices that do not match.
        GeometryError: missing slices, uneven slice distances, a tilted gantry, or an invalid spacing.
    """
    return _header(path, sorted_slices(path))


def read_dicom(path: Path) -> tuple[np.ndarray, ImageHeader]:
    """Read voxels (C,Z,Y,X), rescaled to the unit of the series (Hounsfield for CT), and header of a series.

    z runs along the slice normal. Every slice and frame is rescaled by its own slope and intercept, or by its modality
    lookup table. Integers stay when all slopes and intercepts are whole numbers, in a type that holds all their
    results; else voxels are float32.

    Raises:
        ImageError: no image series, several series, several volumes in one series, or slices that do not match.
        GeometryError: missing slices, uneven slice distances, a tilted gantry, or an invalid spacing.
    """
    slices = sorted_slices(path)
    header = _header(path, slices)
    array = np.empty((header.channels, *header.grid.shape_zyx), dtype=header.dtype)
    places = sorted(range(len(slices)), key=lambda z: (slices[z].path, slices[z].frame))
    for file, of_file in groupby(places, key=lambda z: slices[z].path):
        with parsing(file):
            wanted = list(of_file)
            frames = [slices[z].frame for z in wanted]
            for z, stored in zip(wanted, stored_values(slices[wanted[0]].layout, frames), strict=True):
                slices[z].rescale.apply(stored, array[:, z])
    _warn_of_passes(path, slices)
    _warn_of_plain_slices(path, slices)
    if any(text(s.file.data, "PhotometricInterpretation") == "MONOCHROME1" for s in slices):
        logger.warning(
            "%s is stored for display with low values white (MONOCHROME1). The values are read as they were measured; "
            "SimpleITK and nnU-Net's reader invert them.",
            path,
        )
    return array, header


def _header(path: Path, slices: Sequence[Slice]) -> ImageHeader:
    source = _grid(path, slices)
    straight, skew = repaired(source, where=path)
    return ImageHeader(
        grid=straight,
        source_grid=source,
        channels=slices[0].rescale.channels,
        dtype=result_type([s.rescale for s in slices]).name,
        format="dicom",
        skew_degrees=skew,
    )


def sorted_slices(path: Path) -> list[Slice]:
    """The slices of a series folder or file, sorted along their normal.

    Raises:
        ImageError: no image series, several series, or slices that do not match.
    """
    slices = _image_slices(path)
    series = sorted({s.series for s in slices})
    if len(series) > 1:
        lists = "; ".join(_described([s for s in slices if s.series == uid]) for uid in series)
        raise ImageError(
            f"The folder holds {len(series)} DICOM image series",
            where=path,
            expected="one",
            found=lists,
            remedy="Give each series its own folder",
        )
    slices = _without_copies(slices)
    _check_alike(path, slices)
    normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
    return sorted(slices, key=lambda s: float(np.dot(normal, s.position)))


def _image_slices(path: Path) -> list[Slice]:
    """The slices of all files of a folder, or of one file; doses beside their CT are left out."""
    files = dicom_files(path)
    _check_are_dicom(path, files)
    slices: list[Slice] = []
    others: list[NoSlicesError] = []
    for file in files:
        try:
            slices += slices_of(file)
        except NoSlicesError as error:
            others.append(error)
    images = [s for s in slices if not s.is_dose] or slices
    if not images and len(others) == 1:
        raise others[0]
    if not images:
        kinds = "; ".join(dict.fromkeys(f"{e.what}: {e.found}" for e in others[:4]))
        raise ImageError(
            "The DICOM files hold no image series",
            where=path,
            expected="DICOM slices with positions",
            found=f"{len(files)} DICOM file(s). {kinds}" if others else "no DICOM file",
            remedy=None if files else _deeper(path),
        )
    series = {s.series for s in images}
    for error in others:
        if error.image and error.series in series:
            raise error
    return images


def _deeper(folder: Path) -> str | None:
    """A remedy that names the first folder of DICOM files below one that has none."""
    below = (p for p in islice(folder.rglob("*"), _MOST_LOOKED_AT) if is_dicom_file(p))
    found = next(below, None)
    return None if found is None else f"Give the folder of the series: {found.parent}"


def _check_are_dicom(path: Path, files: Sequence[Path]) -> None:
    """Refuse what is not DICOM: a damaged .dcm file at an end of the series would not be missed."""
    if path.is_dir():
        named = {f for f in path.iterdir() if f.suffix.lower() == ".dcm" and not f.name.startswith(".") and f.is_file()}
        wrong = sorted(named - set(files))
    else:
        wrong = [file for file in files if not is_dicom_file(file)]
    if wrong:
        raise ImageError(
            "The file is not a DICOM file",
            where=wrong[0],
            expected='"DICM" after 128 bytes, or the elements of a DICOM file without preamble',
            found=f"{wrong[0].stat().st_size} bytes of something else",
            remedy="Copy or export it again" + (", or move it out of the folder" if path.is_dir() else ""),
        )


def _without_copies(slices: Sequence[Slice]) -> list[Slice]:
    """The slices without files that are copies of another, byte for byte (a series that was downloaded twice)."""
    kept: dict[tuple[str, int, tuple[float, ...]], Slice] = {}
    return [
        one
        for one in slices
        if (first := kept.setdefault((text(one.file.data, "SOPInstanceUID"), one.frame, one.position), one)) is one
        or not filecmp.cmp(first.path, one.path, shallow=False)
    ]


def _described(slices: Sequence[Slice]) -> str:
    first = min(slices, key=lambda s: s.path.name)
    return f"{first.file.label}, {len(slices)} slices (such as {first.path.name})"


def _check_alike(path: Path, slices: Sequence[Slice]) -> None:
    first = slices[0]
    across = max(first.layout.size_yx)
    for other in slices[1:]:
        for what, one, two, near in (
            ("size in pixels (y, x)", first.layout.size_yx, other.layout.size_yx, 0.0),
            ("number of channels", (first.rescale.channels,), (other.rescale.channels,), 0.0),
            ("orientation", first.orientation, other.orientation, 1e-3),
            # rounded spacings: the far corner moves by less than half a pixel
            ("pixel spacing", first.spacing_yx, other.spacing_yx, max(1e-3, 0.5 * min(first.spacing_yx) / across)),
        ):
            if any(abs(a - b) > near for a, b in zip(one, two, strict=True)):
                raise ImageError(
                    f"The slices of the series differ in {what}",
                    where=path,
                    expected=f"{one} as in {first.path.name}",
                    found=f"{two} in {other.path.name}",
                    remedy="Move slices that do not belong to the volume (a localizer) out of the folder",
                )


def _grid(path: Path, slices: Sequence[Slice]) -> Grid:
    first = slices[0]
    row, column = np.asarray(first.orientation[:3]), np.asarray(first.orientation[3:])
    normal = np.cross(row, column)
    positions = np.array([s.position for s in slices])
    step = normal * first.thickness
    if len(slices) > 1:
        _check_distances(path, slices, positions @ normal)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        _check_line(path, slices, positions, normal)
        _check_tilt(path, step, normal)
    y, x, _ = checked_spacing((*first.spacing_yx, float(np.linalg.norm(step))), where=path)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * x, column * y, step], axis=1)
    affine[:3, 3] = positions[0]
    return Grid.from_affine_lps(affine, (len(slices), *first.layout.size_yx))


def _check_distances(path: Path, slices: Sequence[Slice], along: np.ndarray) -> None:
    distances = np.diff(along)
    usual = float(np.median(distances))
    if distances.min() < 1e-3 * max(usual, 1e-3):
        twice = slices[int(np.argmin(distances))]
        raise ImageError(
            "Several slices of the series have the same position",
            where=path,
            expected="one volume with one slice per position",
            found=f"{twice.path.name} and another slice at {tuple(round(v, 3) for v in twice.position)}",
            remedy="Split the series (time points, echoes, b-values) into one folder each",
        )
    away = np.abs(along - np.linspace(along[0], along[-1], len(along)))
    if away.max() <= _ROUNDED * usual or _are_even_tenths(slices, along):
        return
    off = np.flatnonzero(np.abs(distances - usual) > _EVEN_TOLERANCE * usual + 1e-2)
    if off.size:
        lost = int(np.rint(distances[off] / usual - 1).clip(min=0).sum())
        where = ", ".join(f"after {slices[i].path.name} ({distances[i]:.3g} mm)" for i in off[:3])
        raise GeometryError(
            f"The series lacks {lost} slice(s)" if lost else "The slices of the series are unevenly spaced",
            where=path,
            expected=f"{usual:.4g} mm between all slices",
            found=f"{off.size} other distance(s): {where}",
            remedy=_EVEN_REMEDY,
        )
    if away.max() > _DRIFTED * usual:
        place = slices[int(np.argmax(away))].path.name
        raise GeometryError(
            "The slices of the series are unevenly spaced",
            where=path,
            expected="one distance between all slices",
            found=f"{distances.min():.4g} to {distances.max():.4g} mm, so that {place} is {away.max():.3g} mm away "
            "from where even distances place it",
            remedy=_EVEN_REMEDY,
        )


def _are_even_tenths(slices: Sequence[Slice], along: np.ndarray) -> bool:
    """Whether all positions are whole tenths of a mm, and those of even distances that were rounded."""
    tenths = 10 * np.array([s.position for s in slices])
    numbers = np.arange(len(along))
    away = np.abs(along - np.polyval(np.polyfit(numbers, along, 1), numbers))
    return bool(np.abs(tenths - np.rint(tenths)).max() < 1e-4 and away.max() <= _IN_TENTHS)


def _warn_of_passes(path: Path, slices: Sequence[Slice]) -> None:
    """Warn where slices of several acquisitions alternate: two volumes, or one that was taken in two passes."""
    every = (text(s.file.data, "AcquisitionNumber") for s in slices)
    numbers = [number for number in every if number]  # slices without one say nothing
    turns = sum(a != b for a, b in pairwise(numbers))
    if 0 < len(set(numbers)) <= turns:  # one comes back after another
        logger.warning(
            "Slices of acquisitions %s alternate in %s. They are read as one volume; if they are several volumes, half "
            "a slice apart, give each its own folder.",
            shortlist(sorted(set(numbers))),
            path,
        )


def _warn_of_plain_slices(path: Path, slices: Sequence[Slice]) -> None:
    """Warn where some slices of a CT are rescaled and some are not: a program may have dropped the elements."""
    plain = [s.path.name for s in slices if s.rescale.identity]
    if 0 < len(plain) < len(slices) and text(slices[0].file.data, "Modality") == "CT":
        logger.warning(
            "%d of %d slices of %s state no rescaling, or slope 1 and intercept 0, and the others do: %s. Each is read "
            "as it states.",
            len(plain),
            len(slices),
            path,
            shortlist(plain),
        )


def _check_line(path: Path, slices: Sequence[Slice], positions: np.ndarray, normal: np.ndarray) -> None:
    """Refuse slices that are shifted against each other within their planes: each would be drawn at another place."""
    aside = positions - np.linspace(positions[0], positions[-1], len(positions))
    aside -= np.outer(aside @ normal, normal)
    shifts = np.linalg.norm(aside, axis=1)
    most = int(np.argmax(shifts))
    if shifts[most] > _ASIDE * min(slices[0].spacing_yx):
        raise GeometryError(
            "The slices of the series are shifted against each other within their planes",
            where=path,
            expected="first pixels on a straight line, but for half a pixel",
            found=f"{slices[most].path.name}, {shifts[most]:.3g} mm beside the line from the first slice to the last",
            remedy="Give each part of the series its own folder, or resample it to one grid",
        )


def _check_tilt(path: Path, step: np.ndarray, normal: np.ndarray) -> None:
    cosine = float(np.dot(step, normal) / (np.linalg.norm(step) * np.linalg.norm(normal)))
    tilt = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    if tilt > MAX_SKEW_DEGREES:
        raise GeometryError(
            "The gantry was tilted: slices are not stacked along their normal",
            where=path,
            expected=f"at most {MAX_SKEW_DEGREES:g} degree",
            found=f"{tilt:.2f} degrees",
            remedy="Convert the series with a tool that corrects the tilt (for instance dcm2niix), then use the NIfTI",
        )
