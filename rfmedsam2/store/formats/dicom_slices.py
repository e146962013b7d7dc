"""The slices that a DICOM file holds: one, the frames of a multi-frame file, or none.

Places of frames come from the functional groups of enhanced files, or from what files before them have: slice numbers
of nuclear medicine, frame offsets of doses, or one position and the spacing between slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.uid import UID

from rfmedsam2.errors import GeometryError, ImageError, shortlist
from rfmedsam2.store.formats.dicom_files import DicomFile, number, numbers, read_dicom_file, text
from rfmedsam2.store.formats.dicom_pixels import PixelFormat, pixel_format
from rfmedsam2.store.formats.dicom_rescale import Rescale, rescale_of
from rfmedsam2.store.formats.image_header import parsing

_SLICE_VECTOR, _LOCATIONS = 0x00540080, 0x00182005
_AT_PLACE = 0.1
"""Most mm between a slice location and the place along the normal that it states."""
_IN_TIME = {0x00181063, 0x00181065}
"""Frame Time and Frame Time Vector."""

_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""SOP classes of masks of segments, and of label maps."""

_CONVERT = "Convert it to NIfTI or NRRD first (3D Slicer and dcmqi can), and give that file"
_REMEDIES = {
    "RTSTRUCT": _CONVERT,
    "DICOMDIR": "Give the folder of one series",
}


class NoSlicesError(ImageError):
    """A DICOM file without slices of a volume: a segmentation, contours, a report, frames in time, a screenshot.

    Args:
        what: what the file is.
        series: SeriesInstanceUID.
        image: whether it holds pixels of an image whose place is not known.
        details: arguments of `RfMedSamError`.
    """

    def __init__(self, what: str, *, series: str, image: bool = False, **details: Any) -> None:
        super().__init__(what, **details)
        self.series = series
        self.image = image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slice:
    """One slice: its place in the patient and how its voxels are read.

    Attributes:
        file: the file.
        frame: number of the frame in the file, from 0.
        position: center of the first pixel, LPS mm.
        orientation: unit vectors along a row and along a column.
        spacing_yx: distance of pixels along y and x, mm.
        thickness: spacing between slices, or slice thickness, mm; counts for a single slice only.
        rescale: from stored values to the slice's unit.
    """

    file: DicomFile
    frame: int
    position: tuple[float, float, float]
    orientation: tuple[float, ...]
    spacing_yx: tuple[float, float]
    thickness: float
    rescale: Rescale

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.file.path

    @property
    def series(self) -> str:
        """SeriesInstanceUID."""
        return text(self.file.data, "SeriesInstanceUID")

    @property
    def layout(self) -> PixelFormat:
        """Format of the stored values."""
        return self.rescale.layout

    @property
    def is_dose(self) -> bool:
        """Whether this is a dose, which often lies beside its CT."""
        return text(self.file.data, "Modality") == "RTDOSE"


def slices_of(path: Path) -> list[Slice]:
    """The slices of a file.

    Raises:
        NoSlicesError: the file holds none.
        ImageError: damaged, or an impossible pixel format.
        GeometryError: positions, orientation or pixel spacing are missing or no numbers.
    """
    file = read_dicom_file(path)
    with parsing(path):
        _require_image(file)
        layout = pixel_format(file)
        groups = file.data.get("PerFrameFunctionalGroupsSequence")
        if groups:
            return _grouped_frames(layout, groups)
        _require_no_mosaic(file)
        return _plain_frames(layout)


def is_segmentation(file: DicomFile) -> bool:
    """Whether a file is a DICOM-SEG."""
    return text(file.data, "Modality") == "SEG" or text(file.data, "SOPClassUID") in _SEGMENTATIONS


def _require_image(file: DicomFile) -> None:
    data = file.data
    modality, series = text(data, "Modality"), text(data, "SeriesInstanceUID")
    if is_segmentation(file):
        segments = data.get("SegmentSequence") or []
        names = shortlist(text(segment, "SegmentLabel") or "without name" for segment in segments)
        raise NoSlicesError(
            "The DICOM file is a segmentation (DICOM-SEG), which is read as a label map, not as an image",
            series=series,
            where=file.path,
            found=f"{len(segments)} segment(s): {names}" if segments else "no segment",
            remedy="Give the series of the image",
        )
    if "Rows" not in data:
        kind = UID(text(data, "SOPClassUID") or str(data.file_meta.get("MediaStorageSOPClassUID") or ""))
        kind_name = "DICOMDIR" if kind == "1.2.840.10008.1.3.10" else modality
        raise NoSlicesError(
            "The DICOM file holds no image",
            series=series,
            where=file.path,
            found=f"{kind.name or 'nothing that says what it is'}{f' ({modality})' if modality else ''}",
            remedy=_REMEDIES.get(kind_name, "Give the series of the image"),
        )


def _require_no_mosaic(file: DicomFile) -> None:
    if "MOSAIC" in text(file.data, "ImageType").upper():
        raise ImageError(
            "The DICOM file is a mosaic: the slices of a volume are tiles of one image (Siemens)",
            where=file.path,
            expected="one slice in each file, or frames",
            remedy="Convert it to NIfTI first (dcm2niix can), and give that file",
        )


def _grouped_frames(layout: PixelFormat, frames: Sequence[Any]) -> list[Slice]:
    data, path = layout.file.data, layout.file.path
    if len(frames) != layout.frames:
        raise ImageError(
            "The multi-frame DICOM file describes another number of frames than it holds",
            where=path,
            expected=f"{layout.frames} frames, as NumberOfFrames says",
            found=f"{len(frames)} functional groups",
        )
    shared = data.get("SharedFunctionalGroupsSequence")
    found = []
    for index, frame in enumerate(frames):
        groups = _groups(frame, shared[0] if shared else None)
        place, turn = groups.get("PlanePosition", data), groups.get("PlaneOrientation", data)
        if "ImagePositionPatient" not in place and "ImagePositionVolume" not in place:
            raise _placeless(layout.file, f"{layout.frames} frames, and their functional groups have no position")
        of = "Patient" if "ImagePositionPatient" in place else "Volume"
        found.append(
            _slice(
                layout,
                index,
                position=_triple(place, f"ImagePosition{of}", path),
                orientation=_orientation(turn, f"ImageOrientation{of}", path),
                measure=groups.get("PixelMeasures", data),
                scale=groups.get("PixelValueTransformation", data),
            )
        )
    return found


def _groups(frame: Any, shared: Any) -> dict[str, Any]:
    """The functional groups with a frame's position and scale; per-frame groups override the shared ones."""
    found = {}
    for name in ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation"):
        for source, suffix in ((frame, ""), (shared, ""), (frame, "Volume"), (shared, "Volume")):
            sequence = None if source is None else source.get(f"{name}{suffix}Sequence")
            if sequence:
                found[name] = sequence[0]
                break
    return found


def _plain_frames(layout: PixelFormat) -> list[Slice]:
    """The slices of a file without functional groups."""
    data, path = layout.file.data, layout.file.path
    detectors = data.get("DetectorInformationSequence")
    place = data if "ImagePositionPatient" in data or not detectors else detectors[0]
    if not numbers(place, "ImagePositionPatient", where=path) or not numbers(
        place, "ImageOrientationPatient", where=path
    ):
        lacks = "no ImagePositionPatient and ImageOrientationPatient"
        raise _placeless(layout.file, f"{layout.frames} frames, {lacks}" if layout.frames > 1 else lacks)
    start = np.array(_triple(place, "ImagePositionPatient", path))
    orientation = _orientation(place, "ImageOrientationPatient", path)
    return [
        _slice(layout, index, position=_floats(point), orientation=orientation, measure=data, scale=data)
        for index, point in enumerate(_frame_positions(layout, start, orientation))
    ]


def _frame_positions(layout: PixelFormat, start: np.ndarray, orientation: Sequence[float]) -> list[np.ndarray]:
    """Positions (3,) of all frames of a file without functional groups."""
    data, path = layout.file.data, layout.file.path
    if layout.frames == 1:
        return [start]
    normal = np.cross(orientation[:3], orientation[3:])
    offsets = numbers(data, "GridFrameOffsetVector", where=path)
    if len(offsets) == layout.frames:
        if offsets[0] == 0:
            return [start + offset * normal for offset in offsets]
        # then the offsets are the z of transverse planes (PS3.3 C.8.8.3.2)
        return [np.array([start[0], start[1], offset]) for offset in offsets]
    spacing = number(data, "SpacingBetweenSlices", 0.0, where=path)
    pointer: Any = data.get("FrameIncrementPointer") or []
    running = {int(tag) for tag in (pointer if hasattr(pointer, "__iter__") else [pointer])}
    if running & _IN_TIME:
        raise _placeless(layout.file, f"{layout.frames} frames that follow each other in time (FrameIncrementPointer)")
    places = numbers(data, "SliceLocationVector", where=path)
    if _LOCATIONS in running and len(places) == layout.frames:
        along = float(start @ normal)  # the standard leaves open in which direction locations count
        direction = -1 if abs(places[0] + along) < _AT_PLACE < abs(places[0] - along) else 1
        return [start + direction * (place - places[0]) * normal for place in places]
    if running and _SLICE_VECTOR not in running:
        raise _placeless(layout.file, f"{layout.frames} frames that are not slices (FrameIncrementPointer)")
    if not spacing:
        raise _placeless(layout.file, f"{layout.frames} frames without SpacingBetweenSlices")
    # the sign of the spacing gives the direction of stacking (PS3.3 C.8.4.15)
    order = numbers(data, "SliceVector", where=path) if running else ()
    order = order if len(order) == layout.frames else tuple(range(1, layout.frames + 1))
    return [start + (place - 1) * spacing * normal for place in order]


def _placeless(file: DicomFile, found: str) -> NoSlicesError:
    kind = UID(text(file.data, "SOPClassUID"))
    return NoSlicesError(
        "The DICOM file does not say where its slices lie",
        series=text(file.data, "SeriesInstanceUID"),
        image=True,
        where=file.path,
        expected="a position, an orientation, and for several frames their distance",
        found=f"{found}; {kind.name or 'no SOP class'}",
        remedy="Export the series as single slices or as an enhanced file, or convert it to NIfTI with its spacing",
    )


def _slice(
    layout: PixelFormat,
    frame: int,
    *,
    position: tuple[float, float, float],
    orientation: tuple[float, ...],
    measure: Any,
    scale: Any,
) -> Slice:
    path, data = layout.file.path, layout.file.data
    spacing = numbers(measure, "PixelSpacing", where=path)
    if len(spacing) != 2:
        raise _without("PixelSpacing", "two numbers", spacing, path)
    apart = number(measure, "SpacingBetweenSlices", 0.0, where=path)
    if not apart and measure is not data:
        apart = number(data, "SpacingBetweenSlices", 0.0, where=path)
    rescale = rescale_of(scale, layout)
    return Slice(
        file=layout.file,
        frame=frame,
        position=position,
        orientation=orientation,
        spacing_yx=(spacing[0], spacing[1]),
        thickness=abs(apart) or number(measure, "SliceThickness", 0.0, where=path) or 1.0,
        rescale=rescale,
    )


def _triple(data: Any, keyword: str, path: Path) -> tuple[float, float, float]:
    values = numbers(data, keyword, where=path)
    if len(values) != 3:
        raise _without(keyword, "three numbers", values, path)
    return values[0], values[1], values[2]


def _floats(point: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in point)
    return x, y, z


def _orientation(data: Any, keyword: str, path: Path) -> tuple[float, ...]:
    values = numbers(data, keyword, where=path)
    lengths = [math.hypot(*values[at : at + 3]) for at in (0, 3)]
    if len(values) != 6 or not all(0.9 < length < 1.1 for length in lengths):
        raise _without(keyword, "two unit vectors of three numbers each", values, path)
    return tuple(value / lengths[at // 3] for at, value in enumerate(values))


def _without(keyword: str, expected: str, found: tuple[float, ...], path: Path) -> GeometryError:
    return GeometryError(
        "The DICOM file does not give the position of its slice",
        where=path,
        expected=f"{keyword} with {expected}",
        found=list(found) if found else "no value",
        remedy="Export the series again, with all of its elements",
    )
