"""Converted networks that are kept: only whole ones, made from the same, in a folder where nobody else writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rfmedsam2.inference.backends import cache as module
from rfmedsam2.inference.backends.cache import NETWORK, RECORD, WEIGHTS, ConversionCache, ConversionRecord

MADE_FROM = {"weights": "a", "versions": "1"}


def keep(cache: ConversionCache, made_from: dict[str, str] = MADE_FROM, content: bytes = b"weights") -> None:
    def write(folder: Path) -> None:
        (folder / NETWORK).write_bytes(b"<net/>")
        (folder / WEIGHTS).write_bytes(content)

    cache.store(ConversionRecord(made_from=made_from, seconds={"cpu": {"torch": 2.0, "openvino": 1.0}}), write)


def folder_of(cache: ConversionCache) -> Path:
    kept = cache.find(MADE_FROM)
    assert kept is not None
    return kept.folder


def test_what_is_kept_is_found_by_all_that_it_was_made_from(tmp_path) -> None:
    keep(ConversionCache(tmp_path))
    cache = ConversionCache(tmp_path)
    kept = cache.find(MADE_FROM)
    assert kept is not None
    assert kept.record.seconds == {"cpu": {"torch": 2.0, "openvino": 1.0}}
    assert (kept.folder / WEIGHTS).read_bytes() == b"weights"
    for other in ({"weights": "b", "versions": "1"}, {"weights": "a", "versions": "2"}, {"weights": "a"}):
        assert cache.find(other) is None


@pytest.mark.parametrize("name", [NETWORK, WEIGHTS, RECORD])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_what_is_damaged_is_made_again(tmp_path, name, damage) -> None:
    cache = ConversionCache(tmp_path)
    keep(cache)
    path = folder_of(cache) / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-2] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    assert cache.find(MADE_FROM) is None
    keep(cache)
    assert cache.find(MADE_FROM) is not None


def test_a_record_of_other_weights_in_its_place_is_not_trusted(tmp_path) -> None:
    cache = ConversionCache(tmp_path)
    keep(cache)
    path = folder_of(cache) / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made_from": {"weights": "b", "versions": "1"}}))
    assert cache.find(MADE_FROM) is None


def test_a_fault_is_remembered_without_files(tmp_path) -> None:
    cache = ConversionCache(tmp_path)
    cache.store(ConversionRecord(made_from=MADE_FROM, seconds={}, fault="the operation aten::x"))
    kept = cache.find(MADE_FROM)
    assert kept is not None
    assert kept.record.fault == "the operation aten::x"


def test_a_failed_write_leaves_nothing_and_stops_nothing(tmp_path, caplog) -> None:
    cache = ConversionCache(tmp_path)

    def full(folder: Path) -> None:
        (folder / NETWORK).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    cache.store(ConversionRecord(made_from=MADE_FROM, seconds={}), full)
    assert "is not kept" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_where_others_may_write_is_not_read(tmp_path, caplog) -> None:
    keep(ConversionCache(tmp_path))
    (tmp_path / "openvino").chmod(0o777)
    cache = ConversionCache(tmp_path)
    assert cache.folder is None
    assert cache.find(MADE_FROM) is None
    assert "chmod 700" in caplog.text


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path) -> None:
    keep(ConversionCache(tmp_path / "elsewhere"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "openvino").symlink_to(tmp_path / "elsewhere" / "openvino")
    assert ConversionCache(tmp_path / "mine").find(MADE_FROM) is None


def test_without_a_folder_nothing_is_kept() -> None:
    cache = ConversionCache(None)
    keep(cache)
    assert cache.find(MADE_FROM) is None


def test_seconds_of_another_machine_are_added(tmp_path) -> None:
    cache = ConversionCache(tmp_path)
    keep(cache)
    kept = cache.find(MADE_FROM)
    assert kept is not None
    cache.add_seconds(kept, "other", {"torch": 1.0, "openvino": 3.0})
    again = cache.find(MADE_FROM)
    assert again is not None
    assert set(again.record.seconds) == {"cpu", "other"}


def test_the_longest_unused_goes_where_room_is_short(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LIMIT_BYTES", 5000)
    cache = ConversionCache(tmp_path)
    names = ({"weights": "1"}, {"weights": "2"}, {"weights": "3"})
    keep(cache, names[0], b"x" * 2000)
    keep(cache, names[1], b"x" * 2000)
    assert cache.find(names[0]) is not None  # used now
    keep(cache, names[2], b"x" * 2000)
    assert [cache.find(name) is not None for name in names] == [True, False, True]
