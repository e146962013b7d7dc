"""Atomic file writes, and reading and writing of records as JSON."""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol, TypeVar

from typing_extensions import Self

from rfmedsam2.errors import RecordError, StoreError
from rfmedsam2.system.ordinary_files import read_whole

logger = logging.getLogger(__name__)
R = TypeVar("R", bound="JsonRecord")
PARTIAL = ".partial-"
"""Prefix of a file's name while it is being written."""


class JsonRecord(Protocol):
    """What is kept as a JSON file (`records.base.Record`)."""

    @classmethod
    def from_json(cls, text: str | bytes, *, where: object = None) -> Self:
        """Parse JSON text."""
        ...

    def to_json(self) -> str:
        """Readable JSON text."""
        ...


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on an error it is removed.

    The temporary name keeps all suffixes of `path`, so that writers that choose the format by suffix still work.

    Raises:
        StoreError: the folder cannot be written or the disk is full.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=PARTIAL, suffix="-" + path.name, dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with writing_to(path):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            # mkstemp makes files private; give them the permissions that open() would have
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn operating system errors while writing `path` into a `StoreError` with a remedy."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        remedies = {
            errno.ENOSPC: ("The disk is full", "Free space on that disk, then run the same command again"),
            errno.EDQUOT: ("The disk quota is used up", "Free space in your quota, then run the same command again"),
            errno.EACCES: ("The folder cannot be written", "Choose another place or ask for write permission"),
            errno.EPERM: ("The folder cannot be written", "Choose another place or ask for write permission"),
            errno.EROFS: ("The file system is read-only", "Choose another place"),
            errno.EEXIST: (
                "Expected a folder, but a file exists at this path",
                "Move that file or choose another place",
            ),
            errno.ENOTDIR: (
                "Expected a folder, but a file exists at this path",
                "Move that file or choose another place",
            ),
        }
        if error.errno is None:
            raise  # raised by a library about the content that it reads
        else_ = (f"The file cannot be written ({error.strerror})", "Choose another place")
        what, remedy = remedies.get(error.errno, else_)
        raise StoreError(what, where=path, remedy=remedy) from error


def is_taken(path: Path) -> bool:
    """Whether something, also a link that leads nowhere, has this name.

    Raises:
        StoreError: no file can have it (it is too long, a folder on the way is a file).
    """
    with writing_to(path):
        return path.is_symlink() or path.exists()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, UTF-8; what is not text, as in names of files from older systems, is escaped."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def title_of(kind: type) -> str:
    """What users call a kind of record: its `known_as`, else the words of its class's name."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", kind.__name__.lstrip("_")).removesuffix(" Record").lower()
    return getattr(kind, "known_as", None) or words


def write_record(path: Path, record: JsonRecord) -> None:
    """Write a record as readable JSON, atomically."""
    write_text(path, record.to_json() + "\n")


def require_possible_folder(path: Path) -> None:
    """Check before long work that a folder is at a path, or can be made there.

    Raises:
        StoreError: a file is at the path, or at one of its parents.
    """
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        remedy = "Move that file or choose another place"
        raise StoreError("Expected a folder, but a file exists at this path", where=nearest, remedy=remedy)


def read_record(path: Path, kind: type[R]) -> R:
    """Read a record; all faulty fields are reported at once.

    Raises:
        RecordError: the file is missing, is not JSON, or does not hold a record of this kind.
    """
    try:
        text = read_whole(path)
    except FileNotFoundError:
        raise RecordError(f"The {title_of(kind)} file does not exist", where=path) from None
    except OSError as error:
        reason = f"The {title_of(kind)} file cannot be read ({error.strerror})"
        raise RecordError(reason, where=path) from error
    return kind.from_json(text, where=path)


def backup_folder(folder: Path) -> Path | None:
    """Rename a folder of results to make room for a new one; returns its new path, None if there was no folder."""
    if not folder.exists():
        return None
    stamp = datetime.now(timezone.utc).strftime(
        "%Y%m%d-%H%M%S-%f"
    )  # microseconds: two runs may restart within one second
    target = folder.with_name(f"before-{stamp}-{folder.name}")
    with writing_to(folder.parent):
        folder.rename(target)
    logger.warning("Moved the previous contents of %s to %s", folder, target)
    return target
