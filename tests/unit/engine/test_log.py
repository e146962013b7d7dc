"""Metrics: a stream that can be cut and gone on with, and the table made from it."""

from __future__ import annotations

import csv
import json

import pytest

from rfmedsam2.engine.monitoring.log import MetricsLog, epoch_rows, read_events
from rfmedsam2.errors import StoreError


def step(number, loss=1.0):
    return {
        "event": "step",
        "step": number,
        "epoch": (number - 1) // 2,
        "loss": loss,
        "losses": {"dice": loss},
        "lr": 0.1,
        "seconds": 0.5,
        "memory_mb": 1.0,
    }


def validation(number):
    return {"event": "validation", "step": number, "epoch": (number - 1) // 2, "seconds": 1.0, "scores": {"score": 0.5}}


@pytest.fixture
def folder(tmp_path):
    log = MetricsLog(tmp_path)
    for event in (step(1, 1.0), step(2, 3.0), validation(2), step(3), step(4), validation(4)):
        log.write(event)
    log.close()
    return tmp_path


def steps(folder):
    return [(e["event"][0], e["step"]) for e in read_events(folder / "metrics.jsonl")]


def test_one_object_a_line_comes_back(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == step(2, 3.0)
    assert len(lines) == 6


def test_the_table_has_a_row_an_epoch_with_mean_losses(folder):
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [r["epoch"] for r in rows] == ["0", "1"]
    assert float(rows[0]["loss"]) == 2.0
    assert float(rows[0]["loss/dice"]) == 2.0
    assert float(rows[0]["seconds"]) == 1.0
    assert float(rows[0]["score"]) == 0.5
    assert epoch_rows(folder / "metrics.jsonl")[0]["loss"] == 2.0


@pytest.mark.parametrize(
    ("at", "keep_validation", "left"),
    [
        (0, True, []),
        (3, True, [("s", 1), ("s", 2), ("v", 2), ("s", 3)]),
        (2, True, [("s", 1), ("s", 2), ("v", 2)]),
        (2, False, [("s", 1), ("s", 2)]),
        (9, True, [("s", 1), ("s", 2), ("v", 2), ("s", 3), ("s", 4), ("v", 4)]),
    ],
)
def test_what_lies_behind_the_resumed_step_is_cut(folder, at, keep_validation, left):
    MetricsLog(folder, keep_step=at, keep_validation=keep_validation).close()
    assert steps(folder) == left
    assert len(epoch_rows(folder / "metrics.jsonl")) == len({(n - 1) // 2 for _, n in left})


def test_a_line_torn_by_a_crash_is_dropped(folder):
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "st')
    assert len(steps(folder)) == 6
    log = MetricsLog(folder, keep_step=4)
    log.write(step(5))
    log.close()
    assert steps(folder)[-2:] == [("v", 4), ("s", 5)]


def test_a_resumed_table_equals_an_unbroken_one(folder):
    before = (folder / "metrics.csv").read_text()
    log = MetricsLog(folder, keep_step=3)
    for event in (step(4), validation(4)):
        log.write(event)
    log.close()
    assert (folder / "metrics.csv").read_text() == before


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        MetricsLog(tmp_path / "file" / "run")
