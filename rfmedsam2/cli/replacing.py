"""What a command may replace: its own earlier output, and anything else only with --overwrite."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rfmedsam2.errors import RfMedSamError, UsageError
from rfmedsam2.system.atomic import is_taken

LATER_SECONDS = 2.0
"""Files of one run are written within less after the first of them; what is younger was changed since."""
EARLIER_SECONDS = 600.0
"""The others are drawn before the first is written; what is older was changed since the clock was set back."""


def require_replaceable(
    files: Sequence[Path], read: Callable[[Path], object], *, overwrite: bool, inputs: Sequence[Path | None] = ()
) -> None:
    """Check that files which exist already are an earlier output of the same command, which nobody has changed since.

    Args:
        files: what will be written; the first one tells by its content who made it and those beside it.
        read: reads the first file, and raises an error of ours if the command did not make it.
        overwrite: whether anything may be replaced, except inputs.
        inputs: files and folders that the command reads.

    Raises:
        UsageError: files of somebody else or an input would be replaced, or a folder; names them.
        StoreError: no file can have such a name.
    """
    there = [path for path in files if is_taken(path)]
    folder = next((path for path in there if path.is_dir()), None)
    if folder is not None:
        raise UsageError("Expected a file, found a folder of this name", where=folder, remedy="Name a file in it")
    places = {_at_end_of_links(path) for path in inputs if path is not None}
    read_too = [p for p in there if places & {_at_end_of_links(p), *_at_end_of_links(p).parents}]
    if not there or (overwrite and not read_too):
        return
    try:
        read(files[0])
    except RfMedSamError:
        if read_too:
            raise UsageError(
                "This would overwrite an input",
                where=", ".join(map(str, read_too)),
                remedy="Choose another place with -o",
            ) from None
        raise UsageError(
            "This would replace what the command did not make",
            where=", ".join(map(str, there)),
            remedy="Choose another place with -o, or replace it with --overwrite",
        ) from None
    written = files[0].stat().st_mtime
    changed = [p for p in there[1:] if not -EARLIER_SECONDS <= p.stat().st_mtime - written <= LATER_SECONDS]
    if changed and not overwrite:
        raise UsageError(
            "This would replace what was changed since the command wrote it",
            where=", ".join(map(str, changed)),
            remedy="Choose another place with -o, or replace it with --overwrite",
        )


def _at_end_of_links(path: Path) -> Path:
    return Path(os.path.realpath(path))  # resolve() raises on links in a circle
