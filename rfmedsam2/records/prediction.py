"""Records of predictions: models, options and images (predictions.json), and the rule that postprocesses them."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

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
    id_in_training: bool = False
    """Whether a case of this id is among those that the model was trained on, as far as its checkpoints say it."""
    sha256: str | None = None
    """Digest of the label map as it was written, which tells a correction by hand; None in older records."""
    probabilities_sha256: str | None = None
    """Digest of the file of probabilities; None in older records and without one."""


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


ENSEMBLE = "ensemble.json"
"""File that makes a folder an ensemble, a model that consists of others."""


class EnsembleRecord(VersionedRecord):
    """Contents of ensemble.json: the models whose probabilities are averaged."""

    format: Literal[1] = 1
    dataset: Name
    members: Annotated[tuple[Name, ...], Field(min_length=2)]
    """Folders of models, in the folder of this record or, where it has none of that name, beside that folder."""
    folds: tuple[Name, ...] = ()
    """Folds of each; none: all that are there."""


POSTPROCESSING = "postprocessing.json"
"""File of a rule in the folder of the model whose label maps it is applied to."""


class PostprocessingStep(Record):
    """One change of a label map. What is removed becomes background.

    Components are connected by faces, edges or corners (26 neighbors), holes by faces. keep_largest keeps the largest
    component, and those of the same size. drop_small removes components below `smallest_ml`. fill_holes gives
    background that is enclosed on all sides the value that is most frequent around it.
    """

    action: Literal["keep_largest", "drop_small", "fill_holes"]
    of: str | None = None
    """A class or region; None: the whole foreground, as one mask."""
    smallest_ml: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Of drop_small: volume in ml."""
    gain: float | None = None
    """Rise of the mean DSC with this step in validation, of `of`, or of all classes; no part of the rule."""

    @model_validator(mode="after")
    def _volume_belongs_to_drop_small(self) -> Self:
        if (self.smallest_ml is None) == (self.action == "drop_small"):
            raise ValueError(f"{self.action} {'needs' if self.action == 'drop_small' else 'has no'} smallest_ml")
        return self

    def __str__(self) -> str:
        what = {
            "keep_largest": "keep the largest component",
            "drop_small": "drop components",
            "fill_holes": "fill holes",
        }
        volume = "" if self.smallest_ml is None else f" below {self.smallest_ml:g} ml"
        return f"{what[self.action]} of {self.of or 'the foreground'}{volume}"


class PostprocessingRule(VersionedRecord):
    """Changes that are made to every label map of a dataset, one after the other."""

    format: Literal[1] = 1
    dataset: Name
    labels: dict[str, int | tuple[int, ...]]
    """Class name -> value in the label maps, or the values of a region."""
    regions_class_order: tuple[int, ...] | None = None
    ignore: int | None = None
    steps: tuple[PostprocessingStep, ...]
    cases: int = 0
    """Number of validation cases that the steps were learned on; 0: written by hand."""

    @model_validator(mode="after")
    def _classes_are_known(self) -> Self:
        unknown = sorted({step.of for step in self.steps if step.of is not None} - set(self.label_set.foreground))
        if unknown:
            raise ValueError(f"steps name classes that labels does not: {', '.join(unknown)}")
        return self

    @property
    def label_set(self) -> LabelSet:
        """The labels as a `LabelSet`."""
        return LabelSet(names=self.labels, regions_class_order=self.regions_class_order, ignore=self.ignore)

    @property
    def digest(self) -> str:
        """SHA-256 of what the rule does, whatever it was learned on."""
        steps = [step.model_dump(mode="json", exclude={"gain"}) for step in self.steps]
        return hashlib.sha256(json.dumps([sorted(self.label_set.foreground.items()), steps]).encode()).hexdigest()
