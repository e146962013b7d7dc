"""PNG, BMP and TIFF: what Pillow reads better than ITK, and stored label values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, TiffImagePlugin, UnidentifiedImageError

from rfmedsam2.errors import ImageError
from rfmedsam2.geometry import FLAT_SPACING_MM, Grid
from rfmedsam2.store.formats.decompression import damaged
from rfmedsam2.store.formats.detached import STACK_ENDINGS, spacing_file, stack_spacing
from rfmedsam2.store.formats.image_header import ImageHeader, require_memory

ONE_PLANE_ENDINGS = (".png", ".bmp")
RASTER_ENDINGS = (*ONE_PLANE_ENDINGS, *STACK_ENDINGS)
_FORMATS = ("PNG", "BMP", "TIFF")  # some of Pillow's other decoders start external programs
_PAGE, _BITS, _MEANING, _TEXT, _TURNED, _SAMPLES, _PLANES = 254, 258, 262, 270, 274, 277, 284  # TIFF tags
_NO_PLANE = 1 | 4  # in the tag of a page: a copy with fewer pixels, a mask
_TILE, _EXTRA, _KIND, _DEPTH = 322, 338, 339, 32997
_SIGNED, _FLOATING = 2, 3
_PREMULTIPLIED = 1
_GRAY, _RGB = (0, 1), 2
_COLORS = {0: "gray", 1: "gray", 3: "palette colors", 5: "CMYK", 6: "YCbCr", 8: "CIELab", 9: "CIELab", 10: "CIELab"}
_ITK_BITS = {1: (8, 16, 32), _SIGNED: (8, 16, 32), _FLOATING: (32,)}
"""By kind of TIFF, what ITK reads as stored: 64 bits it refuses, half precision it takes for integers."""
_PNG = b"\x89PNG\r\n\x1a\n"
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_MODES = {
    "1": (1, "uint8"),
    "L": (1, "uint8"),
    "I;16": (1, "uint16"),
    "I;16B": (1, "uint16"),
    "I": (1, "int32"),
    "F": (1, "float32"),
    "P": (3, "uint8"),
    "RGB": (3, "uint8"),
    "RGBA": (4, "uint8"),
}
"""Channels and dtype by Pillow's mode."""


def is_for_pillow(path: Path) -> bool:
    """Whether Pillow reads an image: BMP, PNG with notes that ITK applies to values, TIFF whose values Pillow keeps.

    ITK takes gray BMP and tiled TIFF for colored ones, a transparent color for a channel of its own, shifts values of
    which fewer bits are said to count, and may hang or crash on a damaged TIFF. Pillow knows neither doubles nor colors
    of 16 bits.

    Raises:
        ImageError: an animated PNG, a TIFF of several volumes or turned, or of a kind that neither reads as it is.
    """
    if path.suffix.lower() == ".bmp":
        return True
    if path.suffix.lower() == ".png":
        return _is_png_for_pillow(path)
    if path.suffix.lower() not in STACK_ENDINGS:
        return False
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _require_as_shown(path, getattr(image, "tag_v2", {}))
            _require_planes(path, image)
            if image.mode in _MODES and _pillow_keeps(image):
                return True
    except ImageError:
        raise
    except UnidentifiedImageError:
        pass  # of a kind that Pillow does not know, or damaged
    except _UNREADABLE:
        return True
    _require_kind_of_itk(path)
    return False


def _require_planes(path: Path, image: Image.Image) -> None:
    """Check that the pages of a TIFF are the planes of one volume: all of them, and not also channels or moments.

    Raises:
        ImageError: they are not, as ImageJ, OME-TIFF or tifffile wrote beside them.
    """
    tags, pages = getattr(image, "tag_v2", {}), getattr(image, "n_frames", 1)
    axes, described = _described_pages(str(tags.get(_TEXT, "")), image.width * image.height, int(tags.get(_SAMPLES, 1)))
    if described is not None and described != pages:
        raise ImageError(
            "The file holds another number of pages than its description says",
            where=path,
            expected=f"{described} pages",
            found=pages,
            remedy="Save all planes as one TIFF with a page for each; ImageJ above 4 GB writes one",
        )
    long = [name for name, length in axes.items() if length > 1]
    # tifffile notes the planes of a volume as channels for ImageJ unless it is given their axes
    if long == ["channels"] and stack_spacing(path, planes=pages) is not None:
        return
    if len(long) > 1 or "channels" in long:
        beside = spacing_file(path)
        remedy = "Save each channel of each moment as a file of its own (CASE_0000.tif, CASE_0001.tif ...)"
        if len(long) == 1 and beside is not None:
            remedy += f'; if these are planes, write {{"spacing": [z, y, x]}} in mm to {beside.name}'
        raise ImageError(
            "The pages of the file are not the planes of one volume",
            where=path,
            expected="one channel at one moment",
            found=", ".join(f"{name} {axes[name]}" for name in long),
            remedy=remedy,
        )


def _require_as_shown(path: Path, tags: Mapping[int, Any]) -> None:
    """Check that the pixels of a TIFF are stored as they are shown.

    Raises:
        ImageError: pages hold several planes, or are turned, which some programs do and others (nnU-Net's readers) not.
    """
    if (turned := tags.get(_TURNED, 1)) != 1 or tags.get(_DEPTH, 1) != 1:
        raise ImageError(
            "The pixels of the TIFF are not stored as they are shown",
            where=path,
            expected="rows from the top, columns from the left (orientation 1), one plane a page",
            found=f"{tags[_DEPTH]} planes a page" if turned == 1 else f"orientation {turned}",
            remedy="Save the image again as it is seen, and its label map too",
        )


def _described_pages(text: str, pixels: int, samples: int) -> tuple[dict[str, int], int | None]:
    """What ImageJ, OME-TIFF or tifffile noted of pages of this number of pixels: lengths of axes, number of pages."""
    if text.startswith("ImageJ="):
        fields = dict(re.findall(r"^(images|channels|slices|frames)=(\d{1,9})\s*$", text, re.MULTILINE))
        axes = {name: int(n) for name, n in fields.items() if name != "images"}
        return axes, int(fields.get("images", math.prod(axes.values()))) if fields else None
    if (found := re.search(r"<(?:\w+:)?Pixels\b[^>]*>", text)) is not None:
        names = {"C": "channels", "Z": "slices", "T": "frames"}
        axes = {names[a]: int(n) for a, n in re.findall(r'\bSize([CZT])="(\d{1,9})"', found[0])}
        axes["channels"] = axes.get("channels", 1) // samples or 1
        return axes, math.prod(axes.values())
    if (shape := re.fullmatch(r'\{"shape": \[([\d, ]{1,200})\].*\}', text.strip())) is not None:
        lengths = [int(n) for n in shape[1].split(",")]
        for inner in range(len(lengths) - 1, -1, -1):  # the last axes lie within a page
            if math.prod(lengths[inner:]) == pixels * samples:
                return {f"axis {axis}": n for axis, n in enumerate(lengths[:inner])}, math.prod(lengths[:inner])
    return {}, None


def _pillow_keeps(image: Image.Image) -> bool:
    """Whether Pillow reads the samples of an open TIFF as they are: it makes 8 bits of wider colors."""
    tags = getattr(image, "tag_v2", {})
    samples, bits = int(tags.get(_SAMPLES, 1)), tuple(tags.get(_BITS, (1,)))
    if samples == 1:
        return bits[0] in (1, 2, 4, 8, 16, 32)
    if image.mode == "RGBA" and tags.get(_EXTRA, (0,))[0] == _PREMULTIPLIED:
        return False  # it divides colors by their transparency
    return image.mode in ("RGB", "RGBA") and samples == len(image.mode) and set(bits) == {8}


def _is_inverted_by_pillow(image: Image.Image) -> bool:
    """Whether low values are shown white, and Pillow gives values for display instead of the stored ones."""
    return image.mode in ("1", "L") and getattr(image, "tag_v2", {}).get(_MEANING) == 0


def _require_kind_of_itk(path: Path) -> None:
    """Check that ITK reads a TIFF as it is stored: tiles, planes of colors and all but gray and RGB become photographs.

    Raises:
        ImageError: a kind that it gives other values of, or refuses.
    """
    try:
        tags = _tags(path)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, UnidentifiedImageError):
        return  # damaged: ITK says so
    _require_as_shown(path, tags)
    samples, kind = int(tags.get(_SAMPLES, 1)), int(tags.get(_KIND, (1,))[0])
    bits = tuple(tags.get(_BITS, (1,)))
    in_planes = samples > 1 and tags.get(_PLANES) == 2
    meaning = tags.get(_MEANING, _GRAY[1])
    laid_out = "in tiles" if _TILE in tags else "in planes of one color" if in_planes else None
    if laid_out is None and meaning not in (_GRAY if samples == 1 else (_RGB,)):
        laid_out = f"in {_COLORS.get(meaning, f'colors of kind {meaning}')}"
    if samples in (1, 3, 4) and bits[0] in _ITK_BITS.get(kind, ()) and laid_out is None:
        return
    of = {_SIGNED: "signed integers", _FLOATING: "floating-point numbers"}.get(kind, "integers")
    raise ImageError(
        "This kind of TIFF is not supported",
        where=path,
        expected="8, 16 or 32 bits; one channel, or RGB with or without transparency pixel by pixel",
        found=f"{samples} channel(s) of {of} of {bits[0]} bits" + ("" if laid_out is None else f", {laid_out}"),
        remedy="Save each channel as a file of its own, or in RGB, without tiles, in 16 bits or 32-bit floating point",
    )


def _tags(path: Path) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Tags of the first page."""
    with path.open("rb") as stream:
        head = stream.read(8)
        if head[2:4] in (b"\x2b\0", b"\0\x2b"):  # BigTIFF
            head += stream.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        stream.seek(tags.next)
        tags.load(stream)
    return tags


def _is_png_for_pillow(path: Path) -> bool:
    """Whether a PNG names a color as transparent, or says that fewer bits of its values count.

    Raises:
        ImageError: an animation, of which readers take the first image; colors of 16 bits with such a note.
    """
    names: dict[bytes, bytes] = {}
    with path.open("rb") as stream:
        if stream.read(8) != _PNG:
            return False
        while len(head := stream.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            length = int.from_bytes(head[:4], "big")
            names[head[4:]] = stream.read(min(length, 25))
            stream.seek(max(length - 25, 0) + 4, 1)
    frames = int.from_bytes(names.get(b"acTL", b"")[:4], "big")
    if frames > 1:
        raise ImageError(
            "The PNG is an animation",
            where=path,
            expected="one image",
            found=f"{frames} images",
            remedy="Save them as one file each, or as the planes of a TIFF",
        )
    bits, color = names.get(b"IHDR", b"").ljust(10, b"\0")[8:10]
    notes = [
        *(["a transparent color (tRNS)"] if b"tRNS" in names else []),
        *(["fewer bits that count (sBIT)"] if any(count < bits for count in names.get(b"sBIT", b"")) else []),
    ]
    if notes and bits == 16 and color:
        found = f"colors of 16 bits, with {' and '.join(notes)}"
        remedy = "Save the image without transparency and notes on its colors"
        raise ImageError("The kind of pixels is not supported", where=path, found=found, remedy=remedy)
    return bool(notes)


def read_pillow_header(path: Path) -> ImageHeader:
    """Read the header of such a file."""
    with _opened(path) as image:
        return _header(path, image)


def read_pillow(path: Path) -> tuple[np.ndarray, ImageHeader]:
    """Read voxels (C,Z,Y,X) and header of such a file.

    Raises:
        TruncatedImageError: pixels are missing.
        ImageError: the file cannot be read as an image, or planes of a stack have different sizes.
    """
    with _opened(path) as image:
        header = _header(path, image)
        require_memory(path, header)
        try:
            planes, kinds = [], []
            for plane in ImageSequence.Iterator(image):
                planes.append(_stored(plane))
                kinds.append(int(getattr(plane, "tag_v2", {}).get(_PAGE, 0)) & _NO_PLANE)
        except _UNREADABLE as error:
            raise damaged(path, str(error)) from error
    _require_alike(path, planes, kinds)
    stack = np.stack(planes).astype(header.dtype, copy=False)
    array = stack[None] if stack.ndim == 3 else np.moveaxis(stack, -1, 0)
    return np.ascontiguousarray(array), header


def _stored(plane: Image.Image) -> np.ndarray:
    """(Y, X), or colors (Y, X, C)."""
    array = np.array(plane.convert("RGB") if plane.mode == "P" else plane)
    return ~array if _is_inverted_by_pillow(plane) else array


def _require_alike(path: Path, planes: Sequence[np.ndarray], kinds: Sequence[int]) -> None:
    first = planes[0]
    every = [(plane.shape, plane.dtype, kind) for plane, kind in zip(planes, kinds, strict=True)]
    other = next((n for n, one in enumerate(every) if one != every[0]), None)
    if other is not None:
        found = f"page {other + 1} of {len(planes)}, {_in_words(planes[other])}"
        raise ImageError(
            "The pages of the file are not the planes of one volume",
            where=path,
            expected=f"pages like the first, {_in_words(first)}",
            found=found + (", which says that it is a smaller copy or a mask" if kinds[other] else ""),
            remedy="Save the planes alone, without previews or smaller copies",
        )


def _in_words(plane: np.ndarray) -> str:
    height, width, *channels = plane.shape
    of = f" of {channels[0]} channels" if channels else ""
    return f"{width} x {height} pixels{of}, {plane.dtype}"


def stored_indices(path: Path) -> np.ndarray | None:
    """The values (1,Z,Y,X) stored in an image with a palette or of less than 8 bits, else None.

    Readers turn them into colors, and scale those of few bits up to 255.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(26)
        if start.startswith(_PNG) and start[25:] != b"\3" and start[24] >= 8:
            return None  # neither a palette nor few bits; the look is much faster than Pillow's
        with Image.open(path, formats=_FORMATS) as image:
            bits = start[24] if image.format == "PNG" else getattr(image, "tag_v2", {}).get(_BITS, (8,))[0]
            if image.mode not in ("P", "1") and not (image.mode == "L" and bits < 8):
                return None
            scale = 255 // (2**bits - 1) if image.mode == "L" else 1
            planes = [_indices(plane) // scale for plane in ImageSequence.Iterator(image)]
            return np.stack(planes)[None]
    except _UNREADABLE:
        return None  # the reader of images says what is wrong


def _indices(plane: Image.Image) -> np.ndarray:
    array = np.array(plane) if plane.mode == "P" else _stored(plane)
    return array.astype(np.uint8, copy=False)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        image = Image.open(path, formats=_FORMATS)
    except _UNREADABLE as error:
        raise ImageError("The image cannot be read", where=path, found=error, remedy="Check what wrote it") from error
    with image:
        yield image


def _header(path: Path, image: Image.Image) -> ImageHeader:
    if image.mode not in _MODES:
        raise ImageError("The colors of the image are not supported", where=path, found=image.mode)
    channels, dtype = _MODES[image.mode]
    tags = getattr(image, "tag_v2", None)
    if tags is not None and channels == 1 and dtype != "float32" and (bits := tags.get(_BITS, (1,))[0]) > 1:
        # Pillow keeps the bits of integers, not always their type
        dtype = f"{'int' if tags.get(_KIND, (1,))[0] == _SIGNED else 'uint'}{max(bits, 8)}"
    planes = getattr(image, "n_frames", 1)
    known = stack_spacing(path, planes=planes)
    flat = planes == 1 and known is None
    known = (FLAT_SPACING_MM, 1.0, 1.0) if flat else known
    grid = Grid(shape_zyx=(planes, image.height, image.width), spacing_zyx_mm=known or (1.0, 1.0, 1.0))
    return ImageHeader(
        grid=grid,
        source_grid=grid,
        channels=channels,
        dtype=dtype,
        format="raster",
        flat=flat,
        spacing_known=known is not None,
    )
