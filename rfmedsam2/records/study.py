"""What a study of prompts found: zero-shot SAM and SAM 2 by kind and number of prompts (RFMedSAM 2 paper, Table 1)."""

from __future__ import annotations

from typing import Literal

from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.report import CaseMetrics, Interval

PromptKind = Literal["box", "point"]
Prompted = Literal["all", "two", "one"]
"""Of the frames that a class appears on, those with a prompt."""
Step2 = Literal["none", "unprompted", "all"]
"""Which frames are segmented with memories of others; none: SAM has no memory."""


class StudyRow(Record):
    """One model with one way of prompting."""

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
    """The file prompt_study.json."""

    format: Literal[1] = 1
    dataset: str
    cases: tuple[str, ...]
    channels: tuple[str, ...]
    """What the three colors were made of."""
    window: str
    """How intensities became 0 to 255."""
    empty_policy: str
    seconds: dict[str, float]
    """Checkpoint -> seconds for all cases and rows."""
    rows: tuple[StudyRow, ...]
