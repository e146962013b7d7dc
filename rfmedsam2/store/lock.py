"""One run at a time in a folder of results: a lock that the kernel takes back when its process dies."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from rfmedsam2.errors import UsageError
from rfmedsam2.store.atomic import PARTIAL, writing_to

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None

logger = logging.getLogger(__name__)
LOCK = ".lock"


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder` while inside; also clears away what a killed run had half written there.

    The folder is made if it is not there, and removed again if nothing was put into it. Where the file system knows no
    locks, runs are not told apart.

    Raises:
        UsageError: another run works in it; says which.
        StoreError: the folder cannot be written.
    """
    made = _make(folder)
    path = folder / LOCK
    try:
        handle = _taken(path)
        try:
            for left in folder.glob(PARTIAL + "*"):
                with suppress(OSError):
                    left.unlink()
            yield
        finally:
            # removed while it is still held: who opened it meanwhile finds it gone and tries again
            with suppress(OSError):
                path.unlink()
            os.close(handle)
    finally:
        with suppress(OSError):
            for empty in made:
                empty.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder; gives those that were not there before, the innermost first."""
    missing: list[Path] = []
    with writing_to(folder):
        for each in (folder, *folder.parents):
            if each.exists():
                break
            missing.append(each)
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _taken(path: Path) -> int:
    """Open and lock the file; gives its descriptor."""
    while True:
        with writing_to(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, path)
            if _is_still(handle, path):
                _sign(handle)
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
        who = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
        raise UsageError(
            "Another run is working in this folder",
            where=path.parent,
            found=who or None,
            remedy="Wait until it has ended, or choose another place",
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): start no second run in it", path.parent, error.strerror)


def _is_still(handle: int, path: Path) -> bool:
    """Tell whether the file is still the one of this name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Say who holds it; on a full disk nobody says so."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode(), 0)
