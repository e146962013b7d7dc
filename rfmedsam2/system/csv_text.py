"""CSV in which text stays text: a case or class whose name begins like a formula is not computed by a spreadsheet.

Spreadsheets compute cells that begin with = + - @ (OWASP, CSV injection). Such text gets an apostrophe before it, which
`plain_cell` takes away again; numbers are written as they are.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from typing import TextIO

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_ESCAPED = re.compile(r"'+[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def write_rows(stream: TextIO, rows: Iterable[Iterable[object]], *, line_end: str = "\r\n") -> None:
    """Write rows; None is an empty cell, text like a formula is marked, bytes of file names are escaped."""
    csv.writer(stream, lineterminator=line_end).writerows([_cell(value) for value in row] for row in rows)


def plain_cell(text: str) -> str:
    """The text of a cell that `write_rows` may have marked; other cells are returned unchanged."""
    return text[1:] if _ESCAPED.match(text) else text


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    value = value.encode(errors="backslashreplace").decode()  # names of files may hold bytes that are not UTF-8
    return f"'{value}" if _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value
