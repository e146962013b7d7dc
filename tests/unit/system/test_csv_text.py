"""CSV: text that a spreadsheet would compute is marked as text, numbers stay numbers, and what is read is the text."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from rfmedsam2.store.input_discovery import find_cases
from rfmedsam2.system.csv_text import plain_cell, write_rows

ROOT = Path(__file__).resolve().parents[3]


def written(*cells: object) -> list[str]:
    stream = io.StringIO()
    write_rows(stream, [cells])
    return next(csv.reader(io.StringIO(stream.getvalue())))


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-x", "@SUM(A1)", "\t=1", "'=1", "''-x", "-1_0", "--1"])
def test_text_like_a_formula_is_marked_and_read_back(text):
    [cell] = written(text)
    assert cell == f"'{text}"
    assert plain_cell(cell) == text


@pytest.mark.parametrize("text", ["liver", "-0.5", "+3", "-1e-05", ".5", "'quoted'", "a=b", "", "1-2"])
def test_numbers_and_other_text_stay(text):
    assert written(text) == [text]
    assert plain_cell(text) == text


def test_numbers_and_nothing_are_written_as_always():
    assert written(-0.5, 3, None, -1e-7) == ["-0.5", "3", "", "-1e-07"]


def test_a_name_that_is_not_text_is_escaped():
    assert written("caf\udce9", "=\udce9") == [r"caf\udce9", r"'=\udce9"]


def test_only_one_module_writes_csv():
    others = [
        path.relative_to(ROOT).as_posix()
        for package in ("rfmedsam2", "segment_anything_hq")
        for path in (ROOT / package).rglob("*.py")
        if "csv.writer" in path.read_text(encoding="utf-8") or "DictWriter" in path.read_text(encoding="utf-8")
    ]
    assert others == ["rfmedsam2/system/csv_text.py"]


def test_a_list_of_inputs_written_so_names_the_same_cases(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    files = ("a.nii.gz", "a.nii.gz")
    with (tmp_path / "list.csv").open("w", newline="") as stream:
        write_rows(stream, [("id", "image", "second"), ("=1+1", *files), ("-0.5", *files)])
    assert [case.id for case in find_cases(tmp_path / "list.csv", channels=2, file_ending=None)] == ["-0.5", "=1+1"]
