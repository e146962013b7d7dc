"""The manifest of a model archive."""

from __future__ import annotations

from typing import Literal

from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.prediction import PredictingModel
from rfmedsam2.system.file_names import Name


class ArchivedFile(Record):
    """One file in the archive."""

    name: str
    """Path below the model folder, with forward slashes; `store.archive.MEMBER` says which are allowed."""
    bytes: int
    sha256: str


class ArchivedModel(Record):
    """One model of an archived ensemble, or the first stage of a cascade among them."""

    folder: Name
    """Its folder in the archive."""
    dataset: Name
    plan: Name
    stage: Name
    models: tuple[PredictingModel, ...]


class Manifest(VersionedRecord):
    """Contents of manifest.json, the first file in the archive."""

    format: Literal[1] = 1
    kind: Literal["rfmedsam2 model"] = "rfmedsam2 model"
    dataset: Name
    plan: Name
    stage: Name
    models: tuple[PredictingModel, ...]
    """Empty for an ensemble."""
    members: tuple[ArchivedModel, ...] = ()
    """Of an ensemble."""
    code_version: str
    created: str
    """UTC, ISO 8601, of the newest checkpoint: the same model gives the same archive."""
    files: tuple[ArchivedFile, ...]
