"""Parsing JSON: what Python's parser answers to hostile text is one error, whatever it is."""

from __future__ import annotations

import pytest

from rfmedsam2.system.json_text import JsonError, parse_json


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a": [1, 2.5, null, true]}', {"a": [1, 2.5, None, True]}), (b"\xef\xbb\xbf[1]", [1]), ("1" * 4000, None)],
)
def test_json_is_read(text: str | bytes, value: object) -> None:
    assert parse_json(text) == (10**4000 // 9 if value is None else value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "brackets are nested too deeply"),
        ('{"a":' * 200_000, "brackets are nested too deeply"),
        (f'{{"a": {"9" * 5000}}}', "a number has thousands of digits"),
        (f"[-{'9' * 5000}]", "a number has thousands of digits"),
        ('{"a": ', "Expecting value: line 1 column 7"),
        (b'{"a": "\xff"}', "not UTF-8 text: invalid start byte at byte 7"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        ("", "Expecting value: line 1 column 1"),
    ],
)
def test_everything_else_is_one_kind_of_error(text: str | bytes, reason: str) -> None:
    with pytest.raises(JsonError, match=reason):
        parse_json(text)
