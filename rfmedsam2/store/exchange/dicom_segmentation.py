"""DICOM-SEG, BINARY and LABELMAP: written by highdicom from a source series, read as one label map.

Frames without labels may be left out of a file. So that the whole grid can be restored without the series, it is
written in a private block too; in files of other programs it is the grid of a series in the same folder, else the
extent of the frames. BINARY segments are numbered from 1; the label value is in each segment's description.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import (
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

from rfmedsam2.errors import GeometryError, ImageError, MissingPackageError, RfMedSamError, StoreError
from rfmedsam2.geometry import Grid
from rfmedsam2.store.exchange.codes import Code, Segment
from rfmedsam2.store.formats.dicom import read_dicom_header, sorted_slices
from rfmedsam2.store.formats.dicom_files import is_dicom_file, numbers, read_dicom_file, text
from rfmedsam2.store.formats.dicom_slices import is_segmentation
from rfmedsam2.store.formats.image_header import ImageHeader, NotLabelsError, checked_spacing, parsing
from rfmedsam2.version import __version__

_GRID = (0x0071, "RFMEDSAM2 GRID")
"""Private block: 1 the affine from index (x, y, z) to LPS mm, 2 the shape (z, y, x)."""
_VALUE = re.compile(r"Label value (\d+)")
_MADE_BY = {
    "series_number": 300,
    "instance_number": 1,
    "manufacturer": "rfmedsam2",
    "manufacturer_model_name": "rfmedsam2",
    "software_versions": __version__,
    "device_serial_number": "0",
    "content_label": "SEGMENTATION",
}
_OFF_PLANE = 0.1
"""Largest distance of a frame from its plane of the grid, in planes."""
_REFERRED_TO = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
"""Elements that the standard wants, with or without a value."""
_SINGLE_SLICES = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
_WRITER_ERRORS = (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError)
"""What highdicom and pydicom raise of series that lack what the standard asks for."""


def require_highdicom() -> None:
    """Check that DICOM-SEG can be written.

    Raises:
        MissingPackageError: highdicom is not installed.
    """
    if importlib.util.find_spec("highdicom") is None:
        raise MissingPackageError(
            "DICOM-SEG is written by highdicom, which is not installed", remedy="Run pip install rfmedsam2[dicom]"
        )


def is_dicom_segmentation(path: Path) -> bool:
    """Whether a path is a DICOM-SEG file."""
    return is_dicom_file(path) and is_segmentation(read_dicom_file(path))


def write_segmentation(
    path: Path,
    labels_zyx: np.ndarray,
    segments: Sequence[Segment],
    series: Path,
    *,
    kind: str,
    keep_empty: bool = False,
    automatic: bool = False,
) -> None:
    """Write labels on the grid of a series as DICOM-SEG (not atomic).

    Args:
        path: the file.
        labels_zyx: labels, planes along the slice normal as the series is read.
        segments: what the values are.
        series: folder of the source series, or its one enhanced file.
        kind: BINARY or LABELMAP.
        keep_empty: write frames without labels, too.
        automatic: whether a model made the labels.

    Raises:
        MissingPackageError: highdicom is not installed.
        ImageError: the series cannot be read, or lacks what a DICOM-SEG takes over from it.
    """
    require_highdicom()
    slices = sorted_slices(series)
    grid = read_dicom_header(series).source_grid
    z, y, x = (round(s, 9) for s in grid.spacing_zyx_mm)  # of 16 characters at most
    sources = source_files(series)
    if len(sources) == 1 and len(slices) > 1:  # frames in the order of the file
        ordered = np.empty_like(labels_zyx)
        ordered[[s.frame for s in slices]] = labels_zyx
        labels_zyx = ordered
    numbered = {s.value: s.value if kind == "LABELMAP" else n for n, s in enumerate(segments, start=1)}
    lookup = np.zeros(max(numbered) + 1, dtype=np.uint16)
    lookup[list(numbered)] = list(numbered.values())
    hd: Any = importlib.import_module("highdicom")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of names of one word, as anonymized patients have
            found = hd.seg.Segmentation(
                source_images=sources,
                pixel_array=lookup[labels_zyx],
                segmentation_type=kind,
                segment_descriptions=[_description(hd, s, numbered[s.value], automatic=automatic) for s in segments],
                series_instance_uid=generate_uid(),
                sop_instance_uid=generate_uid(),
                **_MADE_BY,
                omit_empty_frames=not keep_empty and bool(labels_zyx.any()),
                pixel_measures=hd.PixelMeasuresSequence(
                    pixel_spacing=(y, x), slice_thickness=z, spacing_between_slices=z if len(labels_zyx) > 1 else None
                ),
                series_description="Segmentation" if automatic else "Label map",
            )
        found.ContentCreatorName = ""  # the standard wants the element
        block = found.private_block(*_GRID, create=True)
        block.add_new(1, "FD", grid.affine_lps.ravel().tolist())
        block.add_new(2, "US", list(grid.shape_zyx))
        found.save_as(path)
    except _WRITER_ERRORS as error:
        if isinstance(error, RfMedSamError):
            raise
        raise StoreError(
            "highdicom cannot write a segmentation of this series",
            where=series,
            found=f"{type(error).__name__}: {str(error)[:200]}",
            remedy="Export the series again with all of its elements, or choose another format",
        ) from error


def source_files(series: Path) -> list[pydicom.Dataset]:
    """The files of a series without pixels, in the order of their slices.

    Raises:
        ImageError: the series cannot be read, or lacks what a DICOM-SEG refers to.
    """
    with parsing(series):
        return [_completed(file) for file in dict.fromkeys(s.path for s in sorted_slices(series))]


def read_segmentation(path: Path) -> tuple[np.ndarray, ImageHeader]:
    """Read a DICOM-SEG as labels (1,Z,Y,X), and its header.

    Raises:
        NotLabelsError: segments overlap, or hold probabilities.
        ImageError: damaged, or of a kind without planes in the patient.
        GeometryError: frames that do not lie on one grid.
    """
    with parsing(path):
        data = pydicom.dcmread(path)
        header, planes = _placed(path, data)
        labels = np.zeros((1, *header.grid.shape_zyx), dtype=np.uint16)
        kind = str(data.SegmentationType)
        if kind not in ("BINARY", "LABELMAP"):
            raise NotLabelsError(
                "The DICOM segmentation holds probabilities",
                where=path,
                expected="BINARY or LABELMAP",
                found=kind,
                remedy="Export the segments again as BINARY",
            )
        values = _label_values(data)
        frames = data.pixel_array.reshape(-1, *header.grid.shape_zyx[1:])
        for frame, z, groups in zip(frames, planes, data.PerFrameFunctionalGroupsSequence, strict=True):
            if kind == "LABELMAP":
                labels[0, z] = frame if values is None else _mapped(frame, values)
                continue
            number = _segment_number(data, groups)
            new = frame > 0
            if (labels[0, z][new] > 0).any():
                raise _overlapping(path, data, number)
            labels[0, z][new] = number if values is None else values[number]
        return labels, header


def read_segmentation_header(path: Path) -> ImageHeader:
    """Read the header of a DICOM-SEG.

    Raises:
        ImageError: see `read_segmentation`.
    """
    with parsing(path):
        return _placed(path, pydicom.dcmread(path, stop_before_pixels=True))[0]


def _completed(file: Path) -> pydicom.Dataset:
    """A source in memory, with what anonymization removed and with shared groups where highdicom expects them.

    Raises:
        ImageError: without what the segmentation refers to.
    """
    source = pydicom.dcmread(file, stop_before_pixels=True)
    for keyword in _MAY_BE_EMPTY:
        if keyword not in source:
            setattr(source, keyword, "")
    if "SpecificCharacterSet" in source and not source.SpecificCharacterSet:
        del source.SpecificCharacterSet
    for name in ("Class", "Instance"):
        if not source.get(f"SOP{name}UID"):
            setattr(source, f"SOP{name}UID", source.file_meta.get(f"MediaStorageSOP{name}UID", ""))
    source.SOPClassUID = source.SOPClassUID or _SINGLE_SLICES.get(source.get("Modality", ""), "")
    lacking = [name for name in _REFERRED_TO if not source.get(name)]
    if lacking:
        raise ImageError(
            "A DICOM segmentation cannot refer to this file",
            where=file,
            expected=", ".join(_REFERRED_TO),
            found=f"no {' and no '.join(lacking)}",
            remedy="Export the series again with its identifiers, or choose another format",
        )
    if shared := source.get("SharedFunctionalGroupsSequence"):
        for name in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
            if name not in shared[0] and name in (first := source.PerFrameFunctionalGroupsSequence[0]):
                shared[0][name] = first[name]  # those of all frames are alike, else the series is not read
    return source


def _description(hd: Any, segment: Segment, number: int, *, automatic: bool) -> Any:
    made_by = hd.AlgorithmIdentificationSequence(
        name="rfmedsam2", family=hd.sr.CodedConcept("123110", "DCM", "Artificial Intelligence"), version=__version__
    )
    coding = segment.coding
    found = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.name[:64],
        segmented_property_category=_concept(hd, coding.category),
        segmented_property_type=_concept(hd, coding.kind),
        algorithm_type="AUTOMATIC" if automatic else "MANUAL",
        algorithm_identification=made_by if automatic else None,
        display_color=hd.color.CIELabColor.from_rgb(*segment.color),
    )
    found.SegmentDescription = f"Label value {segment.value}"
    if coding.side is not None:
        modifiers = [_concept(hd, coding.side)]
        found.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = modifiers
    return found


def _concept(hd: Any, code: Code) -> Any:
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)


def _placed(path: Path, data: Any) -> tuple[ImageHeader, list[int]]:
    """The header, and the plane of each frame."""
    shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
    frames = data.get("PerFrameFunctionalGroupsSequence") or []
    groups = [(_group(f, shared, "PlanePosition"), _group(f, shared, "PlaneOrientation")) for f in frames]
    if not groups or any(None in pair for pair in groups):
        raise ImageError(
            "The DICOM segmentation does not say where its frames lie in the patient",
            where=path,
            expected="a plane position and orientation of each frame",
            found=f"{len(frames)} frame(s)",
            remedy="Export it again from the series, or convert it to NIfTI",
        )
    turn = np.array(numbers(groups[0][1], "ImageOrientationPatient", where=path))
    points = np.array([numbers(place, "ImagePositionPatient", where=path) for place, _ in groups])
    same = all(np.allclose(numbers(o, "ImageOrientationPatient", where=path), turn, atol=1e-4) for _, o in groups)
    if not same or turn.shape != (6,) or points.shape != (len(groups), 3):
        raise GeometryError("The frames of the DICOM segmentation are not parallel planes", where=path)
    normal = np.cross(turn[:3], turn[3:])
    grid = _grid(path, data, turn, points, measures=_group(frames[0], shared, "PixelMeasures"))
    step = grid.affine_lps[:3, 2]
    along = (points - np.array(grid.origin_xyz_mm)) @ normal / float(step @ normal)
    planes = np.rint(along).astype(int)
    corners = points - (np.array(grid.origin_xyz_mm) + planes[:, None] * step)
    aside = np.linalg.norm(corners, axis=1) > 0.5 * min(grid.spacing_zyx_mm)
    depth, *plane = grid.shape_zyx
    off = np.abs(along - planes) > _OFF_PLANE
    if aside.any() or off.any() or planes.min() < 0 or planes.max() >= depth or plane != [data.Rows, data.Columns]:
        raise GeometryError(
            "The frames of the DICOM segmentation do not lie on one grid",
            where=path,
            expected=f"positions on a grid of {grid.shape_zyx} (z, y, x)",
            found=f"{int((aside | off).sum())} of {len(points)} frame(s) beside it, of {data.Rows} x {data.Columns}",
            remedy="Export the segmentation again from its series",
        )
    header = ImageHeader(grid=grid, source_grid=grid, channels=1, dtype="uint16", format="dicom")
    return header, planes.tolist()


def _group(frame: Any, shared: Any, name: str) -> Any:
    """A functional group of a frame, or the shared one."""
    for source in (frame, shared):
        if source is not None and (found := source.get(f"{name}Sequence")):
            return found[0]
    return None


def _grid(path: Path, data: Any, turn: np.ndarray, points: np.ndarray, *, measures: Any) -> Grid:
    try:
        block = data.private_block(*_GRID)
        affine = np.array(block[1].value, dtype=float).reshape(4, 4)
        depth, height, width = (int(n) for n in block[2].value)
        return Grid.from_affine_lps(affine, (depth, height, width))
    except (KeyError, ValueError):
        pass
    referenced = {s.get("SeriesInstanceUID") for s in data.get("ReferencedSeriesSequence") or []}
    try:
        if sorted_slices(path.parent)[0].series in referenced:
            return read_dicom_header(path.parent).grid
    except RfMedSamError:
        pass  # no series lies beside it
    normal = np.cross(turn[:3], turn[3:])
    along = np.unique(np.round(points @ normal, 3))
    y, x = numbers(measures, "PixelSpacing", where=path)
    apart = float(np.diff(along).min()) if len(along) > 1 else 0.0
    declared = numbers(measures, "SpacingBetweenSlices", where=path) or numbers(measures, "SliceThickness", where=path)
    z = apart or (declared[0] if declared else 1.0)
    if len(along) > 1 and declared and abs(round(apart / declared[0]) * declared[0] - apart) < 1e-2 * apart:
        z = declared[0]  # every second plane may be empty
    z, y, x = checked_spacing((z, y, x), where=path)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([turn[:3] * x, turn[3:] * y, normal * z], axis=1)
    affine[:3, 3] = points[int(np.argmin(points @ normal))]
    depth = round(float(along[-1] - along[0]) / z) + 1
    return Grid.from_affine_lps(affine, (depth, int(data.Rows), int(data.Columns)))


def _label_values(data: Any) -> dict[int, int] | None:
    """Segment number -> label value, if all descriptions say it; None: the numbers are the values."""
    found = {}
    for segment in data.SegmentSequence:
        number = int(segment.SegmentNumber)
        match = _VALUE.fullmatch(text(segment, "SegmentDescription"))
        if match is None and number:
            return None
        found[number] = int(match[1]) if match else 0
    return found if len(set(found.values())) == len(found) and max(found.values()) <= 65535 else None


def _mapped(frame: np.ndarray, values: dict[int, int]) -> np.ndarray:
    lookup = np.arange(max(int(frame.max()), *values) + 1, dtype=np.uint16)
    lookup[list(values)] = list(values.values())
    return lookup[frame]


def _segment_number(data: Any, groups: Any) -> int:
    shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
    return int(_group(groups, shared, "SegmentIdentification").ReferencedSegmentNumber)


def _overlapping(path: Path, data: Any, number: int) -> NotLabelsError:
    names = {int(s.SegmentNumber): text(s, "SegmentLabel") for s in data.SegmentSequence}
    return NotLabelsError(
        "This DICOM segmentation is not one label map",
        where=path,
        expected="segments that do not overlap",
        found=f"{names.get(number, f'segment {number}')}, which overlaps another of {len(names)} segments",
        remedy="Export the segments one by one, or to a labelmap (3D Slicer can)",
    )
