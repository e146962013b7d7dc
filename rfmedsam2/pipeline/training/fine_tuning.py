"""Starting a training from the weights of a trained model: ours of any kind, or one that nnU-Net trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from rfmedsam2 import models
from rfmedsam2.arguments import option
from rfmedsam2.errors import CheckpointError, shortlist
from rfmedsam2.pipeline.nnunet.models import read_fold
from rfmedsam2.pipeline.prediction.checkpoints import checkpoint_of
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.store.checkpoint_header import NNUNET_CHECKPOINTS, read_record_of
from rfmedsam2.store.checkpoints import read_weights, weights_sha256

Shapes = Mapping[str, tuple[int, ...]]


def read_model(source: Path, *, fold: str) -> tuple[Path, CheckpointRecord, dict[str, torch.Tensor]]:
    """Read one trained network.

    Args:
        source: a checkpoint, the folder of a fold, or a model folder (results/DATASET/PLAN__STAGE, or nnU-Net's).
        fold: of a model folder, this one if it was trained, else the first.

    Returns:
        The checkpoint's path, its record, and its weights by our names.

    Raises:
        UsageError: there is no model.
        CheckpointError: the checkpoint is damaged, or of a network that cannot be used.
    """
    path = checkpoint_of(source, fold=fold)
    if path.name not in NNUNET_CHECKPOINTS:
        return path, *read_weights(path)
    record, weights = read_fold(path)
    return path, record.model_copy(update={"weights_sha256": weights_sha256(weights)}), weights


def start_from(
    network: nn.Module, plan: Plan, stage: Stage, source: Path, *, fold: str
) -> tuple[CheckpointRecord, list[str]]:
    """Load the weights of a trained model into a network that is to be trained.

    Layers whose size depends on the classes start from scratch where the model's classes are others, and so do those
    whose size depends on the channels where their number is another.

    Args:
        network: the newly built network of the stage; modified in place.
        plan: plan of the network.
        stage: its stage.
        source: as in `read_model`.
        fold: as in `read_model`; of the training.

    Returns:
        Record of the model, and sentences about what was loaded and what was not.

    Raises:
        UsageError: there is no model.
        CheckpointError: the model cannot be read, or its network is another.
    """
    path, record, given = read_model(source, fold=fold)
    own = network.state_dict()
    wanted = _shapes(own)
    fresh = _from_scratch(plan, stage, record, wanted)
    fitting = {name: tensor for name, tensor in given.items() if name in wanted and name not in fresh}
    others = [name for name, tensor in fitting.items() if tuple(tensor.shape) != wanted[name]]
    if others or not fitting:
        raise _other_network(path, record, stage, _shapes(given), wanted, others)
    network.load_state_dict(own | fitting)
    missing = [name for name in wanted if name not in given and name not in fresh]
    unexpected = [name for name in given if name not in wanted]
    model = f"{record.plan.dataset}, {record.plan.name}, {record.stage}, fold {record.fold} (step {record.step})"
    notes = [f"{path}: {len(fitting)} of {len(wanted)} tensors start from {model}"]
    if fresh:
        notes.append(
            f"Other classes or channels: {len(fresh)} tensor(s) start from scratch: {shortlist(sorted(fresh))}"
        )
    if missing:
        notes.append(f"The model lacks {len(missing)} tensor(s), which start from scratch: {shortlist(missing)}")
    if unexpected:
        notes.append(f"The network has no place for {len(unexpected)} tensor(s): {shortlist(unexpected)}")
    return record, notes + _differences(stage, record)


def require_same_start(begun_in: Path, begun: str | None, source: Path, *, fold: str) -> None:
    """Check that a training that goes on was begun from the model that is named now.

    Args:
        begun_in: its checkpoint, for the message.
        begun: digest of the model that it was begun from; None: of none.
        source: as in `read_model`.
        fold: as in `read_model`.

    Raises:
        CheckpointError: it was begun from another one, or from none.
    """
    path = checkpoint_of(source, fold=fold)
    # ours has its digest in the header
    record = read_model(path, fold=fold)[1] if path.name in NNUNET_CHECKPOINTS else read_record_of(path)
    if record.weights_sha256 != begun:
        raise CheckpointError(
            "This training was begun from other weights",
            where=begun_in,
            expected=f"{path} ({record.weights_sha256[:12]})",
            found="random weights" if begun is None else f"another model ({begun[:12]})",
            remedy=f"Leave out {option('weights')} to go on, or start over with {option('restart')}",
        )


def _shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _from_scratch(plan: Plan, stage: Stage, theirs: CheckpointRecord, wanted: Shapes) -> set[str]:
    """Names of the tensors that mean something else in the model: their size depends on classes or channels."""
    outputs, channels = plan.labels.num_outputs, plan.inputs_of(stage)
    given, fresh = theirs.plan, set[str]()
    if given.labels.foreground != plan.labels.foreground or given.labels.num_outputs != plan.labels.num_outputs:
        # widths may be rounded, so that not every step of the number changes them
        for number in (outputs + 1, given.labels.num_outputs):
            fresh |= _differing(wanted, models.shapes_of(plan, stage, outputs=number))
    if channels != (number := given.inputs_of(given.stages[theirs.stage])):
        fresh |= _differing(wanted, models.shapes_of(plan, stage, channels=number))
    return fresh


def _differing(one: Shapes, other: Shapes) -> set[str]:
    return {name for name, shape in one.items() if other.get(name) != shape}


def _other_network(
    path: Path, record: CheckpointRecord, stage: Stage, given: Shapes, wanted: Shapes, others: list[str]
) -> CheckpointError:
    theirs = record.plan.stages[record.stage]
    expected, found = f"a {stage.model.kind} of {len(wanted)} tensors", f"a {theirs.model.kind} of {len(given)}"
    if len(theirs.patch_size) != len(stage.patch_size):
        expected, found = (f"a network of {len(s.patch_size)} dimensions" for s in (stage, theirs))
    elif others:
        name = others[0]
        expected = f"{name} of {' x '.join(map(str, wanted[name]))}"
        found = f"{' x '.join(map(str, given[name]))}, and {len(others) - 1} more of other sizes"
    return CheckpointError(
        "The model has another network than the plan",
        where=path,
        expected=expected,
        found=found,
        remedy=f"Take over the model's plan, {option('plan_of')}, when you run rfmed_plan_and_preprocess",
    )


def _differences(stage: Stage, record: CheckpointRecord) -> list[str]:
    """Sentences about what the model was used to and this training does otherwise."""
    theirs = record.plan.stages[record.stage]
    notes = []
    spacings = [" x ".join(f"{mm:.3g}" for mm in s.spacing_mm) for s in (theirs, stage)]
    if spacings[0] != spacings[1]:
        notes.append(f"The model was trained at a spacing of {spacings[0]} mm, this plan's is {spacings[1]} mm")
    blocks = [" x ".join(map(str, _blocks(s))) for s in (theirs, stage)]
    if blocks[0] != blocks[1]:
        notes.append(f"The model's U-Net saw means of {blocks[0]} voxels, this plan's sees means of {blocks[1]}")
    if theirs.normalization != stage.normalization:
        names = [", ".join(n.kind for n in s.normalization) for s in (theirs, stage)]
        notes.append(f"The model was trained on images normalized by {names[0]}, this plan's are by {names[1]}")
    return notes


def _blocks(stage: Stage) -> tuple[int, ...]:
    """Sides of the blocks of voxels that a U-Net sees the means of: its tensors are the same for all of them."""
    unet = stage.model.unet if isinstance(stage.model, RFMedSam2Config) else stage.model
    return unet.blocks if isinstance(unet, UNetConfig) else (1,) * len(stage.patch_size)
