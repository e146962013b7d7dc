"""Initial weights of RFMedSAM 2: published weights of its backbone, and a trained U-Net for Step 0."""

from __future__ import annotations

from pathlib import Path

from rfmedsam2.arguments import option
from rfmedsam2.choices import Backbone
from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.pipeline.prediction.checkpoints import FOLD, checkpoint_of, checkpoints_of
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.checkpoints import read_weights
from rfmedsam2.store.published_weights import read_published

FILES: dict[Backbone, str] = {
    "sam2_tiny": "sam2.1_hiera_tiny.pt",
    "sam2_small": "sam2.1_hiera_small.pt",
    "sam2_base_plus": "sam2.1_hiera_base_plus.pt",
    "sam2_large": "sam2.1_hiera_large.pt",
    "mobile_sam": "mobile_sam.pt",
    "lite_medsam": "lite_medsam.pth",
}
"""File names of the published weights of each backbone."""
STEP0 = "unet."
"""Names of Step 0's tensors in a checkpoint of RFMedSAM 2 begin so."""


def load_pretrained(
    network: RFMedSam2, plan: Plan, *, fold: str, sam: Path | None, unet: Path | None, known: bool = False
) -> tuple[CheckpointRecord | None, list[str]]:
    """Load the initial weights of a training.

    Args:
        network: newly built network; modified in place.
        plan: plan of the network.
        fold: fold to be trained.
        sam: published weights of its backbone.
        unet: a trained U-Net for Step 0, or an RFMedSAM 2 that has one: a checkpoint, a fold's folder, or a model
            folder (whose same fold is used).
        known: whether the backbone has weights already.

    Returns:
        Record of the model that Step 0 starts from, and sentences about what was loaded and what is randomly
        initialized.

    Raises:
        UsageError: frozen weights were not loaded, or the plan has no U-Net to load into.
        CheckpointError: a file cannot be read, or is of another network.
    """
    backbone = network.config.backbone
    record, notes = None, list[str]()
    if sam is not None:
        report = network.load_backbone(read_published(sam), where=sam)
        new = f", {len(report.missing)} tensors are randomly initialized" if report.missing else ""
        notes.append(f"{sam}: {len(report.loaded)} tensors loaded into {backbone}{new}")
    elif network.config.freeze_backbone and not known:
        raise UsageError(
            "The plan freezes pre-trained weights, but none were given",
            where=f"backbone {backbone}",
            expected=FILES.get(backbone, "a backbone with published weights"),
            remedy=f"Give the file with {option('sam', flag='--sam2')}, or train from scratch: "
            f"{option('changes', ('STAGE.model.freeze_backbone=false',), flag='--set')}",
        )
    elif not known:
        notes.append(f"{backbone} is trained from scratch")
    if unet is not None:
        record, said = _load_unet(network, plan, unet, fold=fold)
        notes += said
    return record, notes


def _load_unet(network: RFMedSam2, plan: Plan, path: Path, *, fold: str) -> tuple[CheckpointRecord, list[str]]:
    if network.unet is None:
        raise UsageError("The plan has no U-Net to load into", where=path, expected="generator unet")
    single = path.is_file() or path.name.startswith(FOLD)
    path = checkpoint_of(path) if single else checkpoints_of(path, folds=[fold])[0]
    record, weights = read_weights(path)
    _require_same_step0(network, plan, record, path)
    whose = "this U-Net"
    if isinstance(record.plan.stages[record.stage].model, RFMedSam2Config):
        whose = "the U-Net in this RFMedSAM 2"
        weights = {name.removeprefix(STEP0): weight for name, weight in weights.items() if name.startswith(STEP0)}
    network.unet.load_state_dict(weights)
    notes = [f"{path}: Step 0 starts from {whose} (step {record.step})"]
    if record.fold != fold:
        notes.append(f"It was trained on fold {record.fold}, on cases that are in the validation set of fold {fold}")
    return record, notes


def _differing_fields(given: UNetConfig, wanted: UNetConfig) -> tuple[str, str]:
    """(found, expected) of two U-Nets, by the fields that differ."""
    names = [name for name in UNetConfig.model_fields if getattr(given, name) != getattr(wanted, name)]
    own, theirs = (", ".join(f"{name} {getattr(unet, name)}" for name in names) for unet in (wanted, given))
    return f"another network: {theirs}", f"the U-Net of the plan: {own}"


def _require_same_step0(network: RFMedSam2, plan: Plan, record: CheckpointRecord, path: Path) -> None:
    model = record.plan.stages[record.stage].model
    given = model.unet if isinstance(model, RFMedSam2Config) else model
    faults = []
    if isinstance(model, RFMedSam2Config) and given is None:
        faults.append((f"an RFMedSAM 2 with generator {model.generator}, which has none", "a U-Net"))
    elif not isinstance(given, UNetConfig):
        faults.append((f"a model of kind {model.kind}", "a U-Net"))
    elif given != network.config.unet:
        assert network.config.unet is not None
        faults.append(_differing_fields(given, network.config.unet))
    if record.plan.labels != plan.labels:
        faults.append((f"classes {', '.join(record.plan.labels.foreground)}", ", ".join(plan.labels.foreground)))
    if record.plan.channels != plan.channels:
        faults.append((f"channels {', '.join(record.plan.channels)}", ", ".join(plan.channels)))
    if faults:
        raise CheckpointError(
            "The U-Net does not match Step 0 of the plan",
            where=path,
            expected="; ".join(wanted for _, wanted in faults),
            found="; ".join(found for found, _ in faults),
            remedy="Train it with the same preset, patch and dataset, or leave "
            f"{option('unet')} out to train Step 0 from scratch",
        )
