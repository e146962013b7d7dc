"""DICOM files: which files are DICOM, with or without preamble, and their elements read tolerantly.

Decimal and integer strings are parsed here and not by pydicom: real files hold spaces, NULs, decimal commas, Fortran
exponents and more than 16 characters, each with one possible meaning.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataset import FileDataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from rfmedsam2.errors import ImageError, RfMedSamError
from rfmedsam2.store.formats.image_header import parsing

_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")
_FIRST_VRS = {b"UL", b"CS", b"UI", b"DA", b"TM", b"LO", b"SH", b"OB", b"DT"}
_LONG_VRS = {b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN"}
_UNDEFINED = 0xFFFFFFFF
_PADDING = " \0\t\r\n"

_BINARY = {"US": ("H", 2), "SS": ("h", 2), "UL": ("I", 4), "SL": ("i", 4), "FL": ("f", 4), "FD": ("d", 8)}
"""Format letter of `struct` and bytes per value of each binary VR."""

_NO_SCANNERS = {"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC"}
"""Modalities of files that were made from images, and may lie beside them."""

_TEXT = {"DS", "IS", "LO", "SH", "CS", "ST", "LT", "UT", "UC"}
"""VRs of text that may hold numbers."""

_KEYWORDS = (
    "SpecificCharacterSet SOPClassUID SOPInstanceUID ImageType Modality SeriesDescription SliceThickness "
    "SpacingBetweenSlices SeriesInstanceUID AcquisitionNumber ImagePositionPatient ImageOrientationPatient "
    "SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames FrameIncrementPointer Rows "
    "Columns PixelSpacing BitsAllocated BitsStored HighBit PixelRepresentation RescaleIntercept RescaleSlope "
    "ModalityLUTSequence RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor "
    "BluePaletteColorLookupTableDescriptor RedPaletteColorLookupTableData GreenPaletteColorLookupTableData "
    "BluePaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData "
    "SegmentedGreenPaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData DetectorInformationSequence "
    "SliceVector SliceLocationVector GridFrameOffsetVector DoseGridScaling SegmentSequence "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
)
_TAGS: list[Any] = [Tag(keyword) for keyword in _KEYWORDS.split()]


class NativePixels(NamedTuple):
    """Where a file holds uncompressed pixel values: first byte, length in bytes, element number in group 7FE0."""

    start: int
    length: int
    element: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """The elements of a file that matter for its voxels and their place.

    Attributes:
        path: the file.
        data: the elements; pixels are not among them.
        native: where uncompressed pixel values lie; None for other pixels.
        size: bytes of the file.
        has_pixels: whether there are pixels of any kind.
    """

    path: Path
    data: FileDataset
    native: NativePixels | None
    size: int
    has_pixels: bool

    @property
    def label(self) -> str:
        """Modality and description of the series, for messages."""
        return f"{text(self.data, 'Modality') or '?'} {text(self.data, 'SeriesDescription') or 'without description'}"


def is_dicom_file(path: Path) -> bool:
    """Whether a file has DICOM's magic bytes, or starts with the elements that a file without preamble starts with."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as stream:
            start = stream.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or _starts_with_elements(start)


def _starts_with_elements(start: bytes) -> bool:
    """Whether bytes look like the first elements of group 0002 or 0008, in any of the three encodings."""
    if len(start) < 20 or start[:2] not in _FIRST_GROUPS:
        return False
    order = "big" if start[0] == 0 else "little"
    if int.from_bytes(start[2:4], order) > 0x18:
        return False
    if start[4:6] in _FIRST_VRS:
        return True
    length = int.from_bytes(start[4:8], "little")
    # implicit: the next element follows, of the same group
    return start[:2] == b"\x08\x00" and length <= 100 and length % 2 == 0 and start[8 + length :][:2] == b"\x08\x00"


def is_dicom_folder(path: Path) -> bool:
    """Whether a folder holds at least one DICOM file."""
    return path.is_dir() and any(is_dicom_file(file) for file in path.iterdir())


def dicom_files(path: Path) -> list[Path]:
    """The DICOM files of a folder, or the file itself."""
    if path.is_dir():
        return sorted(f for f in path.iterdir() if is_dicom_file(f))
    return [path]


def read_dicom_file(path: Path) -> DicomFile:
    """Read the elements of a DICOM file, and where its pixels are.

    Raises:
        ImageError: the file is damaged.
    """
    with parsing(path), path.open("rb") as stream:
        data = pydicom.dcmread(stream, force=True, stop_before_pixels=True, specific_tags=_TAGS)
        deflated = syntax_of(data) == DeflatedExplicitVRLittleEndian
        return DicomFile(
            path=path,
            data=data,
            native=None if deflated else _native_pixels(stream, data),
            size=os.fstat(stream.fileno()).st_size,
            has_pixels=deflated or len(stream.read(1)) > 0,
        )


def modality_of(path: Path) -> str | None:
    """Modality (CT, MR, PT ...) of a DICOM file, or of the first file of a series folder that is an image.

    Returns:
        None for other formats, where it is missing, and for a damaged file, which its reader reports.
    """
    for file in filter(is_dicom_file, dicom_files(path)):
        try:
            found = text(read_dicom_file(file).data, "Modality").upper()
        except RfMedSamError:
            return None
        if found not in _NO_SCANNERS:
            return found or None
    return None


def syntax_of(data: FileDataset) -> str:
    """UID of the transfer syntax; empty if the file does not state it."""
    return str(data.file_meta.get("TransferSyntaxUID") or "")


def _native_pixels(stream: BinaryIO, data: FileDataset) -> NativePixels | None:
    """Where uncompressed values lie; the stream stands where reading stopped before the pixels."""
    implicit, little = data.original_encoding
    order = "little" if little else "big"
    start = stream.tell()
    head = stream.read(12)
    stream.seek(start)
    if len(head) < 8 or head[:2] != (0x7FE0).to_bytes(2, order):
        return None
    long = not implicit and head[4:6] in _LONG_VRS
    length = int.from_bytes(head[8:12] if long else head[4:8] if implicit else head[6:8], order)
    if length == _UNDEFINED:
        return None
    return NativePixels(start + (12 if long else 8), length, int.from_bytes(head[2:4], order))


def text(data: Any, keyword: str) -> str:
    """Value of a text element without padding; empty if it is missing or empty."""
    element = data.get_item(_tag(keyword))
    value = None if element is None else element.value
    return value.decode("utf-8", "replace").strip(_PADDING) if isinstance(value, bytes) else str(value or "")


def numbers(data: Any, keyword: str, *, where: object) -> tuple[float, ...]:
    """Values of a number element, whatever its VR; () if it is missing or empty.

    Raises:
        ImageError: text that is not a number, or is not finite.
    """
    element = data.get_item(_tag(keyword))
    if element is None or element.value in (None, "", b""):
        return ()
    try:
        found = _raw_numbers(element) if isinstance(element.value, bytes) else _listed(element.value)
    except (struct.error, TypeError, ValueError):
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise ImageError(
            f"{keyword} of the DICOM file is not a number",
            where=where,
            found=repr(text(data, keyword)[:80]),
            remedy="Correct this element, or export the file again",
        )
    return found


@cache
def _tag(keyword: str) -> BaseTag:
    return Tag(keyword)


_known_vr = cache(dictionary_VR)


def _raw_numbers(element: Any) -> tuple[float, ...]:
    """Values of an element whose bytes pydicom has not converted."""
    # no VR, or UN: what the dictionary says
    vr = element.VR if element.VR in _BINARY or element.VR in _TEXT else _known_vr(element.tag)
    if vr in _BINARY:
        kind, size = _BINARY[vr]
        order = "<" if element.is_little_endian else ">"
        return struct.unpack(f"{order}{len(element.value) // size}{kind}", element.value)
    written = element.value.decode("ascii").strip(_PADDING)
    return tuple(_number(part) for part in written.split("\\")) if written else ()


def _listed(value: Any) -> tuple[float, ...]:
    several = hasattr(value, "__iter__") and not isinstance(value, str)
    return tuple(float(part) for part in value) if several else (float(value),)


def _number(written: str) -> float:
    """A number; a decimal comma and Fortran's exponent D have one possible meaning only."""
    try:
        return float(written.strip(_PADDING))
    except ValueError:
        plain = written.strip(_PADDING).replace(" ", "").lower().replace("d", "e")
        return float(plain if "." in plain else plain.replace(",", ".", 1))


def number(data: Any, keyword: str, default: float, *, where: object) -> float:
    """The value of a number element; the default if it is missing or empty.

    Raises:
        ImageError: no number, or several different ones.
    """
    values = set(numbers(data, keyword, where=where))
    if len(values) > 1:
        raise ImageError(f"{keyword} of the DICOM file has several values", where=where, expected="one", found=values)
    return values.pop() if values else default


def whole_number(data: Any, keyword: str, default: int, *, where: object) -> int:
    """The value of an integer element; the default if it is missing or empty.

    Raises:
        ImageError: no whole number, or several different ones.
    """
    value = number(data, keyword, default, where=where)
    if not float(value).is_integer():
        raise ImageError(f"{keyword} of the DICOM file is not a whole number", where=where, found=value)
    return int(value)
