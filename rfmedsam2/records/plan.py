"""The plan: one readable file with the whole configuration of preprocessing, network, training and prediction.

Every setting that a user may want to change is a field here. Tuples over axes are in the planned axis order
(`transpose_forward` applied to z, y, x), lengths are in mm. Defaults of training and augmentation are those of
RFMedSAM 2 (paper, appendix G) and, where the paper does not say, nnU-Net's.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from rfmedsam2.errors import PlanError, type_name
from rfmedsam2.records.base import Record, VersionedRecord, renamed
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.model import (
    Count,
    CustomConfig,
    ModelConfig,
    Positive,
    Probability,
    RFMedSam2Config,
    StageExtensions,
    SwinUNETRConfig,
    Whole,
)
from rfmedsam2.records.overrides import with_overrides
from rfmedsam2.records.training import DA5, Augmentation, AugmentationConfig, TrainConfig
from rfmedsam2.system.file_names import FileEnding, Name

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TAKEN_NAMES = ("dataset", "splits_final", "splits_named", "rfmed_fingerprint", "dataset_fingerprint")
"""Names of other files in the folder of plans."""
PLAN_NAMES = f"at most 100 letters, digits and . + - _ (no two together), but not {', '.join(TAKEN_NAMES)}"


def is_plan_name(name: str) -> bool:
    """Whether a plan may have this name, which becomes part of file and folder names (`PLAN__STAGE`)."""
    plain = re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", name, re.ASCII) is not None
    return plain and "__" not in name and name not in TAKEN_NAMES


class Normalization(Record):
    """How one channel's intensities are normalized (nnU-Net's schemes)."""

    kind: Literal["ct", "zscore", "rescale_0_1", "rgb_0_1", "none"]
    use_mask: bool = False
    """zscore only: statistics over the non-zero region; voxels outside stay 0."""


class Resampling(Record):
    """Orders of interpolation; order_z between slices where spacing is anisotropic beyond the threshold."""

    order_image: Literal[0, 1, 3] = 3
    order_label: Literal[0, 1] = 1
    order_logits: Literal[0, 1] = 1
    order_z: Literal[0, 1] = 0
    anisotropy_threshold: Positive = 3.0


class Sampling(Record):
    """How training patches are sampled."""

    oversample_foreground: Probability = 0.33
    """Fraction of a batch's patches that must contain a voxel of a random foreground class."""
    oversampling: Literal["last", "probabilistic"] = "last"
    """Which patches these are: the last of a batch, or each by chance (nnUNetTrainer_probabilisticOversampling)."""
    max_prompted_objects: Count | None = None
    """RFMedSAM 2: decode at most this many object prompts (one per slice and class) per batch; None: all."""
    prompted_runs: bool = False
    """Draw runs of consecutive slices with all classes, whose losses alone count; else (older plans) single prompts."""
    absent_share: Probability = 0.0
    """Without masks of Step 0: chance that an absent class is decoded too, padded (label -1), to be empty; paper: 1."""
    given_box_share: Probability = 0.0
    """With masks of Step 0: share of steps with the reference's boxes as a person's (`model.given_boxes`)."""


class SegmentationLoss(Record):
    """Cross-entropy + Dice (nnU-Net's; binary cross-entropy for regions), summed over deep supervision levels."""

    cross_entropy: float = 1.0
    dice: float = 1.0
    batch_dice: bool = True
    dice_smooth: float = 1e-5
    top_k: Annotated[float, Field(gt=0, le=100)] = 100.0
    """Percentage of the voxels over which cross-entropy is averaged, those where it is largest (nnU-Net's TopK: 10)."""
    focal_gamma: Weight = 0.0
    """Focal loss (Lin et al. 2017), often 2: cross-entropy times (1 - p) ** gamma, p of the true class."""
    tversky: tuple[Weight, Weight] = (0.5, 0.5)
    """Weights of false positives and of false negatives in Dice's place (Salehi et al. 2017); both 0.5: Dice."""
    class_balance: Probability = 0.0
    """Exponent b by which cross-entropy evens out classes: a voxel of a class with n voxels in the batch has weight
    n ** -b. 0: all voxels count the same, as in nnU-Net; 1: all classes do. Not for regions."""
    deep_supervision: bool = True
    """Level weights halve per level and sum to 1 (appendix G, eq. 2). Networks of libraries have one level."""
    lowest_level: bool = False
    """Whether the lowest level has a weight, as in eq. 2; false: none, as in nnU-Net."""


class Validation(Record):
    """Validation during and after training."""

    cases_while_training: int = 0
    """Number of full volumes predicted at each validation (0: patches only, nnU-Net's pseudo Dice)."""
    patches_while_training: Count = 50


class Inference(Record):
    """Sliding-window prediction."""

    step_size: Annotated[float, Field(gt=0, le=1)] = 0.5
    mirror: bool = True
    """Average over all flips of the augmentation's mirror axes."""
    tile_batch: Count = 1


class Compute(Record):
    """Memory and speed settings of RFMedSAM 2's refinement; they change results only by rounding."""

    memory_mb: Annotated[int, Field(ge=64)] = 2048
    """Working memory in MiB that limits how many object prompts (slice, class) SAM 2 decodes at a time."""
    checkpointing: bool = True
    """Activation checkpointing: recompute SAM 2's activations in the backward pass instead of storing them."""
    cache_features_mb: Whole = 0
    """Memory limit of the cache of a frozen encoder's features; 0: no cache."""


PlannedSpacing = Annotated[float, Field(gt=0, le=1e6)]
"""Millimeters; nothing larger than a kilometer is a distance between voxels."""


class Stage(Record):
    """One configuration of a plan: 2d, 3d_fullres, 3d_lowres ..."""

    spacing_mm: tuple[PlannedSpacing, PlannedSpacing, PlannedSpacing]
    median_shape: tuple[int, int, int]
    """Median shape of the training cases at this spacing."""
    patch_size: tuple[Count, ...]
    """Two entries for a 2D stage (slices along the first planned axis), else three."""
    batch_size: Count
    normalization: tuple[Normalization, ...]
    """One per channel."""
    resampling: Resampling = Resampling()
    sampling: Sampling = Sampling()
    augmentation: AugmentationConfig = Augmentation()
    model: ModelConfig
    loss: SegmentationLoss = SegmentationLoss()
    train: TrainConfig = TrainConfig()
    validation: Validation = Validation()
    inference: Inference = Inference()
    compute: Compute = Compute()
    extensions: StageExtensions = StageExtensions()
    cases_of: Name | None = None
    """Plan of the same dataset whose preprocessed cases are used, because it prepares them alike; None: its own."""
    starts_from: Name | None = None
    """RFMedSAM 2: name of the stage whose trained U-Net Step 0 starts from."""
    previous_stage: Name | None = None
    """Cascade: name of the stage whose labels are input to this one, one-hot behind the channels of the image."""

    @property
    def is_2d(self) -> bool:
        """Whether this stage processes single slices."""
        return len(self.patch_size) == 2

    @model_validator(mode="after")
    def _patch_fits_network(self) -> Self:
        if len(self.patch_size) != self.model.dimensions:
            raise ValueError(f"patch {self.patch_size} does not match a {self.model.dimensions}D network")
        for axis, (size, step) in enumerate(zip(self.patch_size, self.model.total_stride, strict=True)):
            if size % step:
                raise ValueError(f"patch axis {axis} is {size}, not a multiple of the network's total stride {step}")
        if isinstance(self.model, RFMedSam2Config) and self.patch_size[1] != self.patch_size[2]:
            raise ValueError(f"RFMedSAM 2 needs square slices, but the patch is {self.patch_size} (z, y, x)")
        if isinstance(self.model, SwinUNETRConfig) and math.prod(self.patch_size) == math.prod(self.model.total_stride):
            raise ValueError(f"SwinUNETR needs a patch that is larger than {self.patch_size} along one axis at least")
        return self

    @model_validator(mode="after")
    def _patch_is_wide_enough_for_da5(self) -> Self:
        if isinstance(self.augmentation, DA5) and min(self.patch_size) < DA5.least_side:
            least = f"augmentation da5 needs {DA5.least_side} voxels along every axis"
            raise ValueError(f"{least} for its median filter and local changes, but the patch is {self.patch_size}")
        return self

    @model_validator(mode="after")
    def _cascade_is_of_plain_networks(self) -> Self:
        if self.previous_stage is not None and isinstance(self.model, RFMedSam2Config | CustomConfig):
            found = f"previous_stage {self.previous_stage}, but the model is {self.model.kind}"
            raise ValueError(f"{found}: the second stage of a cascade is a U-Net, or MONAI's or Primus")
        return self

    @model_validator(mode="after")
    def _kept_features_stay_valid(self) -> Self:
        limit = self.compute.cache_features_mb
        if not limit or not isinstance(self.model, RFMedSam2Config):
            return self
        kept = f"compute.cache_features_mb {limit} (0: keep none)"
        if self.model.gradients_in_encoder:
            raise ValueError(
                f"{kept}, but features of an image encoder that learns cannot be kept: set model.freeze_backbone true, "
                "model.adapters.encoder and .channels false, with a backbone that has published weights"
            )
        changing = [f"augmentation.{name}" for name in self.augmentation.changes_of_frames]
        changing += ["extensions.augmentation"] * bool(self.extensions.augmentation)
        if changing:
            names = ", ".join(changing)
            raise ValueError(
                f"{kept}, but features cannot be kept while augmentation changes frames ({names}): set every "
                "probability 0 and mirror_axes [] or [0]"
            )
        return self


def _plan_1_to_2(data: dict[str, Any]) -> dict[str, Any]:
    """Rename `normalisation` to `normalization`, and `cells` in `sampling` to `max_prompted_objects`."""
    stages = data.get("stages")
    if isinstance(stages, dict):
        data["stages"] = {name: _stage_1_to_2(stage) for name, stage in stages.items()}
    return data


def _stage_1_to_2(stage: object) -> object:
    if not isinstance(stage, dict):
        return stage
    stage = renamed(stage, {"normalisation": "normalization"})
    if isinstance(sampling := stage.get("sampling"), dict):
        stage["sampling"] = renamed(sampling, {"cells": "max_prompted_objects"})
    return stage


class Plan(VersionedRecord):
    """The plan of one dataset, made by `rfmed_plan_and_preprocess` and used by every other command."""

    upgrades = (_plan_1_to_2,)

    format: Literal[2] = 2
    name: str
    """Name of the plan (file name without .json): rfmed, rfmed_cpu, nnunet ..."""
    dataset: Name
    """Folder name of the dataset, for instance Dataset004_Hippocampus."""
    fingerprint: str
    """Digest of the fingerprint that the plan was made from."""
    channels: tuple[str, ...]
    labels: LabelSet
    file_ending: FileEnding
    reorient: Literal["RAS"] | None = None
    """Reorient images when reading (nnU-Net's ...WithReorient readers); undone when writing."""
    transpose_forward: tuple[int, int, int] = (0, 1, 2)
    """Planned axis i is axis transpose_forward[i] of the file's z, y, x."""
    intensities: tuple[IntensityStatistics, ...]
    stages: dict[Name, Stage]

    @field_validator("name")
    @classmethod
    def _name_can_be_a_file(cls, name: str) -> str:
        if not is_plan_name(name):
            raise ValueError(f"{name!r} cannot be a plan's name: {PLAN_NAMES}")
        return name

    def cases_plan(self, stage: str) -> str:
        """Name of the plan whose preprocessed cases a stage uses.

        Raises:
            PlanError: the stage does not exist.
        """
        return self.stage(stage).cases_of or self.name

    def variant(self, name: str) -> Plan:
        """The plan for a training of its own: named PLAN-NAME, with the preprocessed cases of this one.

        Raises:
            PlanError: PLAN-NAME cannot be a plan's name.
        """
        if not name or not is_plan_name(f"{self.name}-{name}"):
            raise PlanError("Invalid name of a training", where=name, expected=PLAN_NAMES)
        stages = {key: s.model_copy(update={"cases_of": s.cases_of or self.name}) for key, s in self.stages.items()}
        return self.model_copy(update={"name": f"{self.name}-{name}", "stages": stages})

    def with_overrides(self, *assignments: str, name: str | None = None) -> Plan:
        """The plan with some figures changed.

        Args:
            assignments: each PATH=VALUE. PATH is a stage and its fields ("3d_fullres.train.epochs") or a field of the
                plan itself; items of lists are numbers ("3d_fullres.normalization.0.use_mask"). VALUE is JSON, or else
                a word. Changing a `kind` ("3d_fullres.train.optimizer.kind=adamw") takes the defaults of that kind.
            name: of the new plan; None: it keeps its name, and with it the preprocessed cases and results.

        Raises:
            UsageError: an assignment without "=", or a field that does not exist; lists what does.
            RecordError: a value that the field cannot have; lists all such.
        """
        where = f"plan {name or self.name}"
        plan = with_overrides(self, assignments, within="stages", where=where)
        return plan if name is None else Plan.parse(plan.model_dump(mode="json") | {"name": name}, where=where)

    def stage(self, name: str) -> Stage:
        """The stage (configuration) of this name.

        Raises:
            PlanError: the stage does not exist; lists the existing ones.
        """
        if not isinstance(name, str) or name not in self.stages:
            raise PlanError(
                f"The configuration does not exist in plan {self.name}",
                where=name if isinstance(name, str) else type_name(name),
                expected=f"one of {', '.join(self.stages)}",
            )
        return self.stages[name]

    def inputs_of(self, stage: Stage) -> int:
        """Channels that a stage's network is given: the image's, and in a cascade one per foreground label."""
        return len(self.channels) + (0 if stage.previous_stage is None else len(self.labels.values) - 1)

    @property
    def transpose_backward(self) -> tuple[int, int, int]:
        """Inverse of `transpose_forward`."""
        a, b, c = (self.transpose_forward.index(i) for i in range(3))
        return (a, b, c)

    @model_validator(mode="after")
    def _has_classes(self) -> Self:
        if not self.labels.foreground:
            raise ValueError("labels define only background, at least one foreground class is needed")
        return self

    @model_validator(mode="after")
    def _channels_agree(self) -> Self:
        for name, stage in self.stages.items():
            if len(stage.normalization) != len(self.channels):
                raise ValueError(f"stage {name} normalizes {len(stage.normalization)} of {len(self.channels)} channels")
        if len(self.intensities) != len(self.channels):
            raise ValueError(f"intensities has {len(self.intensities)} entries for {len(self.channels)} channels")
        if sorted(self.transpose_forward) != [0, 1, 2]:
            raise ValueError(f"transpose_forward {self.transpose_forward} is not a permutation of 0, 1, 2")
        return self


class Split(Record):
    """One fold: training and validation cases (an entry of nnU-Net's splits_final.json)."""

    train: tuple[Name, ...]
    val: tuple[Name, ...]
