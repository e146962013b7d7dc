"""Data files of detached headers: MHD and NHDR name the files that hold their voxels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rfmedsam2.errors import ImageError
from rfmedsam2.store.formats.image_header import require_ordinary_file

_METAIMAGE = (".mhd", ".mha")
_NRRD = (".nhdr", ".nrrd")
_MOST_FILES = 100_000  # a pattern with a damaged range shall not fill the memory
_LONGEST_HEADER, _LONGEST_LINE = 16 << 20, 1 << 16  # bytes


def data_files(path: Path) -> list[Path]:
    """Files that hold the voxels of an MHD or NHDR header; empty if the voxels are in the file itself.

    Raises:
        ImageError: the header cannot be read, or names more files than an image can have.
    """
    ending = path.suffix.lower()
    if ending not in (*_METAIMAGE, *_NRRD):
        return []
    require_ordinary_file(path)
    names = _metaimage_names if ending in _METAIMAGE else _nrrd_names
    found = []
    try:
        with path.open("rb") as stream:
            for name in names(_lines(stream)):
                found.append(path.parent / name)
                if len(found) > _MOST_FILES:
                    raise ImageError("The header names too many data files", where=path, remedy="Convert it again")
    except OSError as error:
        raise ImageError(f"The file cannot be read ({error.strerror})", where=path) from error
    return found


def _lines(stream: BinaryIO) -> Iterator[str]:
    """Lines of a header; the voxels after it are not read."""
    while stream.tell() < _LONGEST_HEADER and (line := stream.readline(_LONGEST_LINE)):
        yield os.fsdecode(line).strip()  # names of files, in whatever bytes


def _metaimage_names(lines: Iterator[str]) -> Iterator[str]:
    """Names in ElementDataFile, the last field: a file, LIST and one name per line, or a pattern with its range."""
    for line in lines:
        key, value = metaimage_field(line)
        if key == "ElementDataFile":
            yield from _names(value, following=lines, local="LOCAL")
            return


def metaimage_field(line: str) -> tuple[str, str]:
    """Name and value of a line of a MetaImage header; a colon may stand for the equals sign."""
    key, _, value = re.sub("[=:]", "=", line, count=1).partition("=")
    return key.strip(), value.strip()


def _nrrd_names(lines: Iterator[str]) -> Iterator[str]:
    """Names in the field "data file": a file, LIST and one name per line, or a pattern with its range."""
    for line in lines:
        if not line:
            return  # the voxels follow
        key, _, value = line.partition(":")
        if key.strip().lower() in ("data file", "datafile"):
            yield from _names(value.strip(), following=lines, local="")
            return


def _names(value: str, *, following: Iterator[str], local: str) -> Iterator[str]:
    words = value.split()
    if value.upper() == local or not words:
        return
    if words[0].upper() == "LIST":
        yield from filter(None, following)
    elif "%" in words[0] and len(words) >= 3 and all(re.fullmatch(r"-?\d+", word) for word in words[1:3]):
        step = int(words[3]) if len(words) > 3 and re.fullmatch(r"\d+", words[3]) else 1
        for number in range(int(words[1]), int(words[2]) + 1, max(step, 1)):
            try:
                yield words[0] % number
            except (TypeError, ValueError):
                return  # ITK says what is wrong with the pattern
    else:
        yield value
