"""What a stored case was made from: the contents of its files and the plan's settings; and what has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from rfmedsam2.pipeline.preprocessing.case_reader import files_digest, source_files
from rfmedsam2.records.case import CaseRecord, SourceFile
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.case_files import Case

Files = Mapping[str, SourceFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """How a case differs from what it was preprocessed from.

    Attributes:
        files: names of source files whose contents or places among the channels have changed, or that were added or
            removed.
        settings: the plan now asks for another preprocessing.
        unknown: times of files or the plan have changed, and version 0.1, which made the case, kept no contents.
    """

    files: tuple[str, ...] = ()
    settings: bool = False
    unknown: bool = False


def changes_since(record: CaseRecord, case: Case, plan: Plan, stage: str) -> Changes:
    """Compare a stored case with its files and its plan; only files with a new modification time are read.

    Raises:
        ImageError: a file is missing or cannot be read.
    """
    if record.sources is None:
        return Changes(unknown=record.source != digest_by_times(case, plan, stage))
    now = source_files(case, record.sources)
    names = [*now, *(name for name in record.sources if name not in now)]
    differ = tuple(name for name in names if _contents(now.get(name)) != _contents(record.sources.get(name)))
    if not differ:  # channels that dataset.json lists in another order
        differ = tuple(name for name, then in zip(now, record.sources, strict=True) if name != then)
    return Changes(files=differ, settings=record.source != case_digest(record.sources, plan, stage))


def is_from(record: CaseRecord, case: Case, files: Files, plan: Plan, stage: str) -> bool:
    """Whether a stored case was made from these files by this plan."""
    if record.sources is None:
        return record.source == digest_by_times(case, plan, stage)
    return record.source == case_digest(files, plan, stage)


def case_digest(files: Files, plan: Plan, stage: str) -> str:
    """SHA-256 of name and contents of a case's files and of the preprocessing settings."""
    contents = [(name, *_contents(file)) for name, file in files.items()]
    return hashlib.sha256(f"{contents}\n{preprocessing_settings(plan, stage)}".encode()).hexdigest()


def digest_by_times(case: Case, plan: Plan, stage: str) -> str:
    """The digest of version 0.1: SHA-256 of the files' names, sizes and times and of the preprocessing settings."""
    return hashlib.sha256(f"{files_digest(case)}\n{preprocessing_settings(plan, stage)}".encode()).hexdigest()


def preprocessing_settings(plan: Plan, stage: str) -> str:
    """Text of all settings that affect a stage's arrays; stages with equal settings share the work."""
    config = plan.stages[stage]
    parts = {  # the keys are those of format 1: cases that were preprocessed by it stay valid
        "spacing": config.spacing_mm,
        "slices": config.is_2d,
        "normalisation": [n.model_dump(mode="json") for n in config.normalization],
        "resampling": config.resampling.model_dump(mode="json"),
        "transpose": plan.transpose_forward,
        "reorient": plan.reorient,
        "intensities": [i.model_dump(mode="json") for i in plan.intensities],
        "labels": plan.labels.model_dump(mode="json"),
    }
    return json.dumps(parts, sort_keys=True)


def _contents(file: SourceFile | None) -> tuple[int, str] | tuple[()]:
    return () if file is None else (file.size, file.sha256)
