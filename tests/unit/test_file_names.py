"""Names that come from files: one rule, and every field of every record that becomes part of a path follows it."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from rfmedsam2 import records
from rfmedsam2.errors import DatasetError, RecordError
from rfmedsam2.records.base import Record
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.plan import Split
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.input_discovery import find_cases
from rfmedsam2.system.file_names import FileEnding, FileName, Name, is_file_name, require_names

GOOD = ("case1", "sub-01_ses-2", "a..b", "MR 3", "case:1", "患者_001", "x" * 200, "~", "-o", "a.nii.gz", "con%2F")
BAD = ("", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "..\\x", "C:x", "c:\\x", "a\0b", "a\nb", "x" * 201, "é" * 101)
BAD += (".hidden", "\ud800", "/", "\\\\server\\x")

FREE = {
    "ArchivedFile.name": "checked by store.archive.MEMBER",
    "BoxPrompt.label": "compared with the names of labels",
    "CaseFingerprint.files": "compared with the names of files that are there",
    "CaseFingerprint.id": "shown and compared",
    "CaseMetrics.classes": "shown",
    "CaseMetrics.id": "compared with the names of files that are there",
    "CaseMetrics.prediction": "a path that the user gave to rfmed_evaluate",
    "CaseMetrics.prediction_sha256": "compared with that of a file",
    "CaseMetrics.reference_sha256": "compared with that of a file",
    "CaseMetrics.reference": "a path that the user gave to rfmed_evaluate",
    "CandidateScore.candidate": "shown",
    "CandidateScore.fold": "shown",
    "CandidateScore.name": "shown",
    "CaseRecord.source": "a digest",
    "CaseRecord.sources": "compared with the names of files that are there",
    "CheckpointRecord.learned_before": "shown and compared",
    "CheckpointRecord.previous_labels": "a digest",
    "CheckpointRecord.started_from": "a digest",
    "CheckpointRecord.step0": "a digest",
    "Comparison.a": "a path that the user gave to rfmed_compare",
    "Comparison.b": "a path that the user gave to rfmed_compare",
    "Comparison.classes": "shown",
    "Comparison.empty_policy": "shown",
    "Comparison.notes": "shown",
    "Comparison.only_a": "shown",
    "Comparison.only_b": "shown",
    "DatasetJson.channel_names": "shown",
    "DatasetJson.dataset": "keys are names; values are paths that nnU-Net allows anywhere, only read",
    "DatasetJson.groups": "compared with ids",
    "DatasetJson.labels": "shown",
    "DatasetJson.name": "shown",
    "DatasetJson.overwrite_image_reader_writer": "compared",
    "Evaluation.classes": "shown",
    "Evaluation.empty_policy": "shown",
    "Evaluation.mean": "shown",
    "Evaluation.trained_on": "shown",
    "Evaluation.warnings": "shown",
    "EvaluationRecord.data": "shown",
    "EvaluationRecord.data_words": "shown",
    "EvaluationRecord.network": "shown",
    "EvaluationRecord.protocols": "shown",
    "EvaluationRecord.looks_trained_on": "shown",
    "EvaluationRecord.trained_on": "shown",
    "Extension.name": "compared with installed entry points",
    "Extension.options": "checked by the extension",
    "Extension.package": "compared with installed packages",
    "Fault.case": "shown",
    "Fault.file": "shown",
    "Fault.message": "shown",
    "Fault.remedy": "shown",
    "Fingerprint.dataset": "shown",
    "Fingerprint.digest": "a digest",
    "Fingerprint.left_out": "shown",
    "ImagePredictions.embedding_seconds": "shown",
    "ImagePredictions.network": "shown",
    "LabelSet.names": "shown",
    "PairedCase.classes": "shown",
    "PairedCase.id": "shown and compared",
    "Plan.channels": "shown",
    "PostprocessingRule.labels": "shown and compared",
    "PostprocessingStep.of": "compared with the names of labels",
    "Selection.folds": "shown",
    "Selection.left_out": "shown",
    "Selection.notes": "shown",
    "Plan.fingerprint": "a digest",
    "Plan.name": "a rule of its own, which is narrower",
    "PrecisionRecord.annotations": "shown",
    "PrecisionRecord.detections": "shown",
    "PrecisionRecord.figures": "shown",
    "PrecisionRecord.network": "shown",
    "PredictedCase.input_sha256": "a digest",
    "PredictedCase.probabilities_sha256": "compared with that of a file",
    "PredictedCase.inputs": "shown",
    "PredictedCase.made_by": "a digest",
    "PredictedCase.seconds": "shown",
    "PredictedCase.warnings": "shown",
    "PredictedObject.image": "shown",
    "PredictingModel.checkpoint": "must be the name of a file in the archive",
    "PredictionsRecord.labels": "shown",
    "PredictionsRecord.made_by": "a digest",
    "PredictionsRecord.options": "shown",
    "PromptStudy.cases": "shown",
    "PromptStudy.channels": "shown",
    "PromptStudy.dataset": "shown",
    "PromptStudy.empty_policy": "shown",
    "PromptStudy.seconds": "shown",
    "PromptStudy.window": "shown",
    "RefinerRecord.base": "shown",
    "RefinerRecord.base_sha256": "a digest",
    "RefinerRecord.training_images": "digests",
    "RefinerRecord.training_looks": "digests",
    "ResultRecord.overall": "shown",
    "ResultRecord.overall_rule": "shown",
    "ResultRecord.rule": "shown",
    "ResultRecord.sets": "shown",
    "ResultRecord.skipped": "shown",
    "Step0Record.case": "a digest",
    "Step0Record.settings": "a digest",
    "Step0Record.weights": "a digest",
    "StudyRow.checkpoint": "shown",
    "StudyRow.classes": "shown",
    "StudyRow.model": "shown",
    "TrainConfig.rate_factors": "compared with the names of parameters",
    "TrainedCases.train": "compared with ids",
    "TrainedCases.val": "compared with ids",
    "VerifyReport.dataset": "shown",
    "ViewsRecord.settings": "compared with those of a training",
}
"""Text in records that never becomes part of a path that is written, and why."""
EVERYWHERE = {"code_version", "torch_version", "created", "device", "weights_sha256", "scores", "sha256"}
"""Fields of that name are shown or compared, in every record."""


@pytest.mark.parametrize("name", GOOD)
def test_names_of_cases_are_accepted(name: str) -> None:
    assert is_file_name(name)
    assert Case(id=name, images=(Path("x"),)).id == name
    require_names([name], where="list.json")


@pytest.mark.parametrize("name", BAD)
def test_paths_and_what_no_file_can_be_called_are_refused(name: str) -> None:
    assert not is_file_name(name)
    with pytest.raises(DatasetError, match="cannot be used as file names"):
        Case(id=name, images=(Path("x"),))
    with pytest.raises(RecordError, match="expected a plain name"):
        Split.parse({"train": ["a", name], "val": ["b"]})


def test_all_bad_names_of_a_file_are_told_at_once() -> None:
    with pytest.raises(DatasetError, match=r"2 name\(s\).*list\.json.*'\.\./a', '/b'"):
        require_names(["../a", "fine", "/b"], where="list.json")


@pytest.mark.parametrize(
    ("ending", "right"),
    [
        (".nii.gz", True),
        (".png", True),
        *((bad, False) for bad in ("", ".nii/../../x.nii", "/x", ".\\x", ".nii\0", "." + "x" * 30)),
    ],
)
def test_a_file_ending_is_the_end_of_a_name(ending: str, right: bool) -> None:
    text = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ending}
    if right:
        assert DatasetJson.parse(text).file_ending == ending
    else:
        with pytest.raises(RecordError, match="file_ending: expected the end of a file name"):
            DatasetJson.parse(text)


@pytest.mark.parametrize("source", ["..", "/"])
def test_a_folder_without_a_name_is_no_case(tmp_path: Path, source: str) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(DatasetError, match=r"cannot be used as file names"):
        find_cases([tmp_path / "here" / source], channels=1, file_ending=None)


def record_classes() -> set[type[Record]]:
    """Every record of both packages."""
    for module in pkgutil.iter_modules(records.__path__):
        importlib.import_module(f"rfmedsam2.records.{module.name}")
    importlib.import_module("segment_anything_hq.records")

    def below(kind: type[Record]) -> Iterator[type[Record]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return {kind for kind in below(Record) if kind.__module__.split(".")[-2:][-1] != "nnunet_plans"}


def free_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> bool:
    """Whether a field may hold text of any kind."""
    safe = [m for kind in (Name, FileName, FileEnding) for m in get_args(kind)[1:]]
    if any(m in safe for m in metadata):
        return False
    if annotation is str or annotation is Any:
        return True
    if hasattr(annotation, "__metadata__"):
        return free_text(get_args(annotation)[0], annotation.__metadata__)
    if get_origin(annotation) is None or str(annotation).startswith("typing.Literal"):
        return False
    return any(free_text(part) for part in get_args(annotation) if part is not Ellipsis)


def test_every_text_of_every_record_is_a_name_or_never_a_path() -> None:
    packages = ("rfmedsam2.records", "segment_anything_hq")
    ours = {kind for kind in record_classes() if kind.__module__.startswith(packages)}
    found = {
        f"{next(k for k in kind.__mro__ if name in k.__annotations__).__name__}.{name}"
        for kind in ours
        for name, field in kind.model_fields.items()
        if name not in EVERYWHERE and free_text(field.annotation, tuple(field.metadata))
    }
    assert found - FREE.keys() == set(), "say in FREE why these never become paths, or give them a type of file_names"
    assert FREE.keys() - found == set()


def test_the_walk_sees_names() -> None:
    fields = {k.__name__: k.model_fields for k in record_classes()}
    for record, name in (("Plan", "dataset"), ("Plan", "file_ending"), ("CaseRecord", "id"), ("Split", "train")):
        field = fields[record][name]
        assert not free_text(field.annotation, tuple(field.metadata))


def test_a_deeply_nested_record_is_a_sentence() -> None:
    text = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii", "note": 0}
    for depth, reason in ((200_000, "nested too deeply"), (300, "nested more than 100 deep")):
        nested = json.dumps(text).replace('"note": 0', f'"note": {"[" * depth}{"]" * depth}')
        with pytest.raises(RecordError, match=f"not valid JSON .brackets are {reason}"):
            DatasetJson.from_json(nested)
