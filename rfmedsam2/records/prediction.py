"""Record of a folder of predictions (predictions.json): models, options and source images."""

from __future__ import annotations

from typing import Literal

from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.system.file_names import FileName, Name


class PredictingModel(Record):
    """One network of the ensemble."""

    fold: Name
    step: int
    weights_sha256: str
    checkpoint: str
    """File name."""


class PredictedCase(Record):
    """One predicted label map."""

    file: FileName
    """File name of the label map, in the folder of this record."""
    probabilities: FileName | None = None
    """File name of the probabilities: blosc2, (K, Z, Y, X) float16."""
    inputs: tuple[str, ...]
    """Names of the image files."""
    input_sha256: str
    made_by: str
    """Digest of model and options; `PredictionsRecord.made_by` unless another run made this case."""
    shape_zyx: tuple[int, int, int]
    seconds: dict[str, float]
    """Seconds by phase: read, prepare, network, export, write."""
    warnings: tuple[str, ...] = ()
    """Reasons to doubt that the image is of the kind that the model was trained on."""
    sha256: str | None = None
    """Digest of the label map as it was written, which tells a correction by hand; None in older records."""


PREDICTIONS = "predictions.json"


class PredictionsRecord(VersionedRecord):
    """Contents of predictions.json, in the folder of the label maps."""

    format: Literal[1] = 1
    dataset: Name
    plan: Name
    stage: Name
    labels: dict[str, int | tuple[int, ...]]
    """Class name -> value in the label maps, or the values of a region."""
    regions_class_order: tuple[int, ...] | None = None
    """For regions: the value painted for each."""
    ignore: int | None = None
    """Value of voxels without annotation in the training labels."""
    models: tuple[PredictingModel, ...]
    options: dict[str, float | int | bool | str]
    made_by: str
    """Digest of model and options of the last run."""
    code_version: str
    cases: dict[Name, PredictedCase]

    @property
    def label_set(self) -> LabelSet:
        """The labels as a `LabelSet`."""
        return LabelSet(names=self.labels, regions_class_order=self.regions_class_order, ignore=self.ignore)
