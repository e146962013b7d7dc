"""Ordinary files: pipes, sockets and devices, whose reading may never end, are refused before; SHA-256 of contents."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Protocol

from rfmedsam2.errors import RfMedSamError, UsageError

_PIECE_BYTES = 1 << 20
_MOST_BYTES = 2 << 30
"""Most bytes of a file of text; the annotations of LVIS have a billion."""


def require_ordinary(path: Path) -> os.stat_result:
    """The status of a file (or folder), also at the end of links.

    Raises:
        OSError: it does not exist, cannot be accessed, or is a pipe, a socket or a device.
    """
    status = os.stat(path)  # noqa: PTH116 - one call per file, measured on folders of slices
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.ENOTSUP, "it is a pipe, a socket or a device, not an ordinary file", str(path))
    return status


def read_whole(path: Path) -> bytes:
    """The bytes of a file that is read at once: a record, a list, a table.

    Raises:
        OSError: it does not exist, cannot be read, is a pipe, a socket or a device, or is larger than any such file.
    """
    size = require_ordinary(path).st_size
    if size > _MOST_BYTES:
        raise OSError(errno.EFBIG, f"its {size / 2**30:.1f} GiB are more than such a file can have", str(path))
    return path.read_bytes()


def require_folder(
    folder: Path, what: str, *, expected: str | None = None, error: type[RfMedSamError] = UsageError
) -> None:
    """Check that a folder is there, and is one.

    Args:
        folder: the folder.
        what: what users call it.
        expected: what it holds.
        error: what is raised.

    Raises:
        RfMedSamError: nothing has this name, or a file has it.
    """
    if not folder.is_dir():
        fault = "is a file, not a folder" if folder.exists() else "does not exist"
        remedy = "Name a folder" if folder.exists() else "Check the path"
        raise error(f"The {what} {fault}", where=folder, expected=expected, remedy=remedy)


class Digest(Protocol):
    """What hashlib returns."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


def add_file(digest: Digest, path: Path) -> None:
    """Add the bytes of a file to a digest.

    Raises:
        OSError: the file cannot be read, or is a pipe, a socket or a device.
    """
    require_ordinary(path)
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()
