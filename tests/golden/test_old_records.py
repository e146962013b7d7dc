"""Every record that version 0.1 wrote is read and written back in today's format; a later one asks for an update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import run_error

from rfmedsam2.errors import CheckpointError, RecordError
from rfmedsam2.pipeline.datasets.splits import read_splits
from rfmedsam2.records.archive import Manifest
from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.box_prompts import BoxPromptFile
from rfmedsam2.records.case import CaseRecord, Step0Record, ViewsRecord
from rfmedsam2.records.checkpoint import CheckpointRecord, TaskRecord, TrainedRecord
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.plan import Plan
from rfmedsam2.records.prediction import EnsembleRecord, PostprocessingRule, PredictionsRecord
from rfmedsam2.records.report import Comparison, Evaluation, Selection
from rfmedsam2.records.study import PromptStudy
from rfmedsam2.records.verify import VerifyReport
from rfmedsam2.store.archive import read_manifest
from rfmedsam2.store.checkpoint_header import read_header, record_sha256
from rfmedsam2.system.atomic import read_record, write_record
from segment_anything_hq.records import (
    METHODS,
    EvaluationRecord,
    ImagePredictions,
    PrecisionRecord,
    RefinerPlan,
    RefinerRecord,
)

PREPROCESSED = Path("medical/root/preprocessed/Dataset900_PhantomCT")
KEPT: dict[str, type[Record]] = {
    f"{PREPROCESSED}/cpu.json": Plan,
    f"{PREPROCESSED}/rfmedsam2_cpu.json": Plan,
    f"{PREPROCESSED}/rfmed_fingerprint.json": Fingerprint,
    f"{PREPROCESSED}/dataset.json": DatasetJson,
    f"{PREPROCESSED}/cpu_3d_fullres/phantom_001.json": CaseRecord,
    f"{PREPROCESSED}/rfmedsam2_cpu_3d_fullres/phantom_001.json": CaseRecord,
    "medical/verify.json": VerifyReport,
    "medical/boxes.json": BoxPromptFile,
    "medical/predictions/unet/predictions.json": PredictionsRecord,
    "medical/predictions/rfmedsam2/predictions.json": PredictionsRecord,
    "medical/predictions/by_boxes/predictions.json": PredictionsRecord,
    "medical/evaluation/metrics.json": Evaluation,
    "medical/prompt_study/prompt_study.json": PromptStudy,
    "natural/training/plan.json": RefinerPlan,
    **{f"natural/plans/{method}.json": RefinerPlan for method in METHODS},
    "natural/predictions/predictions.json": ImagePredictions,
    "natural/evaluation/evaluation.json": EvaluationRecord,
    "natural/precision.json": PrecisionRecord,
}
RESULTS = "medical/root/results/Dataset900_PhantomCT"
CHECKPOINTS: dict[str, type[TrainedRecord]] = {
    f"{RESULTS}/cpu__3d_fullres/fold_0/checkpoint_final.safetensors": CheckpointRecord,
    f"{RESULTS}/rfmedsam2_cpu__3d_fullres/fold_0/checkpoint_final.safetensors": CheckpointRecord,
    "medical/broken_fold_0/checkpoint_latest.safetensors": CheckpointRecord,
    "natural/training/checkpoint_final.safetensors": RefinerRecord,
}
INTRODUCED: dict[type[VersionedRecord], str] = {
    TaskRecord: "0.2.0",
    Comparison: "0.2.0",
    Step0Record: "0.2.0",
    ViewsRecord: "0.2.0",
    PostprocessingRule: "0.2.0",
    Selection: "0.2.0",
    EnsembleRecord: "0.2.0",
}
"""Kinds of record that version 0.1 did not have, with the version whose format 1 is their first."""


def newest(record: Record) -> object:
    return type(record).model_fields["format"].default if isinstance(record, VersionedRecord) else None


def all_kinds(base: type[VersionedRecord] = VersionedRecord) -> set[type[VersionedRecord]]:
    return {kind for child in base.__subclasses__() for kind in (all_kinds(child) or {child})}


def without_new(after: object, before: object) -> object:
    """What was written back without the optional fields that version 0.1 did not have."""
    if isinstance(after, dict) and isinstance(before, dict):
        return {key: without_new(value, before[key]) for key, value in after.items() if key in before}
    if isinstance(after, list) and isinstance(before, list) and len(after) == len(before):
        return [without_new(*pair) for pair in zip(after, before, strict=True)]
    return after


@pytest.mark.parametrize("name", KEPT)
def test_every_record_is_read_and_written_back_in_todays_format(name, format_1, tmp_path) -> None:
    kind = KEPT[name]
    record = read_record(format_1 / name, kind)
    if kind is BoxPromptFile:
        return  # written by people alone
    write_record(tmp_path / "again.json", record)
    assert read_record(tmp_path / "again.json", kind) == record
    before, after = (json.loads(path.read_text()) for path in (format_1 / name, tmp_path / "again.json"))
    if isinstance(record, VersionedRecord):
        assert before.pop("format") == 1
        assert after.pop("format") == newest(record)
    if kind not in (Plan, RefinerPlan, PrecisionRecord, DatasetJson):
        assert without_new(after, before) == before, "no field of these has changed"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_is_read(name, format_1) -> None:
    header = read_header(format_1 / name, CHECKPOINTS[name])
    assert header.record.step in (2, 13, 30)
    assert newest(header.record.plan) == header.record.plan.format  # type: ignore[attr-defined]


def test_the_manifest_of_an_archive_is_read(format_1) -> None:
    manifest = read_manifest(format_1 / "medical/model.zip")
    assert (manifest.format, manifest.dataset) == (1, "Dataset900_PhantomCT")


def test_splits_are_read(format_1) -> None:
    splits = read_splits(format_1 / PREPROCESSED / "splits_final.json")
    assert [len(split.val) for split in splits] == [1] * 5


def test_a_file_of_every_kind_of_version_0_1_is_kept() -> None:
    kept = {kind for kind in (*KEPT.values(), *CHECKPOINTS.values()) if issubclass(kind, VersionedRecord)}
    ours = {kind for kind in all_kinds() if not kind.__module__.startswith("test")}
    assert ours - set(INTRODUCED) == kept | {Manifest}


@pytest.mark.parametrize("kind", INTRODUCED)
def test_a_newer_kind_has_had_one_format_only(kind) -> None:
    assert kind.upgrades == (), "keep a file of its format 1 and list it in KEPT or CHECKPOINTS, not in INTRODUCED"


def test_renamed_fields_keep_their_values(format_1) -> None:
    stage = read_record(format_1 / PREPROCESSED / "rfmedsam2_cpu.json", Plan).stages["3d_fullres"]
    assert stage.sampling.max_prompted_objects == 96
    assert [n.kind for n in stage.normalization] == ["ct"]
    record = read_header(format_1 / "natural/training/checkpoint_final.safetensors", RefinerRecord).record
    assert (record.plan.views_per_object, record.plan.prompting.max_clicks) == (1, 20)  # type: ignore[union-attr]
    plan = read_record(format_1 / "natural/plans/hq_sam.json", RefinerPlan)
    assert plan.jitter is not None
    assert (plan.prompting.kind, plan.jitter.scale_range) == ("prompts", (0.1, 2.0))
    assert read_record(format_1 / "natural/precision.json", PrecisionRecord).images == 4


@pytest.mark.parametrize("name", [name for name, kind in KEPT.items() if issubclass(kind, VersionedRecord)])
def test_a_record_of_a_later_format_asks_for_an_update(name, format_1, tmp_path) -> None:
    content = json.loads((format_1 / name).read_text())
    (tmp_path / "later.json").write_text(json.dumps(content | {"format": 3}))
    with pytest.raises(RecordError, match=r"Found format 3\. Update the package"):
        read_record(tmp_path / "later.json", KEPT[name])


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("where", ["record", "plan"])
def test_a_checkpoint_of_a_later_format_asks_for_an_update(where, name, format_1, tmp_path) -> None:
    data = (format_1 / name).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    record = json.loads(header["__metadata__"]["record"])
    (record if where == "record" else record["plan"])["format"] = 3
    text = json.dumps(record)
    header["__metadata__"] |= {"record": text, "record_sha256": record_sha256(text)}
    packed = json.dumps(header).encode()
    (tmp_path / "later.safetensors").write_bytes(len(packed).to_bytes(8, "little") + packed + data[8 + length :])
    with pytest.raises(CheckpointError, match="Update the package"):
        read_header(tmp_path / "later.safetensors", CHECKPOINTS[name])


def test_a_command_asks_for_the_update(copy_of) -> None:
    root = copy_of("medical/root")
    path = root / PREPROCESSED.relative_to("medical/root") / "cpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    sentence = run_error("train", "3d_fullres", "fold", 0, "-p", "cpu", "--root", root)
    assert "written by a later version" in sentence
    assert "pip install --upgrade rfmedsam2" in sentence
    assert str(path) in sentence
