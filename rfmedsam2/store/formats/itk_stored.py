"""Reading what ITK reads wrongly: damaged compressed MetaImage and NRRD files, lists of data files, voxels as text.

ITK does not verify the checksums of compressed voxels, leaves planes undefined where an MHD lists too few files, and
refuses text that does not end with a space or a line break.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfmedsam2.errors import ImageError
from rfmedsam2.store.formats.decompression import CHUNK, damaged, fill, inflated, require_size
from rfmedsam2.store.formats.detached import data_files, metaimage_field
from rfmedsam2.store.formats.image_header import ImageHeader

METAIMAGE_ENDINGS = (".mha", ".mhd")
_HEADER_LIMIT = 1 << 16
_NRRD_HEADER_LIMIT = 1 << 20  # 3D Slicer describes every segment in the header
_NRRD_MAGIC = b"NRRD"
_LONG = ("MET_LONG", "MET_ULONG")  # of 4 bytes, wherever the file was written
_MILLIMETERS = ("mm", "millimeter", "millimeters", "millimetre", "none", "?", "???")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """Location and layout of stored voxels.

    Attributes:
        files: the files that hold them, equal shares in order.
        offset: first byte of the voxels, or of the compressed stream, in each file.
        compressed: whether each file is compressed with zlib or gzip.
        dtype: stored dtype, with byte order.
        shape: slowest axis first.
        channel_axis: index of the channel axis in `shape`; None if there are z, y, x only.
        text: whether the voxels are numbers in words.
        alone: whether nothing else lies in the files, such as other images with headers of their own.
    """

    files: tuple[Path, ...]
    offset: int
    compressed: bool
    dtype: np.dtype
    shape: tuple[int, ...]
    channel_axis: int | None
    text: bool = False
    alone: bool = True


def stored_voxels(path: Path, header: ImageHeader, *, components: int) -> np.ndarray | None:
    """Voxels (C,Z,Y,X) of an MHA, MHD or NRRD file that is compressed, text or lists its data files, else None.

    Args:
        path: the image file.
        header: header as read by ITK.
        components: components per voxel (channels as the fastest axis), 1 for scalar images.

    Raises:
        TruncatedImageError: voxels are missing, or a compressed stream is damaged.
    """
    metaimage = path.suffix.lower() in METAIMAGE_ENDINGS
    stored = _metaimage(path, header, components) if metaimage else _nrrd(path, header)
    if stored is None:
        return None
    size = math.prod(stored.shape) * stored.dtype.itemsize
    count = len(stored.files)
    if count not in [math.prod(stored.shape[:axes]) for axes in range(len(stored.shape))]:  # per volume, plane or line
        raise damaged(path, f"{count} data files for {' x '.join(map(str, stored.shape[::-1]))} voxels")
    read = _numbers_of if stored.text else _bytes_of
    parts = [read(file, stored, size // count) for file in stored.files]
    raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
    array = raw.view(stored.dtype).astype(header.dtype, copy=False).reshape(stored.shape)
    if stored.channel_axis is not None:
        array = np.moveaxis(array, stored.channel_axis, 0)
    return np.ascontiguousarray(array).reshape(header.channels, *header.grid.shape_zyx)


def _bytes_of(file: Path, stored: _Stored, size: int) -> np.ndarray:
    try:
        with file.open("rb") as stream:
            stream.seek(stored.offset)
            chunks = inflated(stream, file) if stored.compressed else iter(lambda: stream.read(CHUNK), b"")
            raw, found = fill(chunks, b"", size)
    except OSError as error:
        raise ImageError(f"The data file cannot be read ({error.strerror})", where=file) from error
    if stored.alone:
        require_size(file, found, size)
    elif found < size:
        raise damaged(file, f"{found} of {size} bytes of voxels")
    return raw


def _numbers_of(file: Path, stored: _Stored, size: int) -> np.ndarray:
    """Bytes of the voxels that a file holds as words."""
    try:
        words = file.read_bytes()[stored.offset :].split()
    except OSError as error:
        raise ImageError(f"The data file cannot be read ({error.strerror})", where=file) from error
    if len(words) * stored.dtype.itemsize != size:
        raise damaged(file, f"{len(words)} of {size // stored.dtype.itemsize} numbers")
    try:
        return np.array(words).astype(stored.dtype).view(np.uint8)
    except (ValueError, OverflowError) as error:
        raise ImageError("The voxels are not numbers of their type", where=file, found=error) from None


def metaimage_spacing(path: Path) -> list[float]:
    """ElementSpacing (or ElementSize), three numbers; 1.0 where the header has no valid number."""
    fields, _ = _metaimage_fields(path)
    text = fields.get("ElementSpacing") or fields.get("ElementSize") or ""
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    return [*numbers, 1.0, 1.0, 1.0][:3]


def states_spacing(path: Path, axes: int) -> bool:
    """Whether an MHA, MHD or NRRD header says how far apart voxels are along all axes; ITK takes 1 where not."""
    if path.suffix.lower() in METAIMAGE_ENDINGS:
        return not {"ElementSpacing", "ElementSize"}.isdisjoint(_metaimage_fields(path)[0])
    fields, _ = _nrrd_fields(path)
    words = fields.get("spacedirections", fields.get("spacings", "")).split()
    return sum(word.lower() not in ("nan", "none") for word in words) >= axes  # channels have none


def ignored_unit(path: Path) -> str | None:
    """The unit of length in an MHA, MHD or NRRD header if it is not the millimeter; ITK reads all lengths as mm."""
    if path.suffix.lower() in METAIMAGE_ENDINGS:
        text = _metaimage_fields(path)[0].get("DistanceUnits", "")
    else:
        fields, _ = _nrrd_fields(path)
        text = fields.get("spaceunits") or fields.get("units") or ""
    units = {unit for unit in text.replace('"', " ").split() if unit.lower() not in _MILLIMETERS}
    return ", ".join(sorted(units)).encode("latin-1").decode("utf-8", "replace") or None


def ignored_scaling(path: Path) -> str | None:
    """The intensity function of an MHA or MHD header, if it changes values; ITK does not apply it."""
    if path.suffix.lower() not in METAIMAGE_ENDINGS:
        return None
    fields, _ = _metaimage_fields(path)
    slope = fields.get("ElementToIntensityFunctionSlope", "1")
    offset = fields.get("ElementToIntensityFunctionOffset", "0")
    try:
        unchanged = (float(slope), float(offset)) == (1.0, 0.0)
    except ValueError:
        unchanged = False
    return None if unchanged else f"slope {slope}, offset {offset}"


def _metaimage(path: Path, header: ImageHeader, components: int) -> _Stored | None:
    fields, offset = _metaimage_fields(path)
    files = tuple(data_files(path))
    vector = components > 1
    shape = header.grid.shape_zyx
    shape = (*shape, components) if vector else (header.channels, *shape)
    stored = np.dtype("float64") if fields.get("ElementType") == "MET_DOUBLE" else np.dtype(header.dtype)
    compressed = _is_true(fields.get("CompressedData", ""))
    skipped = fields.get("HeaderSize", "0")
    text = not compressed and not _is_true(fields.get("BinaryData", "True"))
    if not compressed and not skipped.isdecimal():
        return None  # voxels at the end of a file
    if files:
        offset = 0 if compressed else int(skipped)
    one = files[0] if files else path
    several = len(files) > 1 or fields.get("ElementDataFile", "").upper().startswith("LIST")
    if not compressed and not several and not text:
        size, found = math.prod(shape) * stored.itemsize, one.stat().st_size - offset
        # several headers may share a data file; a 64-bit system's MET_LONG with 8 bytes per voxel is none of these
        alone = not files or (fields.get("ElementType") in _LONG and found == 2 * size)
        require_size(one, found if alone else min(found, size), size)
        return None
    most = any(_is_true(fields.get(k, "")) for k in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"))
    return _Stored(
        files=files or (path,),
        offset=offset,
        compressed=compressed,
        dtype=stored.newbyteorder(">" if most else "<"),
        shape=shape,
        channel_axis=3 if vector else 0,
        text=text,
        alone=compressed,
    )


def _nrrd(path: Path, header: ImageHeader) -> _Stored | None:
    fields, length = _nrrd_fields(path)
    attached = fields.keys().isdisjoint({"datafile", "lineskip", "byteskip"})
    stored = np.dtype("float64") if fields.get("type") == "double" else np.dtype(header.dtype)
    if length and attached and fields.get("encoding") == "raw":
        size = math.prod((header.channels, *header.grid.shape_zyx)) * stored.itemsize
        require_size(path, max(size, path.stat().st_size - length), size)  # ITK finds what is missing
    if not length or not attached or fields.get("encoding", "") not in ("gzip", "gz"):
        return None
    sizes = tuple(int(n) for n in fields["sizes"].split())
    kinds = fields.get("kinds", "").split() or ["domain"] * len(sizes)
    channels = [i for i, kind in enumerate(kinds) if kind not in ("domain", "space", "time")]
    if len(channels) > 1 or np.prod(sizes) != header.channels * np.prod(header.grid.shape_zyx):
        return None
    last = len(sizes) - 1
    return _Stored(
        files=(path,),
        offset=length,
        compressed=True,
        dtype=stored.newbyteorder(">" if fields.get("endian", "").strip() == "big" else "<"),
        shape=sizes[::-1],
        channel_axis=last - channels[0] if channels else None,
    )


def _metaimage_fields(path: Path) -> tuple[dict[str, str], int]:
    """Header fields of an MHA/MHD file, and the offset of its voxels."""
    fields, position = {}, 0
    for line in _head(path).split(b"\n"):
        position += len(line) + 1
        key, value = metaimage_field(line.decode("latin-1"))
        fields[key] = value
        if key == "ElementDataFile":
            break
    return fields, position


def _is_true(value: str) -> bool:
    """Whether MetaIO takes a field as true: it looks at the first letter."""
    return value[:1] in ("T", "t", "1")


def _nrrd_fields(path: Path) -> tuple[dict[str, str], int]:
    """Header fields of an NRRD file, and the length of its header with the blank line; 0 if there is no such line.

    Names of fields are in small letters and without blanks, since each may be written with either.
    """
    text, blank, head = b"", b"", b""
    for limit in (_HEADER_LIMIT, _NRRD_HEADER_LIMIT):
        text = head = _head(path, limit)  # a detached header needs no blank line
        ends = [(at, end) for end in (b"\n\n", b"\r\n\r\n") if (at := head.find(end)) >= 0]
        if ends:
            at, blank = min(ends)
            text = head[:at]
            break
    lines = text.decode("latin-1").splitlines()[1:]
    pairs = (line.split(": ", 1) for line in lines if ": " in line and not line.startswith("#"))
    fields = {name.lower().replace(" ", ""): value for name, value in pairs}
    return fields, len(text) + len(blank) if blank and head.startswith(_NRRD_MAGIC) else 0


def _head(path: Path, limit: int = _HEADER_LIMIT) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(limit)
    except OSError as error:
        raise ImageError(f"The file cannot be read ({error.strerror})", where=path) from error
