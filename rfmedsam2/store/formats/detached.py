"""Data files of detached headers: MHD and NHDR name the files that hold their voxels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rfmedsam2.errors import ImageError
from rfmedsam2.store.formats.image_header import require_ordinary_file

_METAIMAGE = (".mhd", ".mha")
_NRRD = (".nhdr", ".nrrd")
_MOST_FILES = 100_000  # a pattern with a damaged range shall not fill the memory
_LONGEST_HEADER = 1 << 20


def data_files(path: Path) -> list[Path]:
    """Files that hold the voxels of an MHD or NHDR header; empty if the voxels are in the file itself.

    Raises:
        ImageError: the header cannot be read, or names more files than an image can have.
    """
    ending = path.suffix.lower()
    if ending not in (*_METAIMAGE, *_NRRD):
        return []
    require_ordinary_file(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(_LONGEST_HEADER)
    except OSError as error:
        raise ImageError(f"The file cannot be read ({error.strerror})", where=path) from error
    names = _metaimage_names(head) if ending in _METAIMAGE else _nrrd_names(head)
    found = []
    for name in names:
        found.append(path.parent / name)
        if len(found) > _MOST_FILES:
            raise ImageError("The header names too many data files", where=path, remedy="Convert the file again")
    return found


def _metaimage_names(head: bytes) -> Iterator[str]:
    """Names in ElementDataFile, the last field: a file, LIST and one name per line, or a pattern with its range."""
    lines = head.split(b"\n")
    for number, line in enumerate(lines):
        key, _, value = line.decode("latin-1").partition("=")
        if key.strip() == "ElementDataFile":
            yield from _names(value.strip(), following=lines[number + 1 :], local="LOCAL")
            return


def _nrrd_names(head: bytes) -> Iterator[str]:
    """Names in the field "data file": a file, LIST and one name per line, or a pattern with its range."""
    lines = head.split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            return  # the voxels follow
        key, _, value = line.decode("latin-1").partition(":")
        if key.strip().lower() in ("data file", "datafile"):
            yield from _names(value.strip(), following=lines[number + 1 :], local="")
            return


def _names(value: str, *, following: Sequence[bytes], local: str) -> Iterator[str]:
    words = value.split()
    if value.upper() == local.upper() or not words:
        return
    if words[0].upper() == "LIST":
        yield from (name for line in following if (name := line.decode("latin-1").strip()))
    elif "%" in words[0] and len(words) >= 3 and all(re.fullmatch(r"-?\d+", word) for word in words[1:3]):
        step = int(words[3]) if len(words) > 3 and re.fullmatch(r"\d+", words[3]) else 1
        for number in range(int(words[1]), int(words[2]) + 1, max(step, 1)):
            try:
                yield words[0] % number
            except (TypeError, ValueError):
                return  # ITK says what is wrong with the pattern
    else:
        yield value
