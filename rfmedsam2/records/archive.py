"""The manifest of a model archive."""

from __future__ import annotations

from typing import Literal

from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.prediction import PredictingModel


class ArchivedFile(Record):
    """One file in the archive."""

    name: str
    """Path below the model folder, with forward slashes."""
    bytes: int
    sha256: str


class Manifest(VersionedRecord):
    """Contents of manifest.json, the first file in the archive."""

    format: Literal[1] = 1
    kind: Literal["rfmedsam2 model"] = "rfmedsam2 model"
    dataset: str
    plan: str
    stage: str
    models: tuple[PredictingModel, ...]
    code_version: str
    created: str
    """UTC, ISO 8601, of the newest checkpoint: the same model gives the same archive."""
    files: tuple[ArchivedFile, ...]
