"""Tables fit a terminal of 80 columns, and are never broken in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rfmedsam2.cli import console
from rfmedsam2.records.report import Evaluation, Interval

LONGEST = "portal_vein_and_splenic_vein"
"""Of BTCV's class names."""


def evaluation(name: str) -> Evaluation:
    unit = Interval(mean=0.81234, low=0.71234, high=0.91234, cases=24)
    found: dict[str, Interval] = {"dsc": unit, "iou": unit, "nsd": unit}
    found["hd95_mm"] = Interval(mean=123.456, low=1.0, high=250.0, cases=24)
    return Evaluation.model_construct(
        classes={name: found}, mean=found, cases=(), confidence=0.95, nsd_tolerance_mm=2.0
    )


def shown(monkeypatch: pytest.MonkeyPatch, name: str, *, terminal: bool) -> list[str]:
    stream = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=stream, width=80, force_terminal=terminal, color_system=None))
    console.show_scores(evaluation(name))
    return stream.getvalue().splitlines()


def test_scores_fit_eighty_columns(monkeypatch):
    lines = shown(monkeypatch, LONGEST, terminal=True)
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if LONGEST in line)
    assert row.split()[1:] == ["0.8123", "0.712-0.912", "0.8123", "0.8123", "123.5", "24"]


def test_no_line_is_broken_in_a_file(monkeypatch):
    name = "a_class_name_" * 10
    assert any(name in line for line in shown(monkeypatch, name, terminal=False))
