"""Ordinary files: pipes, sockets and devices, whose reading may never end, are refused before; SHA-256 of contents."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Protocol

_PIECE_BYTES = 1 << 20


def require_ordinary(path: Path) -> os.stat_result:
    """The status of a file (or folder), also at the end of links.

    Raises:
        OSError: it does not exist, cannot be accessed, or is a pipe, a socket or a device.
    """
    status = os.stat(path)  # noqa: PTH116 - one call per file, measured on folders of slices
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.ENOTSUP, "it is a pipe, a socket or a device, not an ordinary file", str(path))
    return status


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
