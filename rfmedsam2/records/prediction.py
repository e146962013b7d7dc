"""What lies beside predictions: which model made them, how, and from what."""

from __future__ import annotations

from typing import Literal

from rfmedsam2.records.base import Record


class PredictingModel(Record):
    """One of the networks that were averaged."""

    fold: str
    step: int
    weights_sha256: str
    checkpoint: str
    """File name."""


class PredictedCase(Record):
    """One label map."""

    file: str
    """File name of the label map, in the folder of this record."""
    probabilities: str | None = None
    """File name of the probabilities: blosc2, (K, Z, Y, X) float16."""
    inputs: tuple[str, ...]
    """Names of the image files."""
    input_sha256: str
    made_by: str
    """Digest of model and options; `PredictionsRecord.made_by` unless another run made this case."""
    shape_zyx: tuple[int, int, int]
    seconds: dict[str, float]
    """By part: read, prepare, network, export, write."""


class PredictionsRecord(Record):
    """The file predictions.json."""

    format: Literal[1] = 1
    dataset: str
    plan: str
    stage: str
    labels: dict[str, int | tuple[int, ...]]
    """Name -> value in the label maps, or the values of a region."""
    models: tuple[PredictingModel, ...]
    options: dict[str, float | int | bool | str]
    made_by: str
    """Digest of the last run's model and options."""
    code_version: str
    cases: dict[str, PredictedCase]
