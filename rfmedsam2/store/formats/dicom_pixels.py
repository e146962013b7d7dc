"""Stored pixel values of DICOM files, before any rescaling.

Uncompressed values are read straight from their place in the file. Compressed ones are decoded by GDCM, which comes
with SimpleITK, from a copy without rescaling and geometry, so that nothing but the stored values comes out; what GDCM
cannot decode goes to pydicom.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pixel_array
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
    SecondaryCaptureImageStorage,
    UncompressedTransferSyntaxes,
    generate_uid,
)

from rfmedsam2.errors import ImageError
from rfmedsam2.simpleitk import sitk
from rfmedsam2.store.formats.dicom_files import DicomFile, NativePixels, syntax_of, text, whole_number
from rfmedsam2.store.formats.image_header import TruncatedImageError

_BYTES = {1: 1, 8: 1, 16: 2, 32: 4, 64: 8}
"""Bytes per value in memory by BitsAllocated."""

_FLOATS = {0x0008: "f4", 0x0009: "f8"}
"""Element numbers of FloatPixelData and DoubleFloatPixelData."""

_OF_GDCM = {*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, JPEG2000Lossless, JPEG2000, RLELossless}
"""Transfer syntaxes that GDCM decodes."""

_IMAGE_PIXEL = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelFormat:
    """How the pixel values of a file are stored (Image Pixel module, PS3.3 C.7.6.3).

    Attributes:
        file: the file.
        native: where uncompressed values lie; None if they must be decoded.
        frames: number of frames.
        size_yx: rows and columns.
        samples: values per pixel.
        dtype: type of the stored values, in this machine's byte order.
        bits_stored: how many bits of each value count.
        high_bit: the highest of them, counted from 0.
        palette: whether values are indices of a color table.
    """

    file: DicomFile
    native: NativePixels | None
    frames: int
    size_yx: tuple[int, int]
    samples: int
    dtype: np.dtype
    bits_stored: int
    high_bit: int
    palette: bool

    @property
    def value_range(self) -> tuple[int, int]:
        """Smallest and largest value that the stored bits can hold."""
        if self.dtype.kind == "i":
            return -(2 ** (self.bits_stored - 1)), 2 ** (self.bits_stored - 1) - 1
        return 0, 2**self.bits_stored - 1


def pixel_format(file: DicomFile) -> PixelFormat:
    """The pixel format of a file.

    Raises:
        ImageError: no pixels, or an impossible format.
    """
    data, path = file.data, file.path
    if not file.has_pixels:
        raise TruncatedImageError(
            "The DICOM file ends before its pixels", where=path, remedy="Copy or export the file again"
        )
    dtype, allocated, stored, high = _bits(file)
    size = tuple(whole_number(data, keyword, 0, where=path) for keyword in ("Rows", "Columns"))
    frames = whole_number(data, "NumberOfFrames", 1, where=path)
    samples = whole_number(data, "SamplesPerPixel", 1, where=path)
    if min(*size, frames, samples) < 1:
        found = f"Rows, Columns {size}, NumberOfFrames {frames}, SamplesPerPixel {samples}"
        raise ImageError("The DICOM file has no pixels", where=path, found=found)
    photometric = text(data, "PhotometricInterpretation")
    # two of three values of a pixel are shared with its neighbor
    least = frames * size[0] * size[1] * samples * allocated // 8 * 2 // (3 if "422" in photometric else 2)
    native = file.native
    if native and native.length < least and syntax_of(data) not in ("", *UncompressedTransferSyntaxes):
        native = None  # some programs state the length of compressed pixels
    _check_length(file, native, frames, least)
    return PixelFormat(
        file=file,
        native=native,
        frames=frames,
        size_yx=(size[0], size[1]),
        samples=samples,
        dtype=dtype,
        bits_stored=stored,
        high_bit=high,
        palette=samples == 1 and photometric.startswith("PALETTE"),
    )


def _bits(file: DicomFile) -> tuple[np.dtype, int, int, int]:
    """Type of the stored values, bits per value in the file, bits that count, and the highest of them."""
    data, path = file.data, file.path
    floating = _FLOATS.get(file.native.element) if file.native else None
    if floating:
        dtype = np.dtype(floating)
        bits = 8 * dtype.itemsize
        return dtype, bits, bits, bits - 1
    allocated = whole_number(data, "BitsAllocated", 0, where=path)
    if allocated not in _BYTES:
        raise ImageError(
            "BitsAllocated of the DICOM file is not known", where=path, expected=[*_BYTES], found=allocated
        )
    stored = whole_number(data, "BitsStored", allocated, where=path)
    high = whole_number(data, "HighBit", stored - 1, where=path)
    if not 1 <= stored <= high + 1 <= allocated:
        raise ImageError(
            "The bits of a pixel in the DICOM file contradict each other",
            where=path,
            expected="BitsStored <= HighBit + 1 <= BitsAllocated",
            found=f"{stored}, {high} + 1, {allocated}",
        )
    kind = "i" if whole_number(data, "PixelRepresentation", 0, where=path) == 1 else "u"
    return np.dtype(f"{kind}{_BYTES[allocated]}"), allocated, stored, high


def _check_length(file: DicomFile, native: NativePixels | None, frames: int, least: int) -> None:
    """Refuse a file that is too short for its pixels, before anything is made for each of its frames.

    Args:
        file: the file.
        native: where uncompressed pixels lie.
        frames: number of frames; each takes at least one byte, however compressed.
        least: bytes of uncompressed pixels.
    """
    found = min(native.length, max(0, file.size - native.start)) if native else file.size
    if found < (least if native else frames):
        raise TruncatedImageError(
            "The DICOM file ends early, or its pixel data are too short",
            where=file.path,
            expected=f"{least if native else frames} bytes of pixels",
            found=found,
            remedy="Copy or export the file again",
        )


def stored_values(layout: PixelFormat, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the values of the frames, each (Y,X), or (Y,X,samples) and in RGB for color.

    Raises:
        TruncatedImageError: the file ends early.
        ImageError: the compression is not supported, or the data are damaged.
    """
    if _is_plain(layout):
        yield from (_significant(_plain_frame(layout, frame), layout) for frame in frames)
        return
    shape = (layout.frames, *layout.size_yx, *((layout.samples,) if layout.samples > 1 else ()))
    values = np.asarray(_decoded(layout))
    if values.size != np.prod(shape):
        raise ImageError(
            "The DICOM file does not hold the pixels that its header states",
            where=layout.file.path,
            expected=f"{shape} (frames, y, x, values)",
            found=values.shape,
        )
    values = values.reshape(shape).astype(layout.dtype, copy=not values.flags.writeable)
    yield from (_significant(values[frame], layout) for frame in frames)


def _is_plain(layout: PixelFormat) -> bool:
    """Whether values can be read as they lie in the file."""
    native = layout.native
    if native is None or layout.samples > 1 or whole_number(layout.file.data, "BitsAllocated", 0, where="") == 1:
        return False
    # single bytes of a big-endian file may be stored in swapped pairs
    return layout.file.data.original_encoding[1] or layout.dtype.itemsize > 1


def _plain_frame(layout: PixelFormat, frame: int) -> np.ndarray:
    native = layout.native
    assert native is not None
    rows, columns = layout.size_yx
    count = rows * columns
    order = "<" if layout.file.data.original_encoding[1] else ">"
    start = native.start + frame * count * layout.dtype.itemsize
    values = np.fromfile(layout.file.path, layout.dtype.newbyteorder(order), count, offset=start)
    if len(values) < count:
        raise TruncatedImageError("The DICOM file became shorter while it was read", where=layout.file.path)
    return values.astype(layout.dtype, copy=False).reshape(rows, columns)


def _significant(values: np.ndarray, layout: PixelFormat) -> np.ndarray:
    """The values without bits that do not belong to them (overlays of old files), with their sign; changes `values`."""
    unused = 8 * layout.dtype.itemsize - layout.bits_stored
    if layout.dtype.kind == "f" or not unused:
        return values
    above = 8 * layout.dtype.itemsize - 1 - layout.high_bit
    if layout.dtype.kind == "u" and above == unused:
        values &= 2**layout.bits_stored - 1
    else:
        values <<= above
        values >>= unused  # repeats the sign
    return values


def _decoded(layout: PixelFormat) -> np.ndarray:
    """All frames of a file whose values do not lie there as they are."""
    path = layout.file.path
    data = pydicom.dcmread(path, force=True)
    if "PixelData" not in data:
        raise TruncatedImageError(
            "The DICOM file ends within its pixels", where=path, remedy="Copy or export the file again"
        )
    if not syntax_of(data):
        implicit, little = data.original_encoding
        syntax = (ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian) if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = syntax
    if layout.palette:
        data.PhotometricInterpretation = "MONOCHROME2"
    syntax = UID(syntax_of(data))
    if data["PixelData"].is_undefined_length and syntax in UncompressedTransferSyntaxes:
        raise ImageError(
            "The pixels of the DICOM file are compressed, but its transfer syntax is not",
            where=path,
            found=syntax.name,
            remedy="Correct the transfer syntax, or export the file again",
        )
    if syntax in _OF_GDCM and not (syntax == RLELossless and _is_hard_rle(layout)):
        with suppress(RuntimeError):
            return _decoded_by_gdcm(data)
    try:
        return pixel_array(data)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ImageError(
            f"The pixels of the DICOM file cannot be decoded ({syntax.name})",
            where=path,
            found="damaged data" if syntax in _OF_GDCM else str(error).strip().splitlines()[0][:200],
            remedy="Copy or export the file again"
            + ("" if syntax in _OF_GDCM else ", or decompress it (dcmdjpeg, dcmdjp2k, gdcmconv --raw)"),
        ) from error


def _is_hard_rle(layout: PixelFormat) -> bool:
    """Whether GDCM refuses run lengths (odd number of pixels) or mixes them up (colors of more than 8 bits)."""
    return layout.size_yx[0] * layout.size_yx[1] % 2 == 1 or (layout.samples > 1 and layout.dtype.itemsize > 1)


def _decoded_by_gdcm(data: Any) -> np.ndarray:
    """Decode a copy that holds pixels and nothing that ITK would apply to them."""
    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = data.file_meta.TransferSyntaxUID
    bare.SOPClassUID = SecondaryCaptureImageStorage
    bare.SOPInstanceUID = generate_uid()
    for keyword in _IMAGE_PIXEL:
        if keyword in data:
            bare[keyword] = data[keyword]
    if str(data.get("PhotometricInterpretation")) == "MONOCHROME1":
        bare.PhotometricInterpretation = "MONOCHROME2"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pixels.dcm"
        bare.save_as(path, enforce_file_format=True)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
