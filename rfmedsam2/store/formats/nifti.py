"""NIfTI-1 and NIfTI-2, plain or gzipped: read in one pass into the array, written with the source's header.

nibabel parses the header (it accepts directions that other readers reject); the voxels are decompressed here, because
a gzip checksum is only verified by reading to the end of the file.
"""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from rfmedsam2.errors import ImageError
from rfmedsam2.geometry import flattened
from rfmedsam2.store.formats.decompression import chunks_of, damaged, fill, is_gzip, require_size
from rfmedsam2.store.formats.image_header import ImageHeader, NiftiGeometry, repaired, require_memory
from rfmedsam2.store.formats.nifti_placement import is_flat, placement

_LARGEST_RATIO = 1100  # deflate's largest compression ratio is 1032


def read_nifti_header(path: Path) -> ImageHeader:
    """Read the header of a NIfTI file; at most one chunk of the file is decompressed.

    Raises:
        TruncatedImageError: the file is too small for the voxels that its header promises.
        ImageError: not NIfTI, or a data type other than integers and floats.
        GeometryError: invalid spacing or direction.
    """
    with closing(chunks_of(path)) as chunks:
        raw, _ = _raw_header(path, chunks)
    header = _image_header(path, raw)
    _ = _data_size(path, raw, header)
    return header


def read_nifti(path: Path) -> tuple[np.ndarray, ImageHeader]:
    """Read voxels (C,Z,Y,X) and header of a NIfTI file. Scaled data and float64 become float32, integer types stay.

    Raises:
        TruncatedImageError: fewer voxels than the header promises, or a damaged gzip stream.
        ImageError: not NIfTI, or a data type other than integers and floats.
        GeometryError: invalid spacing or direction.
    """
    with closing(chunks_of(path)) as chunks:
        raw, first = _raw_header(path, chunks)
        header = _image_header(path, raw)
        dtype = raw.get_data_dtype()
        shape = (header.channels, *header.grid.shape_zyx)
        offset, size = _data_size(path, raw, header)
        require_memory(path, header, extra=size if header.dtype != dtype.name else 0)
        while len(first) < offset and (more := next(chunks, None)) is not None:
            first += more
        data, found = fill(chunks, first[offset:], size)
    require_size(path, found, size)
    array = data.view(dtype).reshape(shape)
    if not dtype.isnative:
        array = array.byteswap(inplace=True).view(dtype.newbyteorder("="))
    return _scaled(array, raw, header.dtype), header


def write_nifti_label(
    path: Path, labels_zyx: np.ndarray, header: ImageHeader, extension: tuple[int, bytes] | None = None
) -> None:
    """Write labels (Z,Y,X), uint8 or uint16, as NIfTI at `path` (not atomic). A NIfTI source's header is kept.

    The bytes depend on the arguments only (no time stamp). A header extension is a code of the standard and a content.
    """
    raw = label_header(header, labels_zyx)
    extra = b"" if extension is None else _extension(*extension)
    raw["vox_offset"] = len(raw.binaryblock) + 4 + len(extra)
    block = raw.binaryblock + (b"\1\0\0\0" if extra else b"\0\0\0\0") + extra
    voxels = np.ascontiguousarray(labels_zyx, dtype=raw.get_data_dtype()).data.cast("B")
    with path.open("wb") as stream:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", compresslevel=3, fileobj=stream, mtime=0) as packed:
                packed.write(block)
                packed.write(voxels)
        else:
            stream.write(block)
            stream.write(voxels)


def _extension(code: int, content: bytes) -> bytes:
    size = -(-(8 + len(content)) // 16) * 16
    return struct.pack("<ii", size, code) + content.ljust(size - 8, b"\0")


def _raw_header(path: Path, chunks: Iterator[bytes]) -> tuple[Nifti1Header, bytes]:
    """The header parsed by nibabel, and the bytes read so far."""
    first = b""
    while len(first) < 544 and (more := next(chunks, None)) is not None:
        first += more
    for kind, size in ((Nifti1Header, 348), (Nifti2Header, 540)):
        lengths = {int.from_bytes(first[:4], "little"), int.from_bytes(first[:4], "big")}
        if len(first) >= size and size in lengths:
            raw = kind(binaryblock=first[:size], check=False)
            if not bytes(raw["magic"]).startswith((b"n+1", b"n+2")):
                break
            return raw, first
    if len(first) < 348:
        raise damaged(path, f"{len(first)} bytes, less than a NIfTI header")
    raise ImageError(
        "The file is not a single-file NIfTI image",
        where=path,
        expected="a header of 348 or 540 bytes with the magic n+1 or n+2",
        found=f"bytes {first[:4].hex()} ...",
        remedy="Check what wrote the file; convert it to NIfTI",
    )


def _data_size(path: Path, raw: Nifti1Header, header: ImageHeader) -> tuple[int, int]:
    """Offset and size of the voxels in bytes.

    Raises:
        TruncatedImageError: the file is too small for them, also if it is compressed.
    """
    size = header.channels * math.prod(header.grid.shape_zyx) * raw.get_data_dtype().itemsize
    offset = int(raw.get_data_offset())
    if offset < raw.sizeof_hdr:  # ITK begins behind the header, nibabel within it
        raise ImageError(
            "The NIfTI header says that the voxels begin within it",
            where=path,
            expected=f"a vox_offset of {raw.sizeof_hdr + 4} or more",
            found=offset,
            remedy="Correct vox_offset, or convert the file again",
        )
    stored = path.stat().st_size
    if offset + size > stored * (_LARGEST_RATIO if is_gzip(path) else 1):
        raise damaged(path, f"{stored} bytes, and a header that promises {size} bytes of voxels")
    return offset, size


def _image_header(path: Path, raw: Nifti1Header) -> ImageHeader:
    shape_xyz, channels = _shape(path, raw)
    placed = placement(path, raw, shape_xyz)
    straight, skew = repaired(placed.grid, where=path)
    source, flat = placed.grid, is_flat(raw)
    if flat:
        straight = flattened(source)
        source = replace(source, spacing_zyx_mm=straight.spacing_zyx_mm)
    native = raw.as_byteswapped("<")
    return ImageHeader(
        grid=straight,
        source_grid=source,
        channels=channels,
        dtype=_dtype(path, raw),
        format="nifti",
        skew_degrees=skew,
        flat=flat,
        nifti=NiftiGeometry(
            block=native.binaryblock,
            sform_code=int(raw["sform_code"]),
            qform_code=int(raw["qform_code"]),
            nibabel=placed.nibabel,
            itk=placed.itk,
            mirrored=placed.mirrored,
            unit_mm=placed.unit_mm,
            unit_known=int(raw["xyzt_units"]) & 7 != 0,
            scaling=_scaling(raw),
        ),
    )


def _shape(path: Path, raw: Nifti1Header) -> tuple[tuple[int, int, int], int]:
    """Voxels along x, y, z, and channels: (x,y), (x,y,z), (x,y,z,c) or (x,y,z,1,c)."""
    dims = [int(n) for n in raw.get_data_shape()]
    while len(dims) < 3:
        dims.append(1)
    dims = [*dims[:3], *(n or 1 for n in dims[3:])]  # 0: "not used", as ITK takes it
    rest = [n for n in dims[3:] if n != 1]
    if min(dims) < 1 or len(rest) > 1:
        raise ImageError(
            "The shape of the image is not supported",
            where=path,
            expected="2 to 3 axes, and at most one more for channels",
            found=tuple(dims),
            remedy="Check what wrote the file" if min(dims) < 1 else "Split the file into one volume each",
        )
    return (dims[0], dims[1], dims[2]), (rest[0] if rest else 1)


def _dtype(path: Path, raw: Nifti1Header) -> str:
    try:
        dtype = raw.get_data_dtype()
    except HeaderDataError:
        dtype = np.dtype("V0")
    if dtype.kind not in "iuf":
        raise ImageError(
            "The image's data type is not supported",
            where=path,
            expected="integers or floating point",
            found=f"NIfTI data type {int(raw['datatype'])} ({dtype})",
            remedy="Store colors or complex parts as channels",
        )
    return "float32" if dtype.kind == "f" or _scaling(raw) is not None else dtype.newbyteorder("=").name


def _scaling(raw: Nifti1Header) -> tuple[float, float] | None:
    """Slope and intercept; None if voxels are not scaled (a slope that is 0 or not finite is NIfTI's "not used")."""
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if not np.isfinite(slope) or slope == 0:
        return None
    intercept = intercept if np.isfinite(intercept) else 0.0
    return None if (slope, intercept) == (1.0, 0.0) else (slope, intercept)


def _scaled(array: np.ndarray, raw: Nifti1Header, dtype: str) -> np.ndarray:
    scaling = _scaling(raw)
    if scaling is None:
        return array.astype(dtype, copy=False)
    result = np.empty(array.shape, dtype=np.float32)
    for channel, out in zip(array, result, strict=True):
        for plane, out_plane in zip(channel, out, strict=True):  # in double precision, one plane at a time
            out_plane[...] = plane.astype(np.float64) * scaling[0] + scaling[1]
    return result


LONGEST_AXIS = 2**15 - 1
"""Most voxels along an axis of NIfTI-1."""


def label_header(header: ImageHeader, labels_zyx: np.ndarray) -> Nifti1Header:
    """NIfTI header of labels (Z,Y,X) for an image: of a NIfTI source the affines with their codes, pixdim and units."""
    shape_xyz = labels_zyx.shape[::-1]
    stored_shape = shape_xyz[:2] if header.flat else shape_xyz
    kind = Nifti1Header if max(stored_shape) <= LONGEST_AXIS else Nifti2Header
    if header.nifti is None:
        raw = kind(endianness="<")
        raw.set_data_shape(stored_shape)
        # a quaternion can only represent perpendicular axes; the sform keeps the source's
        raw.set_qform(header.grid.affine_ras, code=1)
        raw.set_sform(header.source_grid.affine_ras, code=1)
        raw.set_xyzt_units("mm")
    else:
        kind = Nifti1Header if len(header.nifti.block) == 348 else Nifti2Header
        raw = kind(binaryblock=header.nifti.block, endianness="<", check=False)
        pixdim = np.array(raw["pixdim"])
        raw.set_data_shape(stored_shape)
        raw["pixdim"] = pixdim
        _make_qform_valid(raw)
        for text in ("descrip", "aux_file", "intent_name"):
            raw[text] = b""
        for number in ("intent_code", "cal_min", "cal_max", "slice_code", "slice_start", "slice_end", "dim_info"):
            raw[number] = 0
    raw.set_data_dtype(labels_zyx.dtype)
    raw["magic"] = b"n+1" if len(raw.binaryblock) == 348 else raw["magic"]
    raw["vox_offset"] = len(raw.binaryblock) + 4
    raw["scl_slope"], raw["scl_inter"] = 1, 0
    return raw


def _make_qform_valid(raw: Nifti1Header) -> None:
    """Keep a qform's meaning in a form that every program accepts: a qfac of 1 or -1, a quaternion of length 1."""
    if int(raw["qform_code"]) <= 0:
        return
    pixdim = np.array(raw["pixdim"])
    if abs(float(pixdim[0])) != 1:
        pixdim[0] = -1 if pixdim[0] < 0 else 1
        raw["pixdim"] = pixdim
    bcd = np.array([float(raw[f"quatern_{letter}"]) for letter in "bcd"])
    squared, rounding = float(bcd @ bcd), float(np.finfo(np.float32).eps)
    if squared > 1 + 3 * rounding:  # nibabel's tolerance; ITK turns the axes if it is too short by more than 1e-7
        for letter, value in zip("bcd", bcd / np.sqrt(squared) * (1 + rounding / 2), strict=True):
            raw[f"quatern_{letter}"] = value
