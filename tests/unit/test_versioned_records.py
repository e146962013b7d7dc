"""Formats of records: earlier ones are upgraded wherever they stand, later and impossible ones are rejected."""

from __future__ import annotations

from typing import Literal

import pytest

from rfmedsam2.errors import RecordError
from rfmedsam2.records.base import Record, VersionedRecord, renamed
from segment_anything_hq.records import JitterConfig, RefinerPlan


def _1_to_2(data):
    return renamed(data, {"colour": "color"})


def _2_to_3(data):
    return data | {"color": data["color"].upper()}


class Paint(VersionedRecord):
    upgrades = (_1_to_2, _2_to_3)

    format: Literal[3] = 3
    color: str


class Wall(Record):
    """A record that holds one, as a checkpoint holds a plan."""

    paint: Paint
    spare: tuple[Paint, ...] = ()


class Brush(VersionedRecord):
    format: Literal[1] = 1
    width: int


@pytest.mark.parametrize(
    "data",
    [{"format": 1, "colour": "red"}, {"format": 2, "color": "red"}, {"format": 3, "color": "RED"}, {"color": "RED"}],
)
def test_every_earlier_format_becomes_the_newest(data) -> None:
    given = dict(data)
    found = Paint.parse(data)
    assert (found.format, found.color) == (3, "RED")
    assert data == given, "the caller's data are not changed"
    assert Paint.from_json(found.to_json()) == found


def test_records_within_records_are_upgraded() -> None:
    wall = Wall.parse({"paint": {"format": 1, "colour": "red"}, "spare": [{"format": 2, "color": "blue"}]})
    assert (wall.paint.color, wall.spare[0].color) == ("RED", "BLUE")
    again = Wall.from_json(wall.to_json())
    assert again == wall
    assert Wall.parse({"paint": wall.paint}) == Wall(paint=wall.paint), "a record as such is taken as it is"


@pytest.mark.parametrize("found", [0, -1, True, False, "3", "2", 2.0, 3.0, None, [3]])
def test_what_is_no_format_is_named(found) -> None:
    with pytest.raises(RecordError) as caught:
        Paint.parse({"format": found, "color": "RED"}, where="paint.json")
    sentence = str(caught.value)
    assert f"expected format 1 to 3, found format {found!r}" in sentence
    assert "paint.json" in sentence
    with pytest.raises(RecordError, match="expected format 1, found format"):
        Brush.parse({"format": found, "width": 3})


@pytest.mark.parametrize("found", [4, 5, 10**6])
def test_a_later_format_asks_for_a_later_package(found) -> None:
    with pytest.raises(RecordError) as caught:
        Paint.parse({"format": found, "color": "RED", "gloss": 3}, where="paint.json")
    error = caught.value
    assert error.where == "paint.json"
    assert (error.expected, error.found) == ("the paint in format 1 to 3", f"format {found}")
    assert "pip install --upgrade rfmedsam2" in str(error)
    assert "gloss" not in str(error), "fields of a later format are no faults of the file"
    with pytest.raises(RecordError, match="pip install --upgrade rfmedsam2"):
        Wall.parse({"paint": {"format": found, "color": "RED"}, "height": "tall"})


def test_a_field_of_another_format_is_a_fault() -> None:
    with pytest.raises(RecordError, match="colour"):
        Paint.parse({"format": 2, "colour": "red", "color": "RED"})
    with pytest.raises(RecordError, match="colour"):  # not taken for one another, whichever comes last
        Paint.parse({"format": 1, "colour": "red", "color": "blue"})
    with pytest.raises(RecordError, match="colour"):
        Paint.parse({"format": 3, "colour": "RED"})


def test_keys_are_renamed_in_their_order() -> None:
    assert list(renamed({"a": 1, "b": 2, "c": 3}, {"b": "x", "d": "y"}).items()) == [("a", 1), ("x", 2), ("c", 3)]
    assert renamed({"a": 1, "x": 2}, {"a": "x"}) == {"a": 1, "x": 2}


@pytest.mark.parametrize(
    ("jitter", "scale_range"), [({"smallest": 0.5}, (0.5, 2.0)), ({"largest": 1.0}, (0.1, 1.0)), ({}, (0.1, 2.0))]
)
def test_a_plan_of_format_1_may_name_one_end_of_the_scales(jitter, scale_range) -> None:
    plain = {"format": 1, "method": "hq_sam", "backbone": "vit_b", "guidance": {"kind": "prompts"}, "train": {}}
    assert RefinerPlan.parse(plain | {"jitter": jitter}).jitter == JitterConfig(scale_range=scale_range)
    assert RefinerPlan.parse(plain | {"jitter": None}).jitter is None


@pytest.mark.parametrize("size", [0, (1 << 16) + 1, 10**12])
def test_a_batch_beyond_reason_is_a_fault(size) -> None:
    """A batch of 10**12 images was drawn until memory ran out."""
    plan = {"method": "hq_sam", "backbone": "vit_b", "prompting": {"kind": "prompts"}, "train": {}}
    assert RefinerPlan.parse(plan | {"batch_size": 1 << 16}).batch_size == 1 << 16
    with pytest.raises(RecordError, match="batch_size: "):
        RefinerPlan.parse(plan | {"batch_size": size})
