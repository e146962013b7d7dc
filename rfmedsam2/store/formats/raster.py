"""PNG, BMP and TIFF: BMP files, stored label values of palette images, and the JSON with a TIFF stack's spacing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError
from pydantic import ConfigDict

from rfmedsam2.errors import ImageError
from rfmedsam2.geometry import Grid, Triple
from rfmedsam2.records.base import Record
from rfmedsam2.store.formats.decompression import damaged
from rfmedsam2.store.formats.image_header import FLAT_SPACING_MM, ImageHeader, checked_spacing
from rfmedsam2.system.atomic import read_record, write_record

RASTER_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
_STACKS = (".tif", ".tiff")
_FORMATS = ("PNG", "BMP", "TIFF")  # some of Pillow's other decoders start external programs


class StackSpacing(Record):
    """The JSON beside a TIFF stack, as nnU-Net v2's Tiff3DIO reads and writes it; other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    spacing: tuple[float, float, float]
    """Distance of voxel centers along z, y, x, mm."""


def spacing_file(path: Path) -> Path | None:
    """The JSON with the spacing of a TIFF: CASE.json, for images (CASE_0000.tif) as for label maps, as in nnU-Net.

    None if the file is not a TIFF. The JSON need not exist.
    """
    if path.suffix.lower() not in _STACKS:
        return None
    own = path.with_suffix(".json")
    without_channel = path.with_name(re.sub(r"_\d{4}$", "", path.stem) + ".json")
    return own if own.is_file() else without_channel


def stack_spacing(path: Path) -> Triple | None:
    """Spacing z, y, x of a TIFF stack, mm, from its JSON; None without one.

    Raises:
        RecordError: the JSON has no three numbers as "spacing".
        GeometryError: one of them is not positive.
    """
    file = spacing_file(path)
    if file is None or not file.exists():
        return None
    return checked_spacing(read_record(file, StackSpacing).spacing, where=file)


def write_stack_spacing(path: Path, spacing_zyx_mm: Triple) -> None:
    """Write the JSON with the spacing of the stack `path`, atomically."""
    write_record(path.with_suffix(".json"), StackSpacing(spacing=spacing_zyx_mm))


def read_bmp_header(path: Path) -> ImageHeader:
    """Read the header of a BMP file."""
    with _opened_bmp(path) as image:
        return _bmp_header(image)


def read_bmp(path: Path) -> tuple[np.ndarray, ImageHeader]:
    """Read voxels (C,1,Y,X) and header of a BMP file through Pillow; ITK takes gray ones for colored ones.

    Raises:
        TruncatedImageError: pixels are missing.
        ImageError: not a BMP file.
    """
    with _opened_bmp(path) as image:
        header = _bmp_header(image)
        try:
            values = np.array(image.convert("RGB") if image.mode == "P" else image, dtype=np.uint8)
        except (OSError, ValueError) as error:
            raise damaged(path, str(error)) from error
    channels = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    return np.ascontiguousarray(channels)[:, None], header


@contextmanager
def _opened_bmp(path: Path) -> Iterator[Image.Image]:
    try:
        image = Image.open(path, formats=("BMP",))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError("The file is not a BMP image that can be read", where=path, found=error) from error
    with image:
        yield image


def _bmp_header(image: Image.Image) -> ImageHeader:
    grid = Grid(shape_zyx=(1, image.height, image.width), spacing_zyx_mm=(FLAT_SPACING_MM, 1.0, 1.0))
    channels = 3 if image.mode == "P" else len(image.getbands())
    return ImageHeader(grid=grid, source_grid=grid, channels=channels, dtype="uint8", format="raster", flat=True)


def stored_indices(path: Path) -> np.ndarray | None:
    """The values (1,Z,Y,X) stored in a palette or 1-bit image, which ITK replaces by colors; None for other images."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode not in ("P", "1"):
                return None
            planes = [np.array(frame, dtype=np.uint8) for frame in ImageSequence.Iterator(image)]
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None  # ITK says what is wrong
    return np.stack(planes)[None] if planes and len({plane.shape for plane in planes}) == 1 else None
