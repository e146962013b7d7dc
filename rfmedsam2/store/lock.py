"""Exclusive lock on a folder of results (flock): one run at a time, released by the kernel when the process dies."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from rfmedsam2.errors import UsageError
from rfmedsam2.system.atomic import PARTIAL, writing_to

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None

logger = logging.getLogger(__name__)
LOCK = ".lock"


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` against other runs inside the `with` block, and remove partial files that a killed run left there.

    The folder is created if it does not exist, and removed again if nothing was put into it. On file systems without
    locks a warning is logged and nothing is locked.

    Raises:
        UsageError: another run holds the lock; names its process and host.
        StoreError: the folder cannot be written.
    """
    created = _create(folder)
    path = folder / LOCK
    try:
        handle = _acquire(path)
        try:
            for partial in folder.glob(PARTIAL + "*"):
                with suppress(OSError):
                    partial.unlink()
            yield
        finally:
            # removed while still locked: a process that opened it meanwhile finds it gone and tries again
            with suppress(OSError):
                path.unlink()
            os.close(handle)
    finally:
        with suppress(OSError):
            for empty in created:
                empty.rmdir()


def _create(folder: Path) -> list[Path]:
    """Create a folder and its parents; returns the created ones, innermost first."""
    missing: list[Path] = []
    with writing_to(folder):
        for each in (folder, *folder.parents):
            if each.exists():
                break
            missing.append(each)
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(path: Path) -> int:
    """Open and lock the file; returns its descriptor."""
    while True:
        with writing_to(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, path)
            if _is_same_file(handle, path):
                _write_owner(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    if fcntl is None:  # pragma: no cover - Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
        raise UsageError(
            "Another run is working in this folder",
            where=path.parent,
            found=owner or None,
            remedy="Wait until it has ended, or choose another place",
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): do not start a second run in it", path.parent, error.strerror)


def _is_same_file(handle: int, path: Path) -> bool:
    """Whether the open file still exists under this name: its previous holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _write_owner(handle: int) -> None:
    """Write process and host into the lock file; skipped on a full disk."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode(), 0)
