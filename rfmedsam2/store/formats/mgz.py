"""FreeSurfer's MGH and MGZ volumes, through nibabel."""

from __future__ import annotations

import math
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.freesurfer.mghformat import MGHError, MGHImage
from nibabel.spatialimages import HeaderDataError

from rfmedsam2.errors import ImageError
from rfmedsam2.geometry import MAX_SKEW_DEGREES, Grid
from rfmedsam2.store.formats.decompression import chunks_of, damaged
from rfmedsam2.store.formats.image_header import (
    ImageHeader,
    checked_spacing,
    repaired,
    require_memory,
)

_BESIDE_VOXELS = 1 << 20  # bytes; the header has 284, and tags may follow the voxels


def read_mgz_header(path: Path) -> ImageHeader:
    """Read the header of an MGH or MGZ file."""
    with closing(chunks_of(path)) as chunks:
        return _header(path, _load(path, next(chunks, b"")))


def read_mgz(path: Path) -> tuple[np.ndarray, ImageHeader]:
    """Read voxels (C,Z,Y,X) and header; integer types stay.

    Raises:
        TruncatedImageError: the file ends early or is damaged.
        ImageError: not an MGH file.
    """
    promised = read_mgz_header(path)
    size = promised.channels * math.prod(promised.grid.shape_zyx) * np.dtype(promised.dtype).itemsize
    require_memory(path, promised, extra=size)
    image = _load(path, _beginning(path, size + _BESIDE_VOXELS))
    header = _header(path, image)
    try:
        data = np.asanyarray(image.dataobj)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise damaged(path, str(error)) from error
    array = data.T if data.ndim == 4 else data.T[None]
    return np.ascontiguousarray(array, dtype=header.dtype), header


def write_mgz_label(path: Path, labels_zyx: np.ndarray, header: ImageHeader) -> None:
    """Write labels (Z,Y,X); values above 255 as int32, because the format has no uint16 (not atomic).

    For a NIfTI source the geometry is nibabel's reading of it in mm, since ITK does not read this format.
    """
    stored = labels_zyx if labels_zyx.dtype == np.uint8 else labels_zyx.astype(np.int32)
    grid = header.nibabel_grid_mm
    if grid.skew_degrees > MAX_SKEW_DEGREES:  # a sform that is an alignment, beside a qform
        grid = header.source_grid
    MGHImage(cast(Any, stored.T), grid.affine_ras).to_filename(path)


def _beginning(path: Path, size: int) -> bytes:
    """At least `size` bytes of the content. The rest is read too: nibabel stops before gzip's checksum."""
    kept, done = [], 0
    for piece in chunks_of(path):
        if done < size:
            kept.append(piece)
            done += len(piece)
    return b"".join(kept)


def _load(path: Path, content: bytes) -> MGHImage:
    """From the decompressed content, or its beginning; voxels are read later."""
    try:
        return MGHImage.from_bytes(content)
    except (EOFError, zlib.error) as error:
        raise damaged(path, str(error)) from error
    except (OSError, TypeError, ValueError, KeyError, HeaderDataError, ImageFileError, MGHError) as error:
        raise ImageError("The file is not an MGH volume", where=path, found=error) from error


def _header(path: Path, image: MGHImage) -> ImageHeader:
    shape = tuple(int(n) for n in image.shape)
    x, y, z = checked_spacing([float(s) for s in image.header.get_zooms()[:3]], where=path)
    source = Grid.from_affine_ras(np.asarray(image.affine), (shape[2], shape[1], shape[0]))
    source = replace(source, spacing_zyx_mm=(z, y, x))
    straight, skew = repaired(source, where=path)
    return ImageHeader(
        grid=straight,
        source_grid=source,
        channels=shape[3] if len(shape) == 4 else 1,
        dtype=image.get_data_dtype().newbyteorder("=").name,
        format="mgz",
        skew_degrees=skew,
    )
