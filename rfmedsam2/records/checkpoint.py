"""Records in checkpoint headers: plan, stage, fold and progress; enough to predict without the training code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.plan import Plan
from rfmedsam2.system.file_names import Name

STAGE_CHANGEABLE = {"train", "validation", "inference", "compute", "cases_of"}
"""Fields of a Stage that may change on resume; `train` is compared separately."""


class TrainedRecord(VersionedRecord):
    """Fields of every checkpoint; each kind of training adds its own."""

    trained_by: ClassVar[str] = "this task"
    """What writes such checkpoints."""

    format: Literal[1] = 1
    step: int
    """Completed optimizer steps."""
    scores: dict[str, float] = Field(default_factory=dict)
    weights_sha256: str
    """SHA-256 of the names, shapes and bytes of the model's tensors: the identity of the model."""
    code_version: str
    torch_version: str
    created: str
    """UTC, ISO 8601."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain data that must be equal on resume; the training configuration is compared separately."""


class TaskRecord(TrainedRecord):
    """The header of a checkpoint of a task that says nothing of what it was trained by."""

    def identity(self) -> dict[str, Any]:
        """Nothing: whoever trains into a folder vouches that it is the same training."""
        return {}


class TrainedCases(Record):
    """The cases of a training: id -> identity of the preprocessed arrays (`CaseRecord.contents`)."""

    train: dict[str, str]
    val: dict[str, str]

    def part_of(self, name: str) -> str:
        """What a case is in this training, in words."""
        parts = [part for part, cases in (("training", self.train), ("validation", self.val)) if name in cases]
        return f"in {' and '.join(parts)}" if parts else "in neither part"

    def learned_in(self, trainings: Mapping[str, Mapping[str, str]], dataset: str) -> set[str]:
        """Those of its cases that other trainings learned: by id within its own dataset, elsewhere by their arrays.

        Args:
            trainings: dataset -> cases, as in `CheckpointRecord.learned_before`.
            dataset: that of these cases.
        """
        arrays = {contents for cases in trainings.values() for contents in cases.values()}
        own, ids = self.train | self.val, trainings.get(dataset, {})
        return {name for name, contents in own.items() if name in ids or contents in arrays}


class CheckpointRecord(TrainedRecord):
    """Record of a volume model's checkpoint, whose tensors are weights and, to resume, optimizer state."""

    trained_by: ClassVar[str] = "rfmed_train"

    plan: Plan
    stage: Name
    fold: Name
    cases: TrainedCases | None = None
    """None in checkpoints of version 0.1, and in exported models, which name nobody's cases."""
    step0: str | None = None
    """Digest of the fixed logits of Step 0 that it learns from; None: it learns from none."""
    previous_labels: str | None = None
    """Digest of the first stage's labels that the second stage of a cascade learns from; None: it is none."""
    started_from: str | None = None
    """`weights_sha256` of the trained model that it was fine-tuned from; None: from none."""
    learned_before: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Dataset -> cases that the weights it began with had learned, as in `TrainedCases`."""

    @model_validator(mode="after")
    def _stage_is_planned(self) -> Self:
        if self.stage not in self.plan.stages:
            raise ValueError(f"stage {self.stage} is not in the plan, which has {', '.join(self.plan.stages)}")
        return self

    def learned(self) -> dict[str, dict[str, str]]:
        """Dataset -> cases that the weights have learned, here or before, as far as checkpoints say it."""
        own = {} if self.cases is None else {self.plan.dataset: self.cases.train}
        return merged_cases([self.learned_before, own])

    def known_from_before(self) -> set[str]:
        """Cases of this training that the weights it began with had learned."""
        return set() if self.cases is None else self.cases.learned_in(self.learned_before, self.plan.dataset)

    def identity(self) -> dict[str, Any]:
        """Plan, stage, fold, fixed logits and labels; the cases are compared before training begins."""
        plan = self.plan.model_dump(mode="json")
        plan.pop("fingerprint")  # versions make different digests of the same files
        stages = plan.pop("stages")
        stage = {k: v for k, v in stages[self.stage].items() if k not in STAGE_CHANGEABLE}
        own = {"stage": self.stage, "fold": self.fold, "plan": plan, f"plan.stages.{self.stage}": stage}
        learnt = {"logits of Step 0": self.step0, "labels of the first stage": self.previous_labels}
        return own | {name: digest for name, digest in learnt.items() if digest is not None}


def merged_cases(learned: Iterable[Mapping[str, Mapping[str, str]]]) -> dict[str, dict[str, str]]:
    """Dataset -> cases, of several models."""
    found: dict[str, dict[str, str]] = {}
    for cases_of in learned:
        for dataset, cases in cases_of.items():
            found.setdefault(dataset, {}).update(cases)
    return found
