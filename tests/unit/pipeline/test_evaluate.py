"""Evaluating folders: pairing, faults in one error, files, confidence intervals."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from rfmedsam2.errors import DatasetError, StoreError, UsageError
from rfmedsam2.pipeline.datasets.label_agreement import LabelTable
from rfmedsam2.pipeline.evaluation.bootstrap import bootstrap, summarize
from rfmedsam2.pipeline.evaluation.evaluate import evaluate, find_pairs
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.report import CaseMetrics, ClassMetrics, Evaluation
from rfmedsam2.system.atomic import read_record

LABELS = LabelSet(names={"background": 0, "a": 1, "b": 2})
SPACING = (3.0, 1.0, 0.5)


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    SimpleITK.WriteImage(image, str(path))


def block(value: int = 1, start: int = 1, shape: tuple[int, int, int] = (4, 6, 8)) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[1:3, 1:4, start : start + 3] = value
    return array


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for i in range(3):
        write(references / f"case_{i}.nii.gz", block())
        write(predictions / f"case_{i}.nii.gz", block(start=1 + i))
    return predictions, references


def test_scores_and_files_of_a_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluation = evaluate(*folders, LABELS, out=out)
    assert [c.id for c in evaluation.cases] == ["case_0", "case_1", "case_2"]
    assert [c.classes["a"].dsc for c in evaluation.cases] == pytest.approx([1, 2 / 3, 1 / 3])
    assert evaluation.classes["a"]["dsc"].mean == pytest.approx(2 / 3)
    assert evaluation.classes["b"]["dsc"].mean is None
    assert evaluation.mean["dsc"].mean == pytest.approx(2 / 3)
    assert evaluation.cases[2].classes["a"].hd95_mm == pytest.approx(1.0)
    assert evaluation.cases[0].classes["a"].reference_ml == pytest.approx(18 * 1.5 / 1000)
    assert read_record(out / "metrics.json", Evaluation) == evaluation
    with (out / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 2 * len(ClassMetrics.model_fields)
    of_case = {(r["case"], r["class"], r["metric"]): r["value"] for r in rows}
    assert float(of_case["case_1", "a", "dsc"]) == pytest.approx(2 / 3)
    assert of_case["case_1", "b", "dsc"] == ""


def write_segments(path: Path, array: np.ndarray, **segments: int) -> None:
    """A segmentation of 3D Slicer, which names its values itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    for number, (name, value) in enumerate(segments.items()):
        for key, text in (("ID", f"S{number}"), ("Name", name), ("LabelValue", str(value)), ("Layer", "0")):
            image.SetMetaData(f"Segment{number}_{key}", text)
    SimpleITK.WriteImage(image, str(path))


@pytest.mark.parametrize("side", ["predictions", "references"])
def test_segments_that_contradict_the_label_table_are_not_scored(folders: tuple[Path, Path], side: str) -> None:
    folder = folders[0] if side == "predictions" else folders[1]
    (folder / "case_1.nii.gz").unlink()
    write_segments(folder / "case_1.seg.nrrd", block(2), A=2, b=1)
    with pytest.raises(
        DatasetError, match=rf"(?s)1 fault.*case_1: {side[:-1]}: .*A is 2, in the label table 1 "
    ) as caught:
        evaluate(*folders, LABELS)
    assert "b is 1" not in str(caught.value)  # no voxel has that value
    write_segments(folder / "case_1.seg.nrrd", block(1), A=1, another=2)
    assert [case.id for case in evaluate(*folders, LABELS).cases] == ["case_0", "case_1", "case_2"]


def test_segments_of_both_sides_are_compared_where_values_are_scored_by_number(folders: tuple[Path, Path]) -> None:
    for folder, segments in zip(folders, ({"liver": 1, "spleen": 2}, {"Liver": 2, "spleen": 1}), strict=True):
        (folder / "case_1.nii.gz").unlink()
        write_segments(folder / "case_1.seg.nrrd", block(1), **segments)
    with pytest.raises(DatasetError, match=r"case_1: prediction: .*liver is 1, in the reference 2 "):
        evaluate(*folders)


def test_formats_may_differ_between_the_folders(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (predictions / "case_0.nii.gz").unlink()
    (predictions / "case_1.nii.gz").unlink()
    write(predictions / "case_0.nrrd", block())
    write(predictions / "case_1.mha", block())
    evaluation = evaluate(predictions, references, LABELS)
    assert [c.classes["a"].dsc for c in evaluation.cases] == pytest.approx([1, 1, 1 / 3])


def test_two_single_files_are_a_pair(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate(folders[0] / "case_1.nii.gz", folders[1] / "case_0.nii.gz", LABELS)
    assert evaluation.cases[0].classes["a"].dsc == pytest.approx(2 / 3)


def test_all_faults_of_all_cases_come_in_one_error_and_nothing_is_written(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    predictions, references = folders
    write(predictions / "case_0.nii.gz", block(value=7))
    write(predictions / "case_1.nii.gz", block(shape=(4, 6, 9)))
    (predictions / "case_2.nii.gz").unlink()
    write(references / "case_3.nii.gz", block())
    (predictions / "case_3.nii.gz").write_bytes(b"\x1f\x8b broken")
    write(references / "case_4.nii.gz", block())
    write(predictions / "case_4.nii.gz", block(), spacing=(3.0, 2.0, 0.5))
    out = tmp_path / "out"
    with pytest.raises(DatasetError, match="5 fault") as caught:
        evaluate(predictions, references, LABELS, out=out)
    lines = str(caught.value).splitlines()
    expected = {
        "case_0": "prediction holds 7",
        "case_1": "(4, 6, 8) against (4, 6, 9)",
        "case_2": "no prediction",
        "case_3": "case_3.nii.gz",
        "case_4": "spacing",
    }
    for case, words in expected.items():
        assert any(case in line and words in line for line in lines), (case, lines)
    assert not out.exists()


def test_prediction_without_reference_is_a_warning(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    write(folders[0] / "stranger.nii.gz", block())
    with caplog.at_level(logging.WARNING):
        evaluation = evaluate(*folders, LABELS)
    assert len(evaluation.cases) == 3
    assert evaluation.warnings == ("stranger.nii.gz: no reference, skipped",)
    assert "stranger" in caplog.text


@pytest.mark.parametrize("which", [0, 1])
def test_links_that_lead_nowhere_are_faults(folders: tuple[Path, Path], which: int) -> None:
    """A reference that is such a link was left out of the means as if the case had none."""
    lost = folders[which] / "case_1.nii.gz"
    lost.unlink()
    lost.symlink_to(lost.with_name("nowhere"))
    with pytest.raises(DatasetError, match=r"(?s)case_1: .*does not exist.*a link to .*nowhere"):
        evaluate(*folders, LABELS)


def test_label_maps_that_are_their_own_references_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folders[1])
    for predictions in (folders[1], link):
        (warning,) = evaluate(predictions, folders[1], LABELS).warnings
        assert "3 of 3 label maps are compared with themselves" in warning
        assert "case_0, case_1, case_2" in warning
    (folders[0] / "case_1.nii.gz").unlink()
    (folders[0] / "case_1.nii.gz").symlink_to(folders[1] / "case_1.nii.gz")
    (warning,) = evaluate(*folders, LABELS).warnings
    assert "1 of 3 label maps are compared with themselves: prediction and reference are one file (case_1)" in warning


def test_named_cases_alone_are_scored(folders: tuple[Path, Path]) -> None:
    (folders[0] / "case_0.nii.gz").unlink()
    evaluation = evaluate(*folders, LABELS, cases=["case_2"])
    assert [c.id for c in evaluation.cases] == ["case_2"]
    with pytest.raises(DatasetError, match="case_9: no reference"):
        evaluate(*folders, LABELS, cases=["case_2", "case_9"])


def test_other_files_are_left_alone_and_doubled_ids_are_faults(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (predictions / "dataset.json").write_text("{}")
    (predictions / ".case_7.nii.gz").write_text("")
    write(predictions / "case_1.nrrd", block())
    pairs, faults, warnings = find_pairs(predictions, references)
    assert [p.id for p in pairs] == ["case_0", "case_1", "case_2"]
    assert len(faults) == 1
    assert "case_1.nii.gz, case_1.nrrd" in faults[0]
    assert warnings == []


def test_nothing_to_score_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no label maps"):
        evaluate(tmp_path / "empty", tmp_path / "empty", LABELS)
    with pytest.raises(UsageError, match="do not exist"):
        evaluate(tmp_path / "absent", tmp_path / "empty", LABELS)


def test_negative_tolerance_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="tolerance"):
        evaluate(*folders, LABELS, nsd_tolerance_mm=-1)


def test_unwritable_place_leaves_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Expected a folder"):
        evaluate(*folders, LABELS, out=tmp_path / "file" / "out")


def test_ignore_and_regions_reach_the_scores(tmp_path: Path) -> None:
    labels = LabelSet(names={"background": 0, "whole": (1, 2), "core": 2}, regions_class_order=(1, 2), ignore=3)
    reference, prediction = block(), block(value=2)
    reference[3] = 3
    prediction[3] = 1
    write(tmp_path / "r" / "x.nii.gz", reference)
    write(tmp_path / "p" / "x.nii.gz", prediction)
    scores = evaluate(tmp_path / "p", tmp_path / "r", labels).cases[0].classes
    assert (scores["whole"].dsc, scores["core"].dsc) == (1.0, 0.0)


def test_both_empty_as_perfect_enters_means_and_the_policy(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate(*folders, LABELS, both_empty="perfect")
    assert evaluation.classes["b"]["dsc"].mean == 1.0
    assert "count as 1" in evaluation.empty_policy


def _case(id: str, dsc_a: float | None, dsc_b: float | None) -> CaseMetrics:
    def scores(dsc: float | None) -> ClassMetrics:
        return ClassMetrics(
            dsc=dsc, iou=dsc, nsd=dsc, hd95_mm=None, volume_error_ml=0.0, relative_volume_error=None,
            reference_ml=1.0, predicted_ml=1.0,
        )  # fmt: skip

    return CaseMetrics(id=id, reference="r", prediction="p", classes={"a": scores(dsc_a), "b": scores(dsc_b)})


def test_undefined_scores_are_left_out_of_means() -> None:
    classes, mean = summarize([_case("1", 0.5, None), _case("2", 0.9, 0.1)], ("a", "b"))
    assert classes["a"]["dsc"].mean == pytest.approx(0.7)
    assert (classes["b"]["dsc"].mean, classes["b"]["dsc"].cases) == (pytest.approx(0.1), 1)
    assert mean["dsc"].mean == pytest.approx((0.5 + (0.9 + 0.1) / 2) / 2)
    assert mean["hd95_mm"].mean is None


def test_interval_is_seeded_and_near_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(0.8, 0.1, (200, 1))
    first, again = bootstrap(values)[0], bootstrap(values)[0]
    assert first == again
    assert first.low is not None
    assert first.high is not None
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert first.low == pytest.approx(values.mean() - half, abs=0.003)
    assert first.high == pytest.approx(values.mean() + half, abs=0.003)


def test_lengths_that_no_file_states_or_in_another_unit_are_named(tmp_path: Path) -> None:
    for name, edit in {
        "mm": lambda text: text,
        "um": lambda text: text.replace(b"ElementType", b"DistanceUnits = um\nElementType"),
        "silent": lambda text: re.sub(rb"ElementSpacing.*\n", b"", text),
    }.items():
        for side in ("references", "predictions"):
            path = tmp_path / side / f"{name}.mha"
            write(path, block())
            path.write_bytes(edit(path.read_bytes()))
    evaluation = evaluate(tmp_path / "predictions", tmp_path / "references", LABELS, workers=0)
    assert [text.split(";")[0] for text in evaluation.warnings] == [
        "silent: The file says nothing of its spacing",
        "um: The unit of length in the header, um, is not converted",
    ]
    write(tmp_path / "references" / "silent.mha", block())  # one of a pair is enough
    evaluation = evaluate(tmp_path / "predictions", tmp_path / "references", LABELS, workers=0)
    assert len(evaluation.warnings) == 1


@pytest.mark.parametrize("defined", range(8))
def test_intervals_of_few_cases_are_left_out(defined: int) -> None:
    values = np.full((7, 1), np.nan)
    values[:defined, 0] = np.linspace(0, 1, 7)[:defined]
    interval = bootstrap(values)[0]
    assert interval.cases == defined
    assert (interval.low is None) == (interval.high is None) == (defined < 5)
    assert (interval.mean is None) == (defined == 0)


def evaluation_of(cases: list[CaseMetrics]) -> Evaluation:
    classes, mean = summarize(cases, tuple(cases[0].classes))
    return Evaluation(
        nsd_tolerance_mm=2, empty_policy="", confidence=0.95, bootstrap_samples=2000, cases=tuple(cases),
        classes=classes, mean=mean, minimum_cases=5,
    )  # fmt: skip


def test_a_mean_says_how_many_classes_it_counts() -> None:
    cases = []
    for case in (_case(str(i), 0.9, 0.0) for i in range(3)):  # b is never found: it has no distance
        found = case.classes["a"].model_copy(update={"hd95_mm": 2.0})
        cases.append(case.model_copy(update={"classes": {**case.classes, "a": found}}))
    evaluation = evaluation_of(cases)
    assert (evaluation.mean["dsc"].classes, evaluation.mean["hd95_mm"].classes) == (2, 1)
    assert evaluation.mean["hd95_mm"].mean == pytest.approx(2.0)
    assert evaluation.classes["b"]["hd95_mm"].cases == 0
    [undefined, few] = evaluation.notes()
    assert undefined == "Means of HD95 count 3 of 6 scores and 1 of 2 classes; the others are undefined."
    assert few == "Confidence intervals of fewer than 5 cases are left out."


def test_scores_of_training_cases_say_so() -> None:
    evaluation = evaluation_of([_case(f"case{i}", 0.5, 0.5) for i in range(2)])
    assert not any("trained" in note for note in evaluation.notes())
    every = evaluation.model_copy(update={"trained_on": ("case0", "case1")}).notes()[0]
    assert every.startswith("The model was trained on 2 of these 2 cases: scores of training cases")
    assert "1 of these 2 cases (case1)" in evaluation.model_copy(update={"trained_on": ("case1",)}).notes()[0]


def test_without_a_table_every_value_is_scored_by_its_number(tmp_path: Path, caplog) -> None:
    large = 300 * block(start=5).astype(np.uint16)
    write(tmp_path / "r" / "x.nii.gz", block(7) + large)
    write(tmp_path / "p" / "x.nii.gz", block(7, start=2) + large)
    write(tmp_path / "r" / "y.nii.gz", block(12))
    write(tmp_path / "p" / "y.nii.gz", block(9))
    evaluation = evaluate(tmp_path / "p", tmp_path / "r")
    assert list(evaluation.classes) == ["7", "9", "12", "300"]
    assert evaluation.cases[0].classes["7"].dsc == pytest.approx(2 / 3)
    assert evaluation.cases[0].classes["300"].dsc == 1.0
    assert evaluation.cases[0].classes["9"].dsc is None  # neither map of this case holds it
    assert (evaluation.cases[1].classes["9"].dsc, evaluation.cases[1].classes["12"].dsc) == (0.0, 0.0)
    assert evaluation.classes["7"]["dsc"].cases == 1
    assert "scored under its number" in evaluation.warnings[0]
    assert "scored under its number" in caplog.text


def test_a_table_that_contradicts_is_refused_unless_the_caller_knows_better(folders, tmp_path: Path) -> None:
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "other": 1}, "file_ending": ".nii.gz"}
    (folders[1].parent / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"1 is a in the given table and other in .*dataset\.json"):
        evaluate(*folders, LABELS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    known = evaluate(*folders, LabelTable(labels=LABELS, source="the plan"))
    assert list(known.classes) == ["a", "b"]
    assert list(evaluate(*folders).classes) == ["other"]


def test_maps_of_background_alone_have_nothing_to_score(tmp_path: Path) -> None:
    for part in ("p", "r"):
        write(tmp_path / part / "x.nii.gz", np.zeros((4, 6, 8), np.uint8))
    with pytest.raises(UsageError, match="nothing to score"):
        evaluate(tmp_path / "p", tmp_path / "r")


def test_images_are_not_scored_by_number(tmp_path: Path) -> None:
    for part in ("p", "r"):
        write(tmp_path / part / "x.nii.gz", np.arange(1100, dtype=np.uint16).reshape(11, 10, 10))
    with pytest.raises(DatasetError, match=r"too many values.*at most 1000.*1099"):
        evaluate(tmp_path / "p", tmp_path / "r")


def test_a_name_like_a_formula_is_text_in_the_csv(tmp_path: Path) -> None:
    for part in ("p", "r"):
        write(tmp_path / part / "=1+1.nii.gz", block())
    evaluate(tmp_path / "p", tmp_path / "r", LabelSet(names={"background": 0, "@a": 1}), out=tmp_path / "out")
    with (tmp_path / "out" / "metrics.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    assert {(row[0], row[1]) for row in rows} == {("'=1+1", "'@a")}
    assert {row[3] for row in rows if row[2] == "dsc"} == {"1.0"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_names_that_are_not_utf_8_are_scored_and_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Archives of older systems unpack to such names; Python reads them as half characters."""
    old = os.fsdecode(b"caf\xe9")
    for folder in folders:
        (folder / "case_0.nii.gz").rename(folder / f"{old}.nii.gz")
    predictions = folders[0].rename(tmp_path / old)
    evaluation = evaluate(predictions, folders[1], LABELS, out=tmp_path / f"out{old}")
    assert [c.id for c in evaluation.cases] == [old, "case_1", "case_2"]
    assert read_record(tmp_path / f"out{old}" / "metrics.json", Evaluation) == evaluation
    assert r"caf\udce9" in (tmp_path / f"out{old}" / "metrics.csv").read_text(encoding="utf-8")
