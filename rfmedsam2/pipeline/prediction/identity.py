"""What a model's label maps depend on besides its weights, and whether folds agree in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfmedsam2.errors import CheckpointError
from rfmedsam2.inference.volume import PredictOptions
from rfmedsam2.records.base import renamed
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import ModelConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Stage
from rfmedsam2.records.prediction import PostprocessingRule

NEWER_FIELDS = (
    *("step0", "crossfit", "disturbance", "refinement_loss"),
    *("gate_learning_rate", "step2_mask_prompt", "given_boxes"),
    *("memory_layers", "memory_width", "encoder_size", "cached_views"),
)
"""Fields of RFMedSAM 2 since version 0.2. Label maps that 0.1 predicted stay valid where these are at their default."""

NEWER_FIELDS_OF_UNET = ("norm", "input_stride")


def what_predicting_needs(record: CheckpointRecord) -> dict[str, object]:
    """The part of a plan that label maps depend on, as plain data."""
    plan = record.plan.model_dump(mode="json", include={"channels", "labels", "reorient", "transpose_forward"})
    stage = record.plan.stages[record.stage].model_dump(
        mode="json", include={"spacing_mm", "patch_size", "normalization", "resampling"}
    )
    stage["model"] = _model_dump(record.plan.stages[record.stage].model)
    intensities = [i.model_dump(mode="json") for i in record.plan.intensities]
    mirror = list(record.plan.stages[record.stage].augmentation.mirror_axes)
    return {**plan, **stage, "intensities": intensities, "mirror_axes": mirror, "stage": record.stage}


def settings_of(
    stage: Stage, options: PredictOptions, *, boxes: bool, rule: PostprocessingRule | None, previous: str
) -> dict[str, float | int | bool | str]:
    """All settings besides model, image and execution that affect a label map.

    Args:
        stage: the stage.
        options: options of prediction.
        boxes: whether boxes are given.
        rule: postprocessing of label maps.
        previous: digest of the first stage of a cascade, or "given".
    """
    inference = options.inference(stage)
    settings: dict[str, float | int | bool | str] = {
        "step_size": inference.step_size,
        "mirror": inference.mirror,
        "skip_empty": options.skip_empty,
    }
    if isinstance(stage.model, RFMedSam2Config):
        settings["step"] = stage.model.refinements if options.step is None else options.step
        # the boxes themselves are part of each case's input
        settings["boxes"] = "given" if boxes else "own"
    if rule is not None:
        settings["postprocessing"] = rule.digest
    if stage.previous_stage is not None:
        # label maps that are given are part of each case's input, too
        settings["previous_stage"] = previous
    return settings


def digest_of_model(records: Sequence[CheckpointRecord], settings: Mapping[str, object]) -> str:
    """SHA-256 of the weights of all folds, the relevant part of the plan, and the settings of prediction."""
    # the key is that of plans of format 1: label maps that were predicted with those stay valid
    needs = renamed(what_predicting_needs(records[0]), {"normalization": "normalisation"})
    # so do those that were predicted before there was a choice of backends
    settings = {name: value for name, value in settings.items() if (name, value) != ("backend", "torch")}
    parts = [sorted(record.weights_sha256 for record in records), needs, settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_of_ensemble(models: Sequence[str], rule: PostprocessingRule | None) -> str:
    """SHA-256 of the digests of all models, in any order, and of the rule of their label maps."""
    return hashlib.sha256(json.dumps([sorted(models), rule.digest if rule else None]).encode()).hexdigest()


def _model_dump(model: ModelConfig) -> dict[str, object]:
    """A model's fields without those that 0.1 did not have, where they mean what 0.1 did."""
    newer: dict[str, Any] = {}
    if isinstance(model, RFMedSam2Config):
        defaults = RFMedSam2Config.model_fields
        newer = {name: True for name in NEWER_FIELDS if getattr(model, name) == defaults[name].default}
        if not model.adapters.channels:
            newer["adapters"] = {"channels"}
        if model.unet is not None:
            newer["unet"] = _newer_of(model.unet)
    elif isinstance(model, UNetConfig):
        newer = dict.fromkeys(_newer_of(model), True)
    return model.model_dump(mode="json", exclude=newer)


def _newer_of(unet: UNetConfig) -> set[str]:
    defaults = UNetConfig.model_fields
    return {name for name in NEWER_FIELDS_OF_UNET if getattr(unet, name) == defaults[name].default}


def require_same_model(first: CheckpointRecord, other: CheckpointRecord, *, where: Path) -> None:
    """Check that the folds of a model can be averaged.

    Raises:
        CheckpointError: they belong to different plans.
    """
    one, two = what_predicting_needs(first), what_predicting_needs(other)
    differing = [name for name in one if one[name] != two[name]]
    if differing:
        raise CheckpointError(
            "The checkpoints belong to different plans and cannot be averaged",
            where=where,
            expected=f"the plan {first.plan.name} and stage {first.stage} of the first checkpoint",
            found=f"{other.plan.name}, {other.stage}; different {', '.join(differing)}",
            remedy="Use folds of the same training",
        )
