"""Decompressing MetaImage and NRRD files with their checksums verified, which ITK does not do.

ITK reads a damaged compressed file of either format without an error and returns wrong voxels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfmedsam2.errors import ImageError
from rfmedsam2.store.formats.decompression import damaged, fill, inflated
from rfmedsam2.store.formats.image_header import ImageHeader

METAIMAGE_ENDINGS = (".mha", ".mhd")
_HEADER_LIMIT = 1 << 16
_NRRD_HEADER_LIMIT = 1 << 20  # 3D Slicer describes every segment in the header
_NRRD_MAGIC = b"NRRD"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compressed:
    """Location and layout of compressed voxels.

    Attributes:
        file: the file that holds them.
        offset: first byte of the compressed stream.
        dtype: stored dtype, with byte order.
        shape: slowest axis first.
        channel_axis: index of the channel axis in `shape`; None if there are z, y, x only.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    channel_axis: int | None


def compressed_voxels(path: Path, header: ImageHeader, *, components: int) -> np.ndarray | None:
    """Voxels (C,Z,Y,X) of a compressed MHA, MHD or NRRD file; None if the file is not compressed with zlib or gzip.

    Args:
        path: the image file.
        header: header as read by ITK.
        components: components per voxel (channels as the fastest axis), 1 for scalar images.

    Raises:
        TruncatedImageError: the stream is damaged or too short, or an uncompressed MHA ends early.
    """
    metaimage = path.suffix.lower() in METAIMAGE_ENDINGS
    packed = _metaimage(path, header, components) if metaimage else _nrrd(path, header)
    if packed is None:
        return None
    size = int(np.prod(packed.shape, dtype=np.int64)) * packed.dtype.itemsize
    try:
        with packed.file.open("rb") as stream:
            stream.seek(packed.offset)
            raw, found = fill(inflated(stream, packed.file), b"", size)
    except OSError as error:
        raise ImageError(f"The data file cannot be read ({error.strerror})", where=packed.file) from error
    if found < size:
        raise damaged(packed.file, f"{found} of {size} bytes of voxels")
    array = raw.view(packed.dtype).astype(header.dtype, copy=False).reshape(packed.shape)
    if packed.channel_axis is not None:
        array = np.moveaxis(array, packed.channel_axis, 0)
    return np.ascontiguousarray(array).reshape(header.channels, *header.grid.shape_zyx)


def metaimage_spacing(path: Path) -> list[float]:
    """ElementSpacing (or ElementSize), three numbers; 1.0 where the header has no valid number."""
    fields, _ = _metaimage_fields(path)
    text = fields.get("ElementSpacing") or fields.get("ElementSize") or ""
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    return [*numbers, 1.0, 1.0, 1.0][:3]


def _metaimage(path: Path, header: ImageHeader, components: int) -> _Compressed | None:
    fields, offset = _metaimage_fields(path)
    data = fields.get("ElementDataFile", "")
    local = data.upper() == "LOCAL"
    vector = components > 1
    shape = header.grid.shape_zyx
    shape = (*shape, components) if vector else (header.channels, *shape)
    stored = np.dtype("float64") if fields.get("ElementType") == "MET_DOUBLE" else np.dtype(header.dtype)
    if fields.get("CompressedData", "").lower() != "true":
        size = int(np.prod(shape, dtype=np.int64)) * stored.itemsize
        if local and path.stat().st_size - offset < size:
            raise damaged(path, f"{path.stat().st_size - offset} of {size} bytes of voxels")
        return None
    if data == "LIST" or "%" in data:
        return None
    most = (fields.get(k, "").lower() for k in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"))
    return _Compressed(
        file=path if local else path.parent / data,
        offset=offset if local else 0,
        dtype=stored.newbyteorder(">" if "true" in most else "<"),
        shape=shape,
        channel_axis=3 if vector else 0,
    )


def _nrrd(path: Path, header: ImageHeader) -> _Compressed | None:
    fields, length = _nrrd_fields(path)
    attached = not {"data file", "datafile", "line skip", "byte skip", "lineskip", "byteskip"} & fields.keys()
    if not length or not attached or fields.get("encoding", "") not in ("gzip", "gz"):
        return None
    sizes = tuple(int(n) for n in fields["sizes"].split())
    kinds = fields.get("kinds", "").split() or ["domain"] * len(sizes)
    channels = [i for i, kind in enumerate(kinds) if kind not in ("domain", "space", "time")]
    if len(channels) > 1 or np.prod(sizes) != header.channels * np.prod(header.grid.shape_zyx):
        return None
    stored = np.dtype("float64") if fields.get("type") == "double" else np.dtype(header.dtype)
    last = len(sizes) - 1
    return _Compressed(
        file=path,
        offset=length,
        dtype=stored.newbyteorder(">" if fields.get("endian", "").strip() == "big" else "<"),
        shape=sizes[::-1],
        channel_axis=last - channels[0] if channels else None,
    )


def _metaimage_fields(path: Path) -> tuple[dict[str, str], int]:
    """Header fields of an MHA/MHD file, and the offset of its voxels."""
    fields, position = {}, 0
    for line in _head(path).split(b"\n"):
        position += len(line) + 1
        key, _, value = line.decode("latin-1").partition("=")
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            break
    return fields, position


def _nrrd_fields(path: Path) -> tuple[dict[str, str], int]:
    """Header fields of an NRRD file, and the length of its header with the blank line; 0 if there is no such line."""
    head = _head(path, _NRRD_HEADER_LIMIT)
    text, blank, _ = head.partition(b"\n\n")
    if not blank:
        text, blank, _ = head.partition(b"\r\n\r\n")
    lines = text.decode("latin-1").splitlines()[1:]
    fields = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith("#"))
    return fields, len(text) + len(blank) if blank and head.startswith(_NRRD_MAGIC) else 0


def _head(path: Path, limit: int = _HEADER_LIMIT) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(limit)
    except OSError as error:
        raise ImageError(f"The file cannot be read ({error.strerror})", where=path) from error
