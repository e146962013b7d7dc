"""Compressed arrays in files that are written whole and known by size and checksum.

Arrays are blosc2, LZ4 level 1 with bit shuffling: on CT this writes seven times as fast as LZ4HC level 5, and files are
a sixth larger.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import blosc2
import numpy as np

from rfmedsam2.errors import StoreError
from rfmedsam2.geometry import Shape
from rfmedsam2.records.case import StoredFile
from rfmedsam2.system.atomic import atomic
from rfmedsam2.system.memory import require_allocatable

BLOCK_BYTES = 128 * 1024
CHUNK_BYTES = 4 * 1024**2
PACKING_BYTES = 8 * 1024**2
"""Upper bound of what blosc2 allocates beside the compressed array: buffers and a thread's heap."""

_FRAME = b"\x9e\xa8b2frame\x00"
_LAYERS, _ARRAY_ALONE = slice(91, 99), b"\xde\x00\x01\xa4b2nd"
"""Where the header of a blosc2 file counts and names its layers (README_CFRAME_FORMAT of c-blosc2): one, b2nd."""

Ranges = Sequence[tuple[int, int]]
Look = tuple[int, int]
"""Size and modification time of a file."""


def packed(array: np.ndarray, patch: Sequence[int]) -> bytes:
    """Compress an array (..., a, b, c) to a whole blosc2 file in memory, so that a full disk raises the system's error.

    Args:
        array: the array, contiguous.
        patch: three entries: how much of it is read at a time.
    """
    require_packable(array)
    blocks, chunks = cut(array.shape[-3:], patch, array.itemsize)
    lead = (1,) * (array.ndim - 3)
    compressed = cast(Any, blosc2).asarray(
        array,
        chunks=(*lead, *chunks),
        blocks=(*lead, *blocks),
        contiguous=True,  # else `to_cframe` holds three copies of the compressed data
        cparams={
            "codec": blosc2.Codec.LZ4,
            "clevel": 1,
            "filters": [blosc2.Filter.BITSHUFFLE],
            "nthreads": 1,
        },
    )
    return compressed.to_cframe()


def require_packable(array: np.ndarray) -> None:
    """Check that blosc2 can compress an array in memory: it ends the process where it gets none.

    Raises:
        MemoryError: it cannot.
    """
    require_allocatable(array.nbytes + PACKING_BYTES)


def put(path: Path, content: bytes) -> StoredFile:
    """Write a file atomically; returns its size and checksum."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return StoredFile(size=len(content), crc32=zlib.crc32(content), modified_ns=path.stat().st_mtime_ns)


def read_packed(path: Path, ranges: tuple[slice, ...], *, what: str, remedy: str) -> np.ndarray:
    """Read a part of a blosc2 file.

    Args:
        path: the file.
        ranges: one slice for each axis.
        what: the file in words, which begin the error's sentence.
        remedy: what makes a damaged file again.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        return open_array(path, mmap_mode="r", dparams={"nthreads": 1})[ranges]
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"{what} cannot be read ({error})", where=path, remedy=remedy) from error


def open_array(path: Path, **options: Any) -> Any:
    """Open a blosc2 file that holds an array and nothing else.

    Others hold expressions, functions and references to other files, which blosc2 before 4.14.1 evaluates.

    Args:
        path: the file.
        options: further arguments of `blosc2.open`.

    Raises:
        ValueError: it is another kind of file.
        OSError, RuntimeError: it cannot be read.
    """
    with path.open("rb") as stream:
        head = stream.read(_LAYERS.stop)
    if not head.startswith(_FRAME) or head[_LAYERS] != _ARRAY_ALONE:
        raise ValueError("it is not a blosc2 file of an array alone")
    # blosc2's own annotations are wrong here (mmap_mode) or incomplete
    return cast(Any, blosc2).open(str(path), mode="r", **options)


def cut(shape: Sequence[int], patch: Sequence[int], itemsize: int) -> tuple[Shape, Shape]:
    """Choose block and chunk shapes: blocks are powers of two shaped like the patch, chunks at most a patch.

    Reading a patch decompresses only the blocks that it overlaps; a chunk is located and read as a whole.
    """
    block = [min(n, 1 << (p - 1).bit_length()) for n, p in zip(shape, patch, strict=True)]
    while np.prod(block) * itemsize > BLOCK_BYTES:
        widest = max(range(3), key=lambda axis: (block[axis] / patch[axis], axis))
        block[widest] = max(1, 1 << ((block[widest] - 1).bit_length() - 1))
    chunk = list(block)
    growing = True
    while growing:
        growing = False
        for axis in sorted(range(3), key=lambda axis: chunk[axis] / patch[axis]):
            larger = min(chunk[axis] + block[axis], shape[axis])
            size = np.prod(chunk) // chunk[axis] * larger * itemsize
            if chunk[axis] < min(patch[axis], shape[axis]) and size <= CHUNK_BYTES:
                chunk[axis], growing = larger, True
                break
    return (block[0], block[1], block[2]), (chunk[0], chunk[1], chunk[2])


def verified(path: Path, file: StoredFile | None, seen: dict[Path, Look]) -> bool:
    """Whether a file is as written: compared with its checksum, unless it looks as it did when it was last compared.

    Args:
        path: the file.
        file: what was written.
        seen: how files looked when they were compared; this one is added.
    """
    now = look(path)
    if now is None or seen.get(path) != now:
        if now is None or not as_written(path, file):
            return False
        seen[path] = now
    return True


def look(path: Path) -> Look | None:
    """How a file looks, None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def looks_unchanged(path: Path, file: StoredFile) -> bool:
    """Whether a file looks unchanged; it is read only if its modification time differs."""
    now = look(path)
    if now is None or now[0] != file.size:
        return False
    return now[1] == file.modified_ns or as_written(path, file)


def as_written(path: Path, file: StoredFile | None) -> bool:
    """Whether a file's size and checksum are those written."""
    if file is None:
        return False
    value = 0
    try:
        if path.stat().st_size != file.size:
            return False
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                value = zlib.crc32(piece, value)
    except OSError:
        return False
    return value == file.crc32
