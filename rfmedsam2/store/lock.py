"""Locks on folders (flock), released when the process dies, and folders that appear whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from rfmedsam2.errors import StoreError, UsageError
from rfmedsam2.system.atomic import PARTIAL, writing_to

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None

logger = logging.getLogger(__name__)
LOCK = ".lock"
POLL_SECONDS = 0.05
PLACING_SECONDS = 60.0
"""How long to wait for another run that moves a folder into place."""
REPLACED = ".replaced-"
"""Prefix of a folder's name between being moved aside and being removed."""


class InUseError(UsageError):
    """Another run works in the folder."""


@contextmanager
def exclusive_lock(folder: Path, *, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Lock `folder` against other runs inside the `with` block, and remove partial files that a killed run left there.

    The folder is created if it does not exist, and removed again if nothing was put into it. On file systems without
    locks a warning is logged and nothing is locked, which the `with` block gets.

    Args:
        folder: the folder.
        wait_seconds: how long to wait for a run that holds the lock.

    Raises:
        InUseError: another run holds the lock; names its process and host.
        StoreError: the folder cannot be written.
    """
    created = _create(folder)
    path = folder / LOCK
    try:
        handle, locked = _acquire(path, shared=False, wait_seconds=wait_seconds)
        try:
            if locked:  # else they may be another run's
                for partial in folder.glob(PARTIAL + "*"):
                    with suppress(OSError):
                        partial.unlink()
            yield locked
        finally:
            # removed while still locked: a process that opened it meanwhile finds it gone and tries again
            with suppress(OSError):
                path.unlink()
            os.close(handle)
    finally:
        with suppress(OSError):
            for empty in created:
                empty.rmdir()


@contextmanager
def workplace(home: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `home`, removed at the end, and with it those of the same prefix that killed runs left there.

    Args:
        home: created if it does not exist.
        prefix: how names of such folders begin.

    Raises:
        StoreError: the folder cannot be written.
    """
    with writing_to(home):
        home.mkdir(parents=True, exist_ok=True)
        for left in home.glob(f"{prefix}*"):
            with suppress(InUseError, StoreError), exclusive_lock(left) as locked:
                if locked:  # else it may be another run's
                    shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
    try:
        # another run that begins may be looking at the new folder
        with exclusive_lock(folder, wait_seconds=5.0):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def placing(target: Path) -> Iterator[None]:
    """Keep other runs from moving a folder to `target` inside the `with` block, which begins as the last one ended.

    A run that was killed after it had moved the old folder aside gets it back; what it had replaced already is removed.

    Raises:
        InUseError: another run moves a folder there, for longer than `PLACING_SECONDS`.
        StoreError: the folder cannot be written.
    """
    aside = target.with_name(REPLACED + target.name)
    with exclusive_lock(target.parent, wait_seconds=PLACING_SECONDS):
        if aside.exists() and not target.exists():
            with writing_to(target):
                aside.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
        yield


def move_into_place(folder: Path, target: Path) -> None:
    """Move a whole folder to its place on the same disk, within `placing(target)`; what was there is removed.

    Whenever this ends, be it killed, one of both is there, or is again when `placing` is next entered.

    Raises:
        StoreError: the folder cannot be written; what was there stays.
    """
    aside = target.with_name(REPLACED + target.name)
    with writing_to(target):
        if target.exists():
            target.rename(aside)
        try:
            folder.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def shared_lock(folder: Path) -> Iterator[None]:
    """Let other runs read `folder` inside the `with` block, but none hold its `exclusive_lock`.

    Nothing is locked where this cannot be: in a folder that does not exist or may not be written, and on file systems
    without locks.

    Raises:
        InUseError: another run holds the exclusive lock; names its process and host.
    """
    path = folder / LOCK
    try:
        handle, locked = _acquire(path, shared=True) if folder.is_dir() else (None, False)
    except StoreError:
        handle, locked = None, False
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                if locked and fcntl is not None:  # fails while others read
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_same_file(handle, path):
                    path.unlink()
            os.close(handle)


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


def _acquire(path: Path, *, shared: bool, wait_seconds: float = 0.0) -> tuple[int, bool]:
    """Open and lock the file; returns its descriptor, and whether the file system has locks."""
    until = time.monotonic() + wait_seconds
    while True:
        handle = _opened(path, shared=shared)
        try:
            locked = _lock(handle, path, shared=shared)
            if _is_same_file(handle, path):
                _write_owner(handle, alone=not shared)
                return handle, locked
        except InUseError:
            os.close(handle)
            if time.monotonic() >= until:
                raise
            time.sleep(POLL_SECONDS)
            continue
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _opened(path: Path, *, shared: bool) -> int:
    with writing_to(path):
        try:
            # a run that ends removes the folder if it is empty
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError:
            if shared and path.is_file():
                return os.open(path, os.O_RDONLY)  # who may only read can still see that it is locked
            raise


def _lock(handle: int, path: Path, *, shared: bool) -> bool:
    """Lock the open file; returns whether that is possible here."""
    if fcntl is None:  # pragma: no cover - Windows
        return False
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUseError(
            "Another run is working in this folder",
            where=path.parent,
            found=_owners(handle) or None,
            remedy="Wait until it has ended, or choose another place",
        ) from None
    except OSError as error:
        _warn_unlocked(path.parent, error.strerror)
        return False
    return True


@cache
def _warn_unlocked(folder: Path, reason: str) -> None:
    """Log it once."""
    logger.warning("%s cannot be locked (%s): do not start a second run in it", folder, reason)


def _is_same_file(handle: int, path: Path) -> bool:
    """Whether the open file still exists under this name: its previous holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _write_owner(handle: int, *, alone: bool) -> None:
    """Write process and host into the lock file; skipped on a full disk, and where it may only be read."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with suppress(OSError):
        if alone:
            os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())


def _owners(handle: int) -> str:
    """The runs that a lock file names, without those of this machine that have ended."""
    lines = os.pread(handle, 10_000, 0).decode("utf-8", "replace").splitlines()
    return "; ".join(line for line in lines if not _has_ended(line))


def _has_ended(owner: str) -> bool:
    words = owner.split()
    if len(words) < 4 or words[3].rstrip(",") != socket.gethostname() or not words[1].isdigit():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
