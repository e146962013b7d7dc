"""Tables fit a terminal of 80 columns, and are never broken in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rfmedsam2.cli import console
from rfmedsam2.pipeline.evaluation.bootstrap import summarize
from rfmedsam2.records.report import CaseMetrics, ClassMetrics, Evaluation, Interval

LONGEST = "portal_vein_and_splenic_vein"
"""Of BTCV's class names."""


def evaluation(name: str) -> Evaluation:
    unit = Interval(mean=0.81234, low=0.71234, high=0.91234, cases=24)
    found: dict[str, Interval] = {"dsc": unit, "iou": unit, "nsd": unit}
    found["hd95_mm"] = Interval(mean=123.456, low=1.0, high=250.0, cases=24)
    case = CaseMetrics(id="x", reference="", prediction="", classes={})
    return Evaluation.model_construct(
        classes={name: found}, mean=found, cases=(case,) * 24, confidence=0.95, nsd_tolerance_mm=2.0
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


def test_every_mean_shows_how_many_it_counts(monkeypatch, capsys):
    def scores(distance: float | None) -> ClassMetrics:
        dsc = 0.0 if distance is None else 0.9
        sizes = {"volume_error_ml": 0.0, "relative_volume_error": None, "reference_ml": 1.0, "predicted_ml": 1.0}
        return ClassMetrics(dsc=dsc, iou=dsc, nsd=dsc, hd95_mm=distance, **sizes)

    # 13 classes, of which 5 are never found and one in one of two cases
    distances = [[2.0] * 7 + [one] + [None] * 5 for one in (2.0, None)]
    cases = [
        CaseMetrics(id=str(i), reference="", prediction="", classes={f"c{k}": scores(d) for k, d in enumerate(row)})
        for i, row in enumerate(distances)
    ]
    classes, mean = summarize(cases, tuple(cases[0].classes))
    found = Evaluation(
        nsd_tolerance_mm=2, empty_policy="", confidence=0.95, bootstrap_samples=1, cases=tuple(cases), classes=classes,
        mean=mean, minimum_cases=5, trained_on=("0",),
    )  # fmt: skip
    stream = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=stream, width=80))
    console.show_scores(found)
    rows = {line.split()[0]: line for line in stream.getvalue().splitlines() if line.strip()}
    assert rows["c0"].split()[1:] == ["0.9000", "-", "0.9000", "0.9000", "2.0", "2"]
    assert "2.0 (1 of 2)" in rows["c7"]
    assert rows["c8"].split()[-2:] == ["-", "2"]
    assert "2.0 (2, 8/13 classes)" in rows["mean"]
    notes = capsys.readouterr().out
    assert "Means of HD95 count 15 of 26 scores and 8 of 13 classes; the others are undefined." in notes
    assert "Confidence intervals of fewer than 5 cases are left out." in notes
    assert "The model was trained on 1 of these 2 cases (0)" in notes
