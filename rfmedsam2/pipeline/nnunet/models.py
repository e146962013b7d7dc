"""Reading models that nnU-Net v2 trained: a folder with plans.json, dataset.json and fold_X/checkpoint_final.pth."""

from __future__ import annotations

import shutil
from datetime import datetime, timezone
from pathlib import Path

import torch

from rfmedsam2.errors import CheckpointError
from rfmedsam2.nn.meta_device import skip_init
from rfmedsam2.nn.unet import UNet, own_weights
from rfmedsam2.pipeline.nnunet.plans import import_nnunet_plans
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.nnunet_checkpoint import NnunetCheckpoint, read_nnunet_checkpoint
from rfmedsam2.store.raw import read_dataset_json
from rfmedsam2.system.atomic import writing_to
from rfmedsam2.version import __version__

PLANS, DATASET, FINGERPRINT = "plans.json", "dataset.json", "dataset_fingerprint.json"
DEFAULT_TRAINER = "nnUNetTrainer"


def read_fold(checkpoint: Path) -> tuple[CheckpointRecord, dict[str, torch.Tensor]]:
    """Record and weights of a fold, the weights by our names; the record has no digest of them, which takes its time.

    Args:
        checkpoint: MODEL/fold_X/checkpoint_final.pth; plans.json and dataset.json are read from MODEL.

    Raises:
        CheckpointError: the checkpoint is damaged, not nnU-Net's, or of another network than its plans describe.
        RecordError: plans.json or dataset.json is missing or damaged.
        PlanError: the plans use features that this package does not support.
    """
    folder = checkpoint.parent.parent
    found = read_nnunet_checkpoint(checkpoint)
    plan = _plan(folder, found)
    stage = plan.stages[found.configuration]
    assert isinstance(stage.model, UNetConfig)
    with skip_init():
        network = UNet(stage.model, channels=plan.inputs_of(stage), outputs=plan.labels.num_outputs)
    try:
        weights = own_weights(network, found.weights)
    except CheckpointError as error:
        raise CheckpointError(
            f"The weights of this fold are not those of the network in {PLANS}",
            where=checkpoint,
            expected=error.expected,
            found=f"{error.found} (trainer {found.trainer})",
            remedy="Trainers that build a network of their own cannot be used; train its plans with rfmed_train",
        ) from None
    record = CheckpointRecord(
        plan=plan,
        stage=found.configuration,
        fold=checkpoint.parent.name.removeprefix("fold_"),
        step=found.epochs * stage.train.iterations_per_epoch,
        weights_sha256="",
        code_version=__version__,
        torch_version=torch.__version__,
        created=datetime.fromtimestamp(checkpoint.stat().st_mtime, timezone.utc).isoformat(timespec="seconds"),
    )
    return record, weights


def copy_fingerprint(model: Path, target: Path) -> None:
    """Copy the fingerprint of the dataset, if the model has one: nobody needs it for predicting.

    Raises:
        StoreError: it cannot be written.
    """
    if (model / FINGERPRINT).is_file():
        with writing_to(target / FINGERPRINT):
            shutil.copyfile(model / FINGERPRINT, target / FINGERPRINT)


def same_model(record: CheckpointRecord, first: CheckpointRecord, *, where: Path) -> CheckpointRecord:
    """The record of another checkpoint of a model by the name that the first one has.

    Trainers that differ in their name alone, such as in the number of epochs, train one model.

    Raises:
        CheckpointError: the checkpoints differ in their configuration or mirroring.
    """
    plan = record.plan.model_copy(update={"name": first.plan.name})
    if record.stage != first.stage or plan != first.plan:
        raise CheckpointError(
            "The checkpoints of the folder are of different trainings",
            where=where,
            found=f"{first.plan.name} {first.stage} and {record.plan.name} {record.stage}, or other mirroring",
            remedy="Move those of other trainings out of the folder",
        )
    return record.model_copy(update={"plan": plan})


def _plan(folder: Path, found: NnunetCheckpoint) -> Plan:
    """The plan of the checkpoint's configuration, with the mirroring that its trainer allowed."""
    stages = [found.configuration]
    plan = import_nnunet_plans(folder / PLANS, read_dataset_json(folder / DATASET), stages=stages)
    stage = plan.stages[found.configuration]
    if isinstance(stage.model, UNetConfig) and any(name.endswith(".running_mean") for name in found.weights):
        # nnUNetTrainerBN replaces the norm of its plans without writing it down
        stage = stage.model_copy(update={"model": stage.model.model_copy(update={"norm": "batch"})})
    if any(axis >= len(stage.patch_size) for axis in found.mirror_axes):
        raise CheckpointError(
            "The checkpoint mirrors an axis that its patches do not have",
            where=f"{folder}, {found.configuration}",
            expected=f"axes below {len(stage.patch_size)}",
            found=f"inference_allowed_mirroring_axes {found.mirror_axes}",
        )
    stage = stage.model_copy(
        update={
            "augmentation": stage.augmentation.model_copy(update={"mirror_axes": found.mirror_axes}),
            "inference": stage.inference.model_copy(update={"mirror": bool(found.mirror_axes)}),
        }
    )
    name = plan.name if found.trainer == DEFAULT_TRAINER else f"{plan.name}_{found.trainer}"
    return Plan.parse(
        plan.model_dump(mode="json") | {"name": name, "stages": {found.configuration: stage.model_dump(mode="json")}},
        where=str(folder / PLANS),
    )
