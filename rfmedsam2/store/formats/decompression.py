"""Reading plain, gzip and zlib files in chunks, always to the end, so that checksums reveal damage."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rfmedsam2.errors import ImageError
from rfmedsam2.store.formats.image_header import TruncatedImageError

CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_AUTO_WINDOW = zlib.MAX_WBITS | 32  # gzip or zlib by its header


def chunks_of(path: Path) -> Generator[bytes, None, None]:
    """The content of a file in chunks of about 1 MB, decompressed if it starts with gzip's magic bytes.

    Raises:
        ImageError: the file cannot be opened.
        TruncatedImageError: the gzip stream ends early or its checksum is wrong.
    """
    try:
        with path.open("rb") as stream:
            packed = stream.read(2) == _GZIP_MAGIC
            stream.seek(0)
            if packed:
                yield from inflated(stream, path)
            else:
                while piece := stream.read(CHUNK):
                    yield piece
    except OSError as error:
        raise ImageError(f"The file cannot be read ({error.strerror})", where=path) from error


def is_gzip(path: Path) -> bool:
    """Whether a file starts with gzip's magic bytes, whatever it is called."""
    with path.open("rb") as stream:
        return stream.read(2) == _GZIP_MAGIC


def inflated(stream: BinaryIO, path: Path) -> Generator[bytes, None, None]:
    """Decompress gzip (also several members in a row) or zlib data to the end of the stream, verifying the checksum.

    Raises:
        TruncatedImageError: the stream ends early or is damaged.
    """
    inflater, done = zlib.decompressobj(_AUTO_WINDOW), 0
    waiting = b""
    try:
        while True:
            waiting = waiting or stream.read(CHUNK)
            if not waiting:
                break
            piece = inflater.decompress(waiting, 4 * CHUNK)
            done += len(piece)
            yield piece
            waiting = inflater.unconsumed_tail
            if inflater.eof:
                waiting = inflater.unused_data
                if len(waiting) < len(_GZIP_MAGIC):  # the next member may begin in the next chunk
                    waiting += stream.read(CHUNK)
                if not waiting.startswith(_GZIP_MAGIC):
                    return
                inflater = zlib.decompressobj(_AUTO_WINDOW)
    except zlib.error as error:
        raise damaged(path, f"bad data after {done} decompressed bytes ({error})") from None
    raise damaged(path, f"the compressed data end after {done} decompressed bytes, without their checksum")


def fill(chunks: Iterator[bytes], first: bytes, size: int) -> tuple[np.ndarray, int]:
    """Copy `first` and then the chunks into a new uint8 array of `size`; all chunks are consumed.

    Returns:
        The array, and the number of bytes that there are (less than `size`: the file is too short).
    """
    target, done = np.empty(size, dtype=np.uint8), 0
    view = target.data
    for piece in chain((first,), chunks):
        room = max(min(len(piece), size - done), 0)
        view[done : done + room] = piece[:room]
        done += len(piece)
    return target, done


def require_size(path: Path, found: int, size: int) -> None:
    """Check the bytes of an image's voxels. A few more do no harm; twice as many are other voxels than the header says.

    Raises:
        TruncatedImageError: some are missing.
        ImageError: the header says another type or shape, so that readers give half of the values, or of the planes.
    """
    if found < size:
        raise damaged(path, f"{found} of {size} bytes of voxels")
    if found >= 2 * size > 0:
        raise ImageError(
            "The file holds at least twice the voxels that its header describes",
            where=path,
            expected=f"{size} bytes",
            found=f"{found} bytes",
            remedy="Correct type and shape in the header, or convert the image again",
        )


def damaged(path: Path, found: str) -> TruncatedImageError:
    """Make the error for a file that ends early or is damaged."""
    return TruncatedImageError(
        "The image file is truncated or damaged",
        where=path,
        expected="a complete file",
        found=found,
        remedy="Copy or download the file again, or leave the case out",
    )
