"""What a checkpoint says about itself: enough to predict without the training code."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rfmedsam2.records.base import Record
from rfmedsam2.records.plan import Plan


class CheckpointRecord(Record):
    """The header of a checkpoint file; the tensors beside it are weights and, while training, optimizer state."""

    format: Literal[1] = 1
    plan: Plan
    stage: str
    fold: str
    step: int
    """Optimizer steps done."""
    scores: dict[str, float] = Field(default_factory=dict)
    weights_sha256: str
    """Over the names, shapes and bytes of the model's tensors: the identity of the model."""
    code_version: str
    torch_version: str
    created: str
    """UTC, ISO 8601."""
