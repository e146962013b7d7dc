"""Reading a DICOM series (a folder of slices or one multi-frame file) as one volume.

Slices are ordered by position, never by name or instance number. Missing slices, a tilted gantry, several volumes in
one series and several series in one folder are rejected, because each would silently give a wrong volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813
from pydicom.errors import InvalidDicomError

from rfmedsam2.errors import GeometryError, ImageError
from rfmedsam2.geometry import Grid
from rfmedsam2.store.formats.image_header import MAX_SKEW_DEGREES, ImageHeader, checked_spacing, repaired

_NO_IMAGES = {"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC"}
_EVEN_TOLERANCE = 0.05
"""Tolerance of slice distances, as a fraction of the usual one (positions are stored with few digits)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slice:
    path: Path
    frame: int
    series: str
    label: str
    position: tuple[float, float, float]
    orientation: tuple[float, ...]
    spacing_yx: tuple[float, float]
    thickness: float
    size_yx: tuple[int, int]
    scaling: tuple[float, float]
    samples: int


def is_dicom_file(path: Path) -> bool:
    """Whether a file has DICOM's magic bytes."""
    try:
        if not path.is_file():  # opening a pipe would wait forever
            return False
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_dicom_folder(path: Path) -> bool:
    """Whether a folder holds at least one DICOM file."""
    return path.is_dir() and any(is_dicom_file(file) for file in path.iterdir() if file.is_file())


def dicom_files(path: Path) -> list[Path]:
    """The DICOM files of a folder, or the file itself."""
    if path.is_dir():
        return sorted(f for f in path.iterdir() if is_dicom_file(f))
    return [path]


def read_dicom_header(path: Path) -> ImageHeader:
    """Read the header of a series folder or a single file; no voxels are read."""
    return _header(path, _sorted_slices(path))


def read_dicom(path: Path) -> tuple[np.ndarray, ImageHeader]:
    """Read voxels (C,Z,Y,X), rescaled to the stored unit (Hounsfield for CT), and header of a series.

    z runs along the slice normal. Integers stay when slopes and intercepts are whole numbers, else float32.

    Raises:
        ImageError: no image series, several series, several volumes in one series, or slices that do not match.
        GeometryError: missing slices, uneven slice distances, a tilted gantry, or an invalid spacing.
    """
    slices = _sorted_slices(path)
    header = _header(path, slices)
    try:
        array = sitk.GetArrayFromImage(_image(slices))
    except RuntimeError as error:
        raise ImageError(
            "The voxels of the DICOM series cannot be read",
            where=path,
            found=str(error).strip().splitlines()[-1][:200],
            remedy="Copy or export the series again",
        ) from error
    if header.channels > 1:
        array = np.moveaxis(array, -1, 0)
    array = array.reshape(header.channels, -1, *header.grid.shape_zyx[1:])
    if len({s.path for s in slices}) == 1 and len(slices) > 1:
        array = array[:, [s.frame for s in slices]]
    return np.ascontiguousarray(array, dtype=header.dtype), header


def _image(slices: Sequence[_Slice]) -> sitk.Image:
    files = list(dict.fromkeys(str(s.path) for s in slices))
    pixel = _pixel_type(slices)
    if len(files) == 1:
        reader = sitk.ImageFileReader()
        reader.SetFileName(files[0])
    else:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
    reader.SetOutputPixelType(pixel)
    return reader.Execute()


def _pixel_type(slices: Sequence[_Slice]) -> int:
    """ITK type of the whole series: a fractional slope in any slice makes it float32 (PET)."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(slices[0].path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ImageError("The DICOM file cannot be read", where=slices[0].path, found=str(error)[-150:]) from error
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "float" in kind or any(not float(v).is_integer() for s in slices for v in s.scaling):
        return sitk.sitkVectorFloat32 if slices[0].samples > 1 else sitk.sitkFloat32
    return reader.GetPixelID()


def _header(path: Path, slices: Sequence[_Slice]) -> ImageHeader:
    source = _grid(path, slices)
    straight, skew = repaired(source, where=path)
    name = sitk.GetPixelIDValueAsString(_pixel_type(slices))
    bits = next(b for b in ("64", "32", "16", "8") if f"{b}-bit" in name)
    kind = "float" if "float" in name else ("uint" if "unsigned" in name else "int")
    return ImageHeader(
        grid=straight,
        source_grid=source,
        channels=slices[0].samples,
        dtype="float32" if kind == "float" else f"{kind}{bits}",
        format="dicom",
        skew_degrees=skew,
    )


def _sorted_slices(path: Path) -> list[_Slice]:
    files = dicom_files(path)
    slices = [s for file in files for s in _slices_of(file)]
    series = sorted({s.series for s in slices})
    if not series:
        raise ImageError(
            "The DICOM files hold no image series",
            where=path,
            expected="DICOM slices with positions",
            found=f"{len(files)} DICOM file(s), none of them an image with a position",
        )
    if len(series) > 1:
        lists = "; ".join(_described([s for s in slices if s.series == uid]) for uid in series)
        raise ImageError(
            f"The folder holds {len(series)} DICOM image series",
            where=path,
            expected="one",
            found=lists,
            remedy="Give each series its own folder",
        )
    _check_alike(path, slices)
    normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
    return sorted(slices, key=lambda s: float(np.dot(normal, s.position)))


def _described(slices: Sequence[_Slice]) -> str:
    first = min(slices, key=lambda s: s.path.name)
    return f"{first.label}, {len(slices)} slices (such as {first.path.name})"


def _slices_of(path: Path) -> list[_Slice]:
    """The slices of a file: usually one, several for multi-frame files, none if the file is not an image."""
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True)
    except (InvalidDicomError, OSError, ValueError, EOFError) as error:
        raise ImageError("The DICOM file cannot be read", where=path, found=error) from error
    if str(data.get("Modality", "")) in _NO_IMAGES or "Rows" not in data:
        return []
    frames = data.get("PerFrameFunctionalGroupsSequence")
    if frames:
        shared = data.SharedFunctionalGroupsSequence[0] if "SharedFunctionalGroupsSequence" in data else None
        return [_slice(path, data, i, _groups(frame, shared)) for i, frame in enumerate(frames)]
    if "ImagePositionPatient" not in data or "ImageOrientationPatient" not in data:
        return []
    return [_slice(path, data, 0, {})]


def _groups(frame: Any, shared: Any) -> dict[str, Any]:
    """The functional groups with a frame's position; per-frame groups override the shared ones."""
    found = {}
    for name in ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation"):
        for source in (frame, shared):
            sequence = None if source is None else source.get(f"{name}Sequence")
            if sequence:
                found[name] = sequence[0]
                break
    return found


def _slice(path: Path, data: Any, frame: int, groups: dict[str, Any]) -> _Slice:
    place, turn = groups.get("PlanePosition", data), groups.get("PlaneOrientation", data)
    measure, scale = groups.get("PixelMeasures", data), groups.get("PixelValueTransformation", data)
    try:
        x, y, z = (float(v) for v in place.ImagePositionPatient)
        return _Slice(
            path=path,
            frame=frame,
            series=str(data.get("SeriesInstanceUID", "")),
            label=f"{data.get('Modality', '?')} {data.get('SeriesDescription') or 'without description'}",
            position=(x, y, z),
            orientation=tuple(float(v) for v in turn.ImageOrientationPatient),
            spacing_yx=(float(measure.PixelSpacing[0]), float(measure.PixelSpacing[1])),
            thickness=float(measure.get("SpacingBetweenSlices") or measure.get("SliceThickness") or 1.0),
            size_yx=(int(data.Rows), int(data.Columns)),
            scaling=(float(scale.get("RescaleSlope", 1.0)), float(scale.get("RescaleIntercept", 0.0))),
            samples=int(data.get("SamplesPerPixel", 1)),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise GeometryError(
            "The DICOM file does not give the position of its slice",
            where=path,
            expected="ImagePositionPatient, ImageOrientationPatient and PixelSpacing",
            found=error,
        ) from None


def _check_alike(path: Path, slices: Sequence[_Slice]) -> None:
    first = slices[0]
    for other in slices[1:]:
        for what, one, two, near in (
            ("size in pixels (y, x)", first.size_yx, other.size_yx, 0.0),
            ("orientation", first.orientation, other.orientation, 1e-3),
            ("pixel spacing", first.spacing_yx, other.spacing_yx, 1e-3),
        ):
            if not np.allclose(one, two, rtol=0, atol=near):
                raise ImageError(
                    f"The slices of the series differ in {what}",
                    where=path,
                    expected=f"{one} as in {first.path.name}",
                    found=f"{two} in {other.path.name}",
                    remedy="Move slices that do not belong to the volume (a localizer) out of the folder",
                )


def _grid(path: Path, slices: Sequence[_Slice]) -> Grid:
    first = slices[0]
    row, column = np.asarray(first.orientation[:3]), np.asarray(first.orientation[3:])
    normal = np.cross(row, column)
    positions = np.array([s.position for s in slices])
    step = normal * first.thickness
    if len(slices) > 1:
        _check_distances(path, slices, positions @ normal)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        _check_tilt(path, step, normal)
    y, x, _ = checked_spacing((*first.spacing_yx, float(np.linalg.norm(step))), where=path)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * x, column * y, step], axis=1)
    affine[:3, 3] = positions[0]
    return Grid.from_affine_lps(affine, (len(slices), *first.size_yx))


def _check_distances(path: Path, slices: Sequence[_Slice], along: np.ndarray) -> None:
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
    off = np.flatnonzero(np.abs(distances - usual) > _EVEN_TOLERANCE * usual + 1e-2)
    if off.size:
        lost = int(np.rint(distances[off] / usual - 1).clip(min=0).sum())
        where = ", ".join(f"after {slices[i].path.name} ({distances[i]:.3g} mm)" for i in off[:3])
        raise GeometryError(
            f"The series lacks {lost} slice(s)" if lost else "The slices of the series are unevenly spaced",
            where=path,
            expected=f"{usual:.4g} mm between all slices",
            found=f"{off.size} other distance(s): {where}",
            remedy="Export the complete series again, or resample it to even distances",
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
