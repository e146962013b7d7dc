"""CSV in which text stays text: a case or class whose name begins like a formula is not computed by a spreadsheet.

Spreadsheets compute cells that begin with = + - @ (OWASP, CSV injection). Such text gets an apostrophe before it, which
`plain_cell` takes away again; numbers are written as they are. Read is what spreadsheets save in any country.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator
from typing import TextIO

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_ESCAPED = re.compile(r"'+[=+\-@\t\r]")
_SEPARATOR = re.compile(r'"?sep=([,;\t|])"?(\r\n|\r|\n|$)', re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def write_rows(stream: TextIO, rows: Iterable[Iterable[object]], *, line_end: str = "\r\n") -> None:
    """Write rows; None is an empty cell, text like a formula is marked, bytes of file names are escaped."""
    csv.writer(stream, lineterminator=line_end).writerows([_cell(value) for value in row] for row in rows)


def decode_text(content: bytes) -> str:
    """Decode a text file: UTF-8, or UTF-16 where its first bytes say so, as of Excel and PowerShell.

    Raises:
        UnicodeDecodeError: another encoding.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig")


def read_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the stripped cells of every row that has text.

    Cells are separated as Excel's first line `sep=;` says, else by commas; by semicolons or tabs if the first line has
    these and no comma, as spreadsheets write where the comma is the decimal point.

    Raises:
        csv.Error: the text is not CSV.
    """
    skipped = 0
    if said := _SEPARATOR.match(text):
        separator, skipped = said[1], 1
        text = text[said.end() :]
    else:
        first = text.lstrip().partition("\n")[0]
        separator = next((mark for mark in ",;\t" if mark in first), ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    for row in rows:
        cells = [plain_cell(cell.strip()) for cell in row]
        if any(cells):
            yield skipped + rows.line_num, cells


def plain_cell(text: str) -> str:
    """The text of a cell that `write_rows` may have marked; other cells are returned unchanged."""
    return text[1:] if _ESCAPED.match(text) else text


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    value = value.encode(errors="backslashreplace").decode()  # names of files may hold bytes that are not UTF-8
    return f"'{value}" if _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value
