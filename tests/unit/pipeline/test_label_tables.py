"""Label tables beside label maps: which one holds, and that no two contradict each other in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rfmedsam2.errors import RecordError, UsageError
from rfmedsam2.pipeline.datasets.label_agreement import LabelTable, contradictions
from rfmedsam2.pipeline.evaluation.label_tables import agreed_labels
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PredictionsRecord


def table(source: str = "x", *, ignore: int | None = None, **names: int | tuple[int, ...]) -> LabelTable:
    order = tuple(range(1, len(names) + 1)) if any(isinstance(v, tuple) for v in names.values()) else None
    labels = LabelSet(names={"background": 0, **names}, regions_class_order=order, ignore=ignore)
    return LabelTable(labels=labels, source=source)


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (table(liver=6), table("y", spleen=6), ["6 is liver in x and spleen in y"]),
        (table(liver=6), table("y", liver=1), ["liver is 6 in x and 1 in y"]),
        (table(a=1, b=2), table("y", a=2, b=1), ["a is 1 in x and 2 in y", "b is 2 in x and 1 in y"]),
        (table(liver=1), table("y", liver=1, spleen=2), []),
        (table(liver=1, spleen=2), table("y", liver=1), []),
        (table(left_kidney=3), table("y", **{"Left Kidney": 3}), []),
        (table(**{"caf\u00e9 1": 3}), table("y", **{"cafe\u0301 1": 3}), []),
        (table(a=1, ignore=2), table("y", a=1, b=2), ["2 is ignore in x and b in y"]),
        (table(a=1, ignore=2), table("y", a=1), []),
        (table(whole=(1, 2), core=2), table("y", edema=1, core=2), []),
        (table(**{"T+": 1, "T-": 2}), table("y", **{"T-": 2, "T+": 1}), []),
        (
            table(**{"T+": 1, "T-": 2}),
            table("y", **{"T-": 1, "T+": 2}),
            ["T+ is 1 in x and 2 in y", "T- is 2 in x and 1 in y"],
        ),
        (table(**{"+": 1}), table("y", **{"-": 1}), ["1 is + in x and - in y"]),
        (table(**{"🫁": 1}), table("y", **{"🫀": 1}), ["1 is 🫁 in x and 🫀 in y"]),
        (table(**{"kidney (left)": 1}), table("y", Kidney_left=1), []),
        (table(whole=(1, 2), core=2), table("y", whole=(1, 2), core=2), []),
        (
            table(whole=(1, 2), core=2),
            LabelTable(
                labels=LabelSet(names={"background": 0, "whole": (1, 2), "core": 2}, regions_class_order=(2, 1)),
                source="y",
            ),
            ["whole is painted with 1 in x and 2 in y", "core is painted with 2 in x and 1 in y"],
        ),
        (table(whole=(1, 2), core=2), table("y", whole=(1, 2, 3), core=2), ["whole is 1, 2 in x and 1, 2, 3 in y"]),
    ],
)
def test_contradictions_name_the_pairs(one, other, found):
    assert contradictions(one, other) == found


def declare(folder: Path, **names: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, **names}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def predicted(folder: Path, **names: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    PredictionsRecord(
        dataset="d", plan="p", stage="s", labels={"background": 0, **names}, models=(), options={}, made_by="",
        code_version="", cases={},
    ).save(folder / "predictions.json")  # fmt: skip
    return folder


def test_tables_that_disagree_are_refused_wherever_they_lie(tmp_path):
    predictions = predicted(tmp_path / "preds", liver=6)
    references = declare(tmp_path / "refs", spleen=6)
    inside = tmp_path / "refs" / "labelsTs"
    inside.mkdir()
    for folder in (references, inside):
        with pytest.raises(UsageError, match=r"contradict.*6 is spleen in .*dataset\.json and liver in .*predictions"):
            agreed_labels(predictions, folder)
    with pytest.raises(UsageError, match=r"6 is spleen in the given table and liver in .*predictions\.json"):
        agreed_labels(predictions, tmp_path / "elsewhere", table(spleen=6).labels)
    with pytest.raises(UsageError, match="contradict"):  # a copy of the dataset.json of the training, as nnU-Net makes
        agreed_labels(declare(tmp_path / "nnunet", liver=6), references)


def test_the_given_table_comes_before_the_references_before_the_predictions(tmp_path):
    predictions, references = (
        predicted(tmp_path / "a" / "preds", liver=1),
        declare(tmp_path / "b" / "refs", liver=1, x=2),
    )
    given = table(liver=1, y=3).labels
    assert agreed_labels(predictions, references, given) == given
    assert list(agreed_labels(predictions, references).names) == ["background", "liver", "x"]
    (references / "dataset.json").unlink()
    assert list(agreed_labels(predictions, references).names) == ["background", "liver"]
    (predictions / "predictions.json").unlink()
    assert agreed_labels(predictions, references) is None
    declare(tmp_path / "a", organ=1)  # above the predictions: better than nothing
    assert list(agreed_labels(predictions, references).names) == ["background", "organ"]


def test_a_table_above_the_labels_of_a_dataset_is_theirs(tmp_path):
    predictions = declare(tmp_path / "other", liver=2, spleen=1) / "labelsTr"
    predictions.mkdir()
    references = declare(tmp_path / "refs", liver=1, spleen=2)
    with pytest.raises(UsageError, match=r"liver is 1 in .*refs/dataset\.json and 2 in .*other/dataset\.json"):
        agreed_labels(predictions, references)
    elsewhere = tmp_path / "other" / "predictions"
    elsewhere.mkdir()
    assert agreed_labels(elsewhere, references) == table(liver=1, spleen=2).labels


def test_a_damaged_table_is_an_error_only_where_it_is_needed(tmp_path, caplog):
    predictions, references = tmp_path / "preds", tmp_path / "refs"
    predictions.mkdir()
    references.mkdir()
    (predictions / "predictions.json").write_text('{"what": "another program"}')
    with pytest.raises(RecordError, match=r"predictions\.json"):
        agreed_labels(predictions, references)
    given = table(liver=1).labels
    assert agreed_labels(predictions, references, given) == given
    assert "not compared" in caplog.text
