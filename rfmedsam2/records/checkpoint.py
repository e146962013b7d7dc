"""Records in checkpoint headers: plan, stage, fold and progress; enough to predict without the training code."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

from pydantic import Field

from rfmedsam2.records.base import VersionedRecord
from rfmedsam2.records.plan import Plan

STAGE_CHANGEABLE = {"train", "validation", "inference", "compute"}
"""Fields of a Stage that may change on resume; `train` is compared separately."""


class TrainedRecord(VersionedRecord):
    """Fields of every checkpoint; each kind of training adds its own."""

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


class CheckpointRecord(TrainedRecord):
    """Record of a volume model's checkpoint, whose tensors are weights and, to resume, optimizer state."""

    plan: Plan
    stage: str
    fold: str

    def identity(self) -> dict[str, Any]:
        """Plan, stage and fold."""
        plan = self.plan.model_dump(mode="json")
        stages = plan.pop("stages")
        stage = {k: v for k, v in stages[self.stage].items() if k not in STAGE_CHANGEABLE}
        return {"stage": self.stage, "fold": self.fold, "plan": plan, f"plan.stages.{self.stage}": stage}
