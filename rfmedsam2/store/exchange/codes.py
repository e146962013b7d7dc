"""SNOMED-CT codes and colors of structures by their names: codes.csv beside this module, and tables of users.

A name is found in any letter case, with spaces, underscores or hyphens, with left and right (l, lt, r, rt) at any
place. A structure without an exact code is coded as an anatomical structure; its own name is the label.
"""

from __future__ import annotations

import colorsys
import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from rfmedsam2.errors import RecordError
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.system.csv_text import decode_text, read_rows
from rfmedsam2.system.ordinary_files import read_whole

Color = tuple[int, int, int]
_TABLE = Path(__file__).with_name("codes.csv")
_REQUIRED = ("name", "code", "meaning")
_COLUMNS = (*_REQUIRED, "aliases", "scheme", "category_code", "category_meaning", "paired", "red", "green", "blue")
_SIDES = {"left": "left", "l": "left", "lt": "left", "right": "right", "r": "right", "rt": "right"}
_GOLDEN = 0.618034  # hues of neighboring values lie far apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A coded concept: coding scheme (SCT is SNOMED-CT), code value and meaning."""

    value: str
    meaning: str
    scheme: str = "SCT"


LATERALITY = {"left": Code(value="7771000", meaning="Left"), "right": Code(value="24028007", meaning="Right")}
STRUCTURE = Code(value="91723000", meaning="Anatomical Structure")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """What a segment is: its category and type, the side of paired structures, and a color where a table has one."""

    category: Code = STRUCTURE
    kind: Code = STRUCTURE
    side: Code | None = None
    color: Color | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One value of a label map: its name, color and coding."""

    value: int
    name: str
    color: Color
    coding: Coding


@dataclass(frozen=True, slots=True)
class _Row:
    coding: Coding
    paired: bool


Table = Mapping[tuple[str, ...], _Row]
"""By the words of a name, sorted."""


def code_table(path: Path | None = None) -> Table:
    """The package's codes; rows of a user's CSV (columns name, code, meaning, and others) come before them.

    Raises:
        RecordError: the file is missing, or has faulty rows; the message lists all of them.
    """
    return _own_table() if path is None else {**_own_table(), **_read(path)}


def coding_of(name: str, table: Table | None = None) -> Coding:
    """The coding of a structure by its name; without an exact code that of an anatomical structure."""
    table = _own_table() if table is None else table
    words = _words(name)
    for candidate in (words, _with_side_apart(words, table)):
        if (row := table.get(_key(candidate))) is not None and not row.paired:
            return row.coding
        sides = [_SIDES[word] for word in candidate if word in _SIDES]
        row = table.get(_key([word for word in candidate if word not in _SIDES]))
        if row is not None and row.paired and len(sides) <= 1:
            side = LATERALITY[sides[0]] if sides else None
            return replace(row.coding, side=side)
    return Coding()


def segments_of(labels: LabelSet | None, values: tuple[int, ...], table: Table | None = None) -> tuple[Segment, ...]:
    """Segments of a label map, by ascending value: those that the labels declare, and others that the map holds.

    Segments never overlap. A value that only larger regions contain is named after the smallest, as what only that one
    contains.

    Args:
        labels: names of the values; None: there is no table of them.
        values: the values of the map.
        table: codes, see `code_table`.
    """
    names = {} if labels is None else _names_of_values(labels)
    found = []
    for value in sorted({*names, *values} - {0}):
        name = names.get(value, f"label {value}")
        coding = coding_of(name, table)
        found.append(Segment(value=value, name=name, color=coding.color or _color(value), coding=coding))
    return tuple(found)


def _names_of_values(labels: LabelSet) -> dict[int, str]:
    names: dict[int, str] = {} if labels.ignore is None else {labels.ignore: "ignore"}
    smallest_first = sorted(labels.foreground.items(), key=lambda item: len(item[1]))
    for name, values in smallest_first:
        for value in values:
            names.setdefault(value, name if len(values) == 1 else f"{name} only")
    rivals = [name for name in names.values() if [*names.values()].count(name) > 1]
    return {value: f"{name} ({value})" if name in rivals else name for value, name in names.items()}


def _color(value: int) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(value * _GOLDEN % 1, 0.65, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9+]+", name.casefold()) if word]


def _key(words: list[str]) -> tuple[str, ...]:
    return tuple(sorted(word for word in words if word not in ("of", "the")))


def _with_side_apart(words: list[str], table: Table) -> list[str]:
    """Words in which `lkidney` is `l kidney`, if the rest is the name of a paired structure."""
    for i, word in enumerate(words):
        side = next((s for s in sorted(_SIDES, key=len, reverse=True) if word.startswith(s) and word != s), None)
        if side is None:
            continue
        apart = [*words[:i], word[len(side) :], *words[i + 1 :]]
        if (row := table.get(_key(apart))) is not None and row.paired:
            return [side, *apart]
    return words


@cache
def _own_table() -> Table:
    return _read(_TABLE)


def _read(path: Path) -> dict[tuple[str, ...], _Row]:
    try:
        rows = [*read_rows(decode_text(read_whole(path)))]
    except FileNotFoundError:
        raise RecordError("The table of codes does not exist", where=path, remedy="Check the path") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordError("The table of codes cannot be read", where=path, found=error) from error
    head = [cell.casefold() for cell in rows[0][1]] if rows else []
    unknown = sorted(set(head) - set(_COLUMNS))
    if unknown or not set(_REQUIRED) <= set(head) or len(set(head)) < len(head):
        raise RecordError(
            "The table of codes has other columns than expected",
            where=path,
            expected=f"{', '.join(_REQUIRED)}, and any of {', '.join(_COLUMNS[3:])}",
            found=", ".join(head) or "an empty file",
        )
    table: dict[tuple[str, ...], _Row] = {}
    faults = []
    for line, cells in rows[1:]:
        fields = dict(zip(head, cells, strict=False))
        try:
            row = _row(fields)
        except ValueError as error:
            faults.append(f"line {line}: {error}")
            continue
        for name in (fields["name"], *fields.get("aliases", "").split(";")):
            if words := _words(name):
                table[_key(words)] = row
    if faults:
        raise RecordError(f"{len(faults)} row(s) of the table of codes are faulty", where=path, found="; ".join(faults))
    return table


def _row(fields: dict[str, str]) -> _Row:
    lacking = [name for name in _REQUIRED if not fields.get(name)]
    if lacking:
        raise ValueError(f"no {' and no '.join(lacking)}")
    if len(fields["code"]) > 16 or len(fields["meaning"]) > 64:  # DICOM's limits of SH and LO
        raise ValueError("a code of more than 16 or a meaning of more than 64 characters")
    paired = fields.get("paired", "").casefold()
    if paired not in ("", "yes", "no"):
        raise ValueError(f"paired is {paired!r}, not yes or no")
    parts = [fields.get(name, "") for name in ("red", "green", "blue")]
    if any(parts) and not all(part.isdecimal() and int(part) <= 255 for part in parts):
        raise ValueError(f"the color {' '.join(parts)} is not three numbers from 0 to 255")
    color = (int(parts[0]), int(parts[1]), int(parts[2])) if any(parts) else None
    scheme, category = fields.get("scheme") or "SCT", STRUCTURE
    if fields.get("category_code"):
        category = Code(value=fields["category_code"], meaning=fields.get("category_meaning", ""), scheme=scheme)
        if not category.meaning:
            raise ValueError("a category_code without category_meaning")
    kind = Code(value=fields["code"], meaning=fields["meaning"], scheme=scheme)
    return _Row(Coding(category=category, kind=kind, color=color), paired == "yes")
