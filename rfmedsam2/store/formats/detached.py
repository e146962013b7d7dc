"""Files beside an image that belong to it: data files of MHD and NHDR, the JSON with the spacing of a TIFF stack."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import ConfigDict

from rfmedsam2.errors import GeometryError, ImageError, RecordError, UsageError
from rfmedsam2.geometry import Triple
from rfmedsam2.records.base import Record
from rfmedsam2.store.formats.image_header import checked_spacing, require_ordinary_file
from rfmedsam2.system.atomic import read_record, write_record

STACK_ENDINGS = (".tif", ".tiff")
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
        step = int(words[3]) if len(words) > 3 and re.fullmatch(r"-?\d+", words[3]) else 1
        step = step or 1
        for number in range(int(words[1]), int(words[2]) + (1 if step > 0 else -1), step):
            try:
                yield words[0] % number
            except (TypeError, ValueError):
                return  # ITK says what is wrong with the pattern
    else:
        yield value


class StackSpacing(Record):
    """The JSON beside a TIFF stack, as nnU-Net v2's Tiff3DIO reads and writes it; other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    spacing: tuple[float, float, float]
    """Distance of voxel centers along z, y, x, mm."""


def spacing_file(path: Path) -> Path | None:
    """The JSON with the spacing of a TIFF: CASE.json, for images (CASE_0000.tif) as for label maps, as in nnU-Net.

    None if the file is not a TIFF. The JSON need not exist.
    """
    if path.suffix.lower() not in STACK_ENDINGS:
        return None
    own, of_case = path.with_suffix(".json"), _spacing_file_of_case(path)
    return own if own.is_file() else of_case


def _spacing_file_of_case(path: Path) -> Path:
    """CASE.json, the only one that nnU-Net reads for CASE_0000.tif."""
    return path.with_name(re.sub(r"_\d{4}$", "", path.stem) + ".json")


def stack_spacing(path: Path, *, planes: int) -> Triple | None:
    """Spacing z, y, x of a TIFF stack, mm, from its JSON; None without one.

    A single plane needs no spacing: beside it a JSON may be something else, such as outlines that were drawn on it.

    Raises:
        RecordError: the JSON has no three numbers as "spacing".
        GeometryError: one of them is not positive, or CASE_0000.json and CASE.json disagree.
    """
    file = spacing_file(path)
    found = None if file is None else _spacing_in(file, planes)
    if file is None or found is None:
        return None
    of_case = _spacing_file_of_case(path)
    other = found if of_case == file else _spacing_in(of_case, planes)
    if other not in (None, found):
        raise GeometryError(
            "Two files give the stack different spacings",
            where=path,
            expected=f"one, or the same in both; nnU-Net reads {of_case.name}",
            found=f"{other} in {of_case.name}, {found} in {file.name}",
            remedy="Remove the one that is wrong",
        )
    return found


def _spacing_in(file: Path, planes: int) -> Triple | None:
    if not file.exists():
        return None
    try:
        return checked_spacing(read_record(file, StackSpacing).spacing, where=file)
    except RecordError:
        if planes > 1:
            raise
        return None


def write_stack_spacing(path: Path, spacing_zyx_mm: Triple) -> None:
    """Write the JSON with the spacing of the stack `path`, atomically.

    Raises:
        UsageError: a JSON file of this name holds something else.
    """
    beside = path.with_suffix(".json")
    if beside.exists():
        try:
            read_record(beside, StackSpacing)
        except RecordError as error:
            raise UsageError(
                "The spacing of a stack belongs into a file that holds something else",
                where=beside,
                remedy="Move that file, or choose another folder",
            ) from error
    write_record(beside, StackSpacing(spacing=spacing_zyx_mm))
