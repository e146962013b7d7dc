"""Networks that a backend has converted, kept in a folder of this user until weights, shapes or versions differ.

Only what this package wrote is read: the folder belongs to the user and nobody else may write there, and every file has
the digest that was recorded when it was made. Whatever is missing, damaged or of other weights is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rfmedsam2.errors import RecordError, StoreError, UsageError
from rfmedsam2.records.base import Record
from rfmedsam2.store.lock import move_into_place, placing, workplace
from rfmedsam2.system.atomic import read_record, write_record
from rfmedsam2.system.ordinary_files import file_sha256

logger = logging.getLogger(__name__)
LIMIT_BYTES = 4 << 30
"""Most bytes of all networks that are kept; those that were not used for longest are removed."""
NETWORK, WEIGHTS, RECORD = "network.xml", "network.bin", "record.json"
WORK = "converting-"
"""How names of folders begin in which a network is written."""


class ConversionRecord(Record):
    """What a converted network was made from, and how it did."""

    made_from: dict[str, str]
    """Weights, model, shape, precision and versions."""
    network_sha256: str = ""
    weights_sha256: str = ""
    """Digests of the two files; empty where there are none, because of the fault."""
    seconds: dict[str, dict[str, float]]
    """By processor and threads: seconds of a tile by backend."""
    fault: str | None = None
    """Why the network could not be converted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A network of the cache."""

    record: ConversionRecord
    folder: Path


class ConversionCache:
    """A folder of converted networks.

    Args:
        folder: made if it does not exist; None: nothing is kept. Nor is anything where another user owns the folder or
            may write to it, or where it cannot be made.
    """

    def __init__(self, folder: Path | None) -> None:
        self._home = None if folder is None else _private(folder)

    @property
    def folder(self) -> Path | None:
        """The folder; None: nothing is kept."""
        return self._home

    def find(self, made_from: Mapping[str, str]) -> Kept | None:
        """The network made from exactly this, whole; None: there is none."""
        if self._home is None:
            return None
        folder = self._home / _digest(made_from)
        try:
            record = read_record(folder / RECORD, ConversionRecord)
            if record.made_from != dict(made_from):
                return None
            if record.fault is None and not _is_whole(folder, record):
                return None
            os.utime(folder)
        except (RecordError, OSError):
            return None
        return Kept(record=record, folder=folder)

    def store(self, record: ConversionRecord, write: Callable[[Path], None] | None = None) -> None:
        """Keep a network, whole or not at all; where that is impossible, a warning says why.

        Args:
            record: what it was made from; digests are filled in here.
            write: writes `NETWORK` and `WEIGHTS` into the folder that it is given; None: there are none.
        """
        if self._home is None:
            return
        target = self._home / _digest(record.made_from)
        try:
            with workplace(self._home, WORK) as work:
                new = work / target.name
                new.mkdir()
                if write is not None:
                    write(new)
                    digests = {"network_sha256": NETWORK, "weights_sha256": WEIGHTS}
                    record = record.model_copy(update={k: file_sha256(new / name) for k, name in digests.items()})
                write_record(new / RECORD, record)
                with placing(target):
                    move_into_place(new, target)
            self._trim(target)
        except (OSError, RuntimeError, UsageError) as error:  # OpenVINO says with a RuntimeError that a disk is full
            logger.warning("The converted network is not kept in %s: %s", self._home, error)

    def add_seconds(self, kept: Kept, machine: str, seconds: Mapping[str, float]) -> None:
        """Record how fast a network that is kept is on this machine."""
        record = kept.record.model_copy(update={"seconds": {**kept.record.seconds, machine: dict(seconds)}})
        with suppress(StoreError):  # it is measured once more the next time
            write_record(kept.folder / RECORD, record)

    def _trim(self, newest: Path) -> None:
        """Remove what was not used for longest, down to the limit."""
        assert self._home is not None
        folders = [path for path in self._home.iterdir() if (path / RECORD).is_file() and path != newest]
        left = LIMIT_BYTES - _bytes_of(newest)
        for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
            left -= _bytes_of(folder)
            if left < 0:
                shutil.rmtree(folder, ignore_errors=True)


def cache_at(folder: Path | None) -> ConversionCache:
    """The cache in a folder; None: that of this user."""
    return ConversionCache(folder or default_folder())


def default_folder() -> Path | None:
    """The cache of this user: ~/.cache/rfmedsam2; None: the user has no home."""
    try:
        return Path.home() / ".cache" / "rfmedsam2"
    except RuntimeError:
        return None


def _private(folder: Path) -> Path | None:
    """The folder of conversions below `folder`, made for this user alone; None: it cannot be."""
    home = folder.expanduser().absolute() / "openvino"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = home.lstat()
    except OSError as error:
        logger.warning("Converted networks are not kept: %s cannot be made (%s)", home, error.strerror)
        return None
    own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    if not own or not stat.S_ISDIR(status.st_mode) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        logger.warning("Converted networks are not kept: others may write to %s. Allow only yourself (chmod 700)", home)
        return None
    return home


def _digest(made_from: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(made_from), sort_keys=True).encode()).hexdigest()[:32]


def _is_whole(folder: Path, record: ConversionRecord) -> bool:
    return (file_sha256(folder / NETWORK), file_sha256(folder / WEIGHTS)) == (
        record.network_sha256,
        record.weights_sha256,
    )


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
