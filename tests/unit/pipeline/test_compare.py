"""Paired comparison of two sets of predictions: figures known by hand, cases of one side, refusals, files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from support.commands import run_error, run_ok

from rfmedsam2 import compare
from rfmedsam2.errors import RecordError, UsageError
from rfmedsam2.pipeline.evaluation.evaluate import evaluate
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PredictionsRecord
from rfmedsam2.records.report import Comparison, Evaluation

LABELS = LabelSet(names={"background": 0, "a": 1, "b": 2})


def write(path: Path, *, shift_a: int = 0, shift_b: int | None = None) -> None:
    """A 3x3x3 block of a, shifted by 0 to 3 voxels: DSC 1, 2/3, 1/3, 0; and one of b, if it is not None."""
    array = np.zeros((6, 6, 20), np.uint8)
    array[1:4, 1:4, 1 + shift_a : 4 + shift_a] = 1
    if shift_b is not None:
        array[1:4, 1:4, 11 + shift_b : 14 + shift_b] = 2
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Six cases; only c0 and c1 have a `b`. A is 2 voxels off; B is 1 off in c0 to c3, equal in c4, worse in c5."""
    a, b, references = (tmp_path / name for name in ("A", "B", "references"))
    for i in range(6):
        has_b = 0 if i < 2 else None
        write(references / f"c{i}.nii.gz", shift_b=has_b)
        write(a / f"c{i}.nii.gz", shift_a=2, shift_b=has_b)
        write(b / f"c{i}.nii.gz", shift_a={4: 2, 5: 3}.get(i, 1), shift_b=None if has_b is None else 3)
    return a, b, references


def test_figures_known_by_hand(folders: tuple[Path, Path, Path]) -> None:
    a, b, references = folders
    found = compare(a, b, references, LABELS)
    of_a = found.classes["a"]["dsc"]
    # A: 1/3 six times; B: 2/3 four times, 1/3, 0; differences 1/3 x 4, 0, -1/3
    assert of_a.mean_a == pytest.approx(1 / 3)
    assert of_a.mean_b == pytest.approx((4 * 2 / 3 + 1 / 3) / 6)
    assert of_a.difference.mean == pytest.approx((4 / 3 - 1 / 3) / 6)
    assert (of_a.wins, of_a.ties, of_a.losses, of_a.difference.cases) == (4, 1, 1, 6)
    of_b = found.classes["b"]["dsc"]
    assert (of_b.mean_a, of_b.mean_b, of_b.difference.mean) == pytest.approx((1.0, 0.0, -1.0))
    assert (of_b.wins, of_b.ties, of_b.losses, of_b.difference.cases) == (0, 0, 2, 2)
    assert of_b.difference.low is None
    assert of_b.difference.high is None
    # case means over the classes: A (1/3 + 1) / 2, B (2/3 + 0) / 2 in c0 and c1, where B loses 1/3
    mean = found.mean["dsc"]
    assert mean.difference.mean == pytest.approx((2 * -1 / 3 + 2 * 1 / 3 + 0 - 1 / 3) / 6)
    assert (mean.wins, mean.ties, mean.losses) == (2, 1, 3)


def test_the_interval_is_that_of_the_paired_mean(tmp_path: Path) -> None:
    # a case is bad for both or good for both, and B is always better by 1/3: no doubt about the difference
    for i in range(6):
        write(tmp_path / "references" / f"c{i}.nii.gz")
        write(tmp_path / "A" / f"c{i}.nii.gz", shift_a=3 if i % 2 else 1)
        write(tmp_path / "B" / f"c{i}.nii.gz", shift_a=2 if i % 2 else 0)
    found = compare(tmp_path / "A", tmp_path / "B", tmp_path / "references", LABELS).classes["a"]["dsc"].difference
    assert (found.low, found.mean, found.high) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_a_smaller_distance_wins(folders: tuple[Path, Path, Path]) -> None:
    a, b, references = folders
    found = compare(a, b, references, LABELS).classes["a"]["hd95_mm"]
    assert found.difference.mean == pytest.approx((4 * -1 + 0 + 1) / 6)
    assert (found.wins, found.ties, found.losses) == (4, 1, 1)


def test_cases_of_one_side_are_left_out_and_named(folders: tuple[Path, Path, Path]) -> None:
    a, b, references = folders
    (a / "c0.nii.gz").unlink()
    (b / "c5.nii.gz").unlink()
    found = compare(a, b, references, LABELS)
    assert [case.id for case in found.cases] == ["c1", "c2", "c3", "c4"]
    assert (found.only_a, found.only_b) == (("c5",), ("c0",))
    assert any("only in A" in note and "c5" in note for note in found.notes)
    assert any("only in B" in note and "c0" in note for note in found.notes)
    # four cases: fewer than an interval needs
    assert found.classes["a"]["dsc"].difference.low is None
    assert any("fewer than 5" in note for note in found.notes)


def test_evaluations_are_compared_as_their_label_maps_are(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, b, references = folders
    for name, path in (("ea", a), ("eb", b)):
        evaluate(path, references, LABELS, out=tmp_path / name)
    expected = compare(a, b, references, LABELS)
    for first, second in ((tmp_path / "ea", tmp_path / "eb"), (tmp_path / "ea" / "metrics.json", tmp_path / "eb")):
        found = compare(first, second)
        assert (found.classes, found.mean) == (expected.classes, expected.mean)


def test_what_cannot_be_compared_is_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, b, references = folders
    with pytest.raises(UsageError, match="need references"):
        compare(a, b)
    with pytest.raises(UsageError, match="do not exist"):
        compare(a, tmp_path / "nowhere", references)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(a, tmp_path / "empty", references, LABELS)
    write(tmp_path / "others" / "z.nii.gz")
    write(tmp_path / "both" / "z.nii.gz")
    with pytest.raises(UsageError, match="no case in common"):
        compare(a, tmp_path / "others", references, LABELS)
    with pytest.raises(UsageError, match=r"None of the label maps has a reference.*names as in .*others"):
        compare(a, b, tmp_path / "others", LABELS)
    with pytest.raises(UsageError, match=r"not in both A and B.*c9"):
        compare(a, b, references, LABELS, cases=["c0", "c9"])
    evaluate(a, references, LABELS, out=tmp_path / "ea")
    evaluate(b, references, LABELS, out=tmp_path / "eb", nsd_tolerance_mm=1.0)
    with pytest.raises(UsageError, match=r"different rules.*nsd_tolerance_mm"):
        compare(tmp_path / "ea", tmp_path / "eb")
    for i in range(6):  # references without the class b
        write(tmp_path / "changed" / f"c{i}.nii.gz")
    evaluate(b, tmp_path / "changed", LABELS, out=tmp_path / "ec")
    with pytest.raises(UsageError, match=r"different references.*2 of 6 case\(s\): c0, c1"):
        compare(tmp_path / "ea", tmp_path / "ec")


def test_the_command_prints_and_writes(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, b, references = folders
    dataset = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": 6}
    (references / "dataset.json").write_text(json.dumps({**dataset, "labels": {"background": 0, "a": 1, "b": 2}}))
    words = (a, b, "-g", references, "--root", tmp_path)
    out = run_ok("compare", *words, "-o", tmp_path / "out").out
    (row,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["a"]]
    assert row[:4] == ["a", "0.3333", "0.5000", "+0.1667"]
    assert row[-2:] == ["4/1/1", "6"]
    with (tmp_path / "out" / "comparison.csv").open(newline="") as stream:
        rows = {(r["case"], r["class"], r["metric"]): r for r in csv.DictReader(stream)}
    assert len(rows) == 6 * 2 * 4
    assert float(rows["c5", "a", "dsc"]["difference"]) == pytest.approx(-1 / 3)
    assert rows["c5", "b", "dsc"]["difference"] == ""
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    stored = Comparison.load(tmp_path / "out" / "comparison.json")
    assert Comparison.from_json(run_ok("compare", *words, "--json").out) == stored
    run_ok("compare", *words, "-o", tmp_path / "out")  # its own files are replaced
    (tmp_path / "out" / "comparison.json").write_text("{}")
    assert "did not make" in run_error("compare", *words, "-o", tmp_path / "out")
    assert "rfmed_compare A B" in run_error("compare", a, "-g", references)


SWAPPED = r"tables of A and B contradict.*liver is 1 in A .*and 2 in B .*spleen is 2 in A .*and 1 in B"
TABLES: dict[str, dict[str, int | tuple[int, ...]]] = {
    "A": {"background": 0, "liver": 1, "spleen": 2},
    "B": {"background": 0, "spleen": 1, "liver": 2},
}


@pytest.fixture
def swapped(tmp_path: Path) -> Path:
    """A and B predict and name the values 1 and 2 in opposite ways; the references have no table, and equal volumes."""
    for name in ("A", "B", "references"):
        write(tmp_path / name / "c0.nii.gz", shift_b=0)
    for name, labels in TABLES.items():
        declare(tmp_path / name, labels)
    return tmp_path


def declare(folder: Path, labels: Mapping[str, int | tuple[int, ...]]) -> None:
    content = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "labels": {**labels}}
    (folder / "dataset.json").write_text(json.dumps(content))


def test_tables_beside_label_maps_that_contradict_each_other_are_refused(swapped: Path) -> None:
    a, b, references = (swapped / name for name in ("A", "B", "references"))
    with pytest.raises(UsageError, match=SWAPPED):
        compare(a, b, references)
    found = run_error("compare", a, b, "-g", references, "--root", swapped, "-o", swapped / "out")
    assert "liver is 1 in A" in found
    assert not (swapped / "out").exists()
    for name, labels in TABLES.items():  # the same in what rfmed_predict writes
        (swapped / name / "dataset.json").unlink()
        PredictionsRecord(
            dataset="d", plan="p", stage="s", labels=labels, models=(), options={}, made_by="", code_version="",
            cases={},
        ).save(swapped / name / "predictions.json")  # fmt: skip
    with pytest.raises(UsageError, match=SWAPPED):
        compare(a, b, references)
    (b / "predictions.json").unlink()
    declare(b, {"background": 0, "kidney": 1, "spleen": 2})
    with pytest.raises(UsageError, match=r"1 is liver in A .*and kidney in B"):
        compare(a, b, references)
    declare(b, {"background": 0, "liver": 1, "spleen": 2})
    assert compare(a, b, references).mean["dsc"].mean_b == 1.0


def test_evaluations_by_tables_that_contradict_each_other_are_refused(swapped: Path) -> None:
    a, b, references = (swapped / name for name in ("A", "B", "references"))
    for path in (a, b):
        evaluate(path, references, out=swapped / f"scores{path.name}")
    scores = swapped / "scoresA", swapped / "scoresB" / "metrics.json"
    for first, second in (scores, (scores[0], b), (a, scores[1])):
        with pytest.raises(UsageError, match=SWAPPED):
            compare(first, second, references)
    # an evaluation of an earlier version records no table: that beside its label maps says what was meant
    stored = Evaluation.load(scores[1])
    assert stored.labels == LabelSet(names=TABLES["B"])
    earlier = stored.model_dump(mode="json", exclude={"labels"})
    scores[1].write_text(json.dumps(earlier))
    with pytest.raises(UsageError, match=SWAPPED):
        compare(*scores)
    (b / "dataset.json").unlink()
    (note,) = [note for note in compare(*scores).notes if "which values" in note]
    assert note.startswith("The evaluation of B does not record")


def test_an_evaluation_by_numbers_is_not_compared_with_other_numbers(tmp_path: Path) -> None:
    for name in ("A", "B", "references"):
        write(tmp_path / name / "c0.nii.gz", shift_b=0)
    declare(tmp_path / "B", {"background": 0, "1": 2, "2": 1})
    with pytest.raises(UsageError, match=r"1 is 1 in A .*and 2 in B"):
        compare(tmp_path / "A", tmp_path / "B", tmp_path / "references")


def test_undefined_scores_are_counted(tmp_path: Path) -> None:
    labels = LabelSet(names={"background": 0, "a": 1, "b": 2, "c": 3})
    for i in range(5):  # A finds b in c0 alone, B everywhere; c is nowhere
        write(tmp_path / "references" / f"c{i}.nii.gz", shift_b=0)
        write(tmp_path / "A" / f"c{i}.nii.gz", shift_b=None if i else 0)
        write(tmp_path / "B" / f"c{i}.nii.gz", shift_a=1, shift_b=0)
    sides = tmp_path / "A", tmp_path / "B", tmp_path / "references"
    found = compare(*sides, labels)
    assert found.notes == (
        "Means of DSC, IoU, NSD count 10 of 15 pairs of scores and 2 of 3 classes; the others are undefined in A or B.",
        "Means of HD95 count 6 of 15 pairs of scores and 2 of 3 classes; the others are undefined in A or B.",
    )
    assert (found.mean["hd95_mm"].difference.cases, found.mean["hd95_mm"].difference.classes) == (5, 2)
    declare(sides[2], {"background": 0, "a": 1, "b": 2, "c": 3})
    out = run_ok("compare", *sides[:2], "-g", sides[2], "--metric", "hd95_mm", "--root", tmp_path).out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert rows["b"].rstrip().endswith("1 of 5")
    assert rows["mean"].rstrip().endswith("5, 2/3 classes")
    assert "Means of HD95 count 6 of 15 pairs" in out


@pytest.mark.parametrize(("metric", "value"), [("dsc", 7.5), ("nsd", -0.1), ("iou", float("nan")), ("hd95_mm", -1.0)])
def test_scores_that_cannot_be_are_refused(
    folders: tuple[Path, Path, Path], tmp_path: Path, metric: str, value: float
) -> None:
    a, _, references = folders
    evaluation = evaluate(a, references, LABELS)
    data = evaluation.model_dump(mode="json")
    data["cases"][0]["classes"]["a"][metric] = value
    (tmp_path / "metrics.json").write_text(json.dumps(data))
    with pytest.raises(RecordError, match=metric):
        compare(tmp_path / "metrics.json", tmp_path / "metrics.json")
