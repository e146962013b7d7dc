"""Taking over the plan of a trained model for another dataset, to fine-tune the model on it."""

from __future__ import annotations

from pathlib import Path

from rfmedsam2.errors import PlanError
from rfmedsam2.pipeline.nnunet.plans import import_nnunet_plans
from rfmedsam2.pipeline.prediction.checkpoints import checkpoint_of
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.checkpoint_header import NNUNET_CHECKPOINTS, read_record_of
from rfmedsam2.store.raw import RawDataset


def plan_of_model(source: Path, dataset: RawDataset, found: Fingerprint, *, name: str | None) -> Plan:
    """The plan of a trained model, with the channels and classes of a dataset.

    Network, spacing, patch, normalization and the intensities that it normalizes by stay those of the model's training,
    because its weights are used to them.

    Args:
        source: a checkpoint, the folder of a fold, or a model folder; ours or nnU-Net's.
        dataset: the dataset that it is for.
        found: its fingerprint.
        name: name of the plan; None: the model's with the name of the dataset that it was trained on.

    Raises:
        UsageError: there is no model.
        CheckpointError: the checkpoint is damaged.
        PlanError: the model has another number of channels, or features that this package does not support.
    """
    path = checkpoint_of(source)
    if path.name in NNUNET_CHECKPOINTS:
        plans = path.parent.parent / "plans.json"
        plan = import_nnunet_plans(plans, dataset.json, fingerprint=found.digest)
    else:
        record = read_record_of(path)
        stage = record.plan.stages[record.stage].model_copy(update={"starts_from": None})
        plan = record.plan.model_copy(update={"stages": {record.stage: stage}})
    if len(plan.intensities) != len(dataset.json.channels):
        raise PlanError(
            "The model was trained on another number of channels",
            where=source,
            expected=f"{len(dataset.json.channels)} ({', '.join(dataset.json.channels)}), as {dataset.name} has",
            found=len(plan.intensities),
            remedy="Make a plan for this dataset; rfmed_train --weights starts its first layer from scratch",
        )
    return plan.model_copy(
        update={
            "name": name or f"{plan.name}_{plan.dataset}",
            "dataset": dataset.name,
            "fingerprint": found.digest,
            "channels": dataset.json.channels,
            "labels": dataset.json.label_set,
            "file_ending": dataset.json.file_ending,
        }
    )
