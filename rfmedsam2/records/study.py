"""Results of the prompt study: zero-shot SAM and SAM 2 by kind and number of prompts (RFMedSAM 2 paper, Table 1)."""

from __future__ import annotations

from typing import Literal

from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.report import CaseMetrics, Interval

PromptKind = Literal["box", "point"]
Prompted = Literal["all", "two", "one"]
"""Which of the slices that contain a class get a prompt."""
Step2 = Literal["none", "unprompted", "all"]
"""Which slices are segmented with memories of others; none: SAM, which has no memory."""


class StudyRow(Record):
    """Results of one model with one kind and number of prompts."""

    model: str
    """MobileSAM, SAM ViT-B, SAM 2 tiny ..."""
    checkpoint: str
    prompts: PromptKind
    prompted: Prompted
    step2: Step2
    mean: Interval
    """DSC: mean over cases of each case's mean over classes."""
    classes: dict[str, Interval]
    """Class -> DSC, mean over cases."""
    cases: tuple[CaseMetrics, ...]


class PromptStudy(VersionedRecord):
    """Contents of prompt_study.json."""

    format: Literal[1] = 1
    dataset: str
    cases: tuple[str, ...]
    channels: tuple[str, ...]
    """Image channels that became the three color channels."""
    window: str
    """How intensities were mapped to 0 to 255."""
    empty_policy: str
    seconds: dict[str, float]
    """Checkpoint -> seconds for all its cases and rows."""
    rows: tuple[StudyRow, ...]
