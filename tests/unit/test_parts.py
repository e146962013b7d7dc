"""Parts of a list of cases."""

from __future__ import annotations

import pytest

from rfmedsam2.arguments import Part
from rfmedsam2.errors import UsageError


@pytest.mark.parametrize(("count", "items"), [(1, 5), (2, 5), (3, 3), (8, 5), (4, 0)])
def test_every_item_is_in_one_part(count, items):
    parts = [Part(number, count).of(range(items)) for number in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_part_is_written_as_its_number_and_how_many_there_are():
    assert Part.parse("2/8") == Part(2, 8)
    assert str(Part.parse("02/8")) == "2/8"


@pytest.mark.parametrize("text", ["", "2", "0/8", "9/8", "2/0", "-1/8", "2/8/3", "a/b", "2/8 ", "²/8", 2, None, (2, 8)])
def test_anything_else_is_refused(text):
    with pytest.raises(UsageError, match="This is not a part"):
        Part.parse(text)
