"""Planning RFMedSAM 2: square patches, nnU-Net's U-Net for Step 0, and the frame size and settings of SAM 2."""

from __future__ import annotations

import math
from dataclasses import replace

from rfmedsam2.arguments import option
from rfmedsam2.choices import Backbone, Preset
from rfmedsam2.errors import PlanError
from rfmedsam2.geometry import Triple
from rfmedsam2.pipeline.planning.memory_estimate import activation_terms, total_gib
from rfmedsam2.pipeline.planning.plan import DatasetStats, PlannableDataset, Sized, dataset_stats, plan_of, stage_of
from rfmedsam2.pipeline.planning.presets import RFMedSam2Preset, get_rfmedsam2_preset
from rfmedsam2.pipeline.planning.topology import Topology, square_topology
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.model import LIGHT_BACKBONES, AdapterConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Plan, Stage

LEAST_FRAME = {"nano": 128}
"""Slices are upsampled 2 or 4 times to at least this side, as SAM 2's masks have a quarter of it; default LEAST."""
LEAST = 192
"""LiteMedSAM was trained on 256 pixels, SAM 2 and MobileSAM on 1024. Slices of at least 192 pixels are not upsampled,
because that makes the encoder four times as expensive."""
LARGEST_FRAME = 1024
PLAIN_CHANNELS = (1, 3)
"""Numbers of channels that SAM sees unmixed; others are averaged until the channel adapter has learned."""
NEW_MEMORY_LAYERS, NEW_MEMORY_WIDTH = 2, 512
"""Memory attention of light SAMs, which no published weights fill: SAM 2's 4 layers of width 2048 take three times as
long, and half of a training step on frozen features."""
GIVEN_BOX_SHARE = 0.25
"""Share of training steps with boxes from the reference for decoders whose masks only correct Step 0's otherwise: they
answer a person's boxes too, and learn to segment before their gates are open."""


def plan_rfmedsam2(
    dataset: PlannableDataset,
    fingerprint: Fingerprint,
    *,
    preset: Preset = "default",
    gpu_memory_gb: float | None = None,
    name: str | None = None,
    spacing_zyx_mm: Triple | None = None,
    backbone: Backbone | None = None,
) -> Plan:
    """Make the RFMedSAM 2 plan of a dataset: one stage, 3d_fullres, with slices along the first planned axis.

    Args:
        dataset: its name and dataset.json.
        fingerprint: fingerprint of its training cases.
        preset: default, 8gb, 24gb, 80gb or cpu.
        gpu_memory_gb: with `default`, memory to plan for; None: any.
        name: name of the plan; None: the preset's.
        spacing_zyx_mm: target spacing in the axis order of the files; None: nnU-Net's rule.
        backbone: image encoder; None: the preset's.

    Raises:
        UsageError: the preset does not exist, or is one of nnU-Net's.
        PlanError: the fingerprint is of another dataset, the dataset has no classes or only single slices, or no patch
            fits the memory.
    """
    refinement = get_rfmedsam2_preset(preset, gpu_memory_gb=gpu_memory_gb)
    if backbone is not None and backbone != refinement.backbone:
        refinement = replace(refinement, backbone=backbone, plan_name=f"{refinement.plan_name}_{backbone}")
    return refined_plan(dataset, fingerprint, refinement, name=name, spacing_zyx_mm=spacing_zyx_mm)


def refined_plan(
    dataset: PlannableDataset,
    fingerprint: Fingerprint,
    refinement: RFMedSam2Preset,
    *,
    name: str | None = None,
    spacing_zyx_mm: Triple | None = None,
) -> Plan:
    """Make a plan from settings that need not be a preset's; see `plan_rfmedsam2`."""
    stats = dataset_stats(dataset, fingerprint, spacing_zyx_mm, refinement.settings.case)
    if stats.median_shape[0] <= 1:
        raise PlanError(
            "RFMedSAM 2 needs volumes of several slices, and these cases are single slices",
            where=dataset.name,
            remedy=f"Plan a U-Net for them ({option('model', 'unet')})",
        )
    labels = dataset.json.label_set

    def fits(topology: Topology) -> bool:
        """Whether a patch is within the preset's limits."""
        limit = refinement.max_patch_voxels
        if limit is not None and math.prod(topology.patch_size) > limit:
            return False
        if refinement.activations_gb is None:
            return True
        stage = _stage(stats, refinement, topology, labels)
        return _activations_gb(stage, labels, half=True) <= refinement.activations_gb

    spacing = stats.spacing_mm.tolist()
    topology = square_topology(spacing, stats.median_shape.tolist(), start=refinement.start, fits=fits)
    stages = {"3d_fullres": _stage(stats, refinement, topology, labels)}
    return plan_of(dataset, fingerprint, stats, name=name or refinement.plan_name, stages=stages)


def model_of(
    backbone: Backbone,
    unet: UNetConfig,
    side: int,
    *,
    adapt_encoder: bool,
    propagate_loss: bool,
    learn_channels: bool = False,
) -> RFMedSam2Config:
    """Configure RFMedSAM 2 for slices of `side` voxels, by the backbone: published SAM 2, a light SAM, or nano.

    Published weights are frozen, with trained adapters. nano has no published weights and is trained completely. Masks
    of nano and of light SAMs are not better than a trained U-Net's, so gates add them to its logits.
    """
    config = RFMedSam2Config(
        unet=unet,
        backbone=backbone,
        frame_size=enlarged_side(side, LEAST_FRAME.get(backbone, LEAST)),
        propagate_loss=propagate_loss and backbone != "nano",
        output="gated" if backbone in ("nano", *LIGHT_BACKBONES) else "replace",
        step2_mask_prompt="one_against_rest",
        given_boxes="replace",
        freeze_backbone=backbone != "nano",
        adapters=AdapterConfig(encoder=adapt_encoder, channels=learn_channels),
        memory_layers=NEW_MEMORY_LAYERS if backbone in LIGHT_BACKBONES else None,
        memory_width=NEW_MEMORY_WIDTH if backbone in LIGHT_BACKBONES else None,
    )
    if backbone != "nano":
        return config
    return config.model_copy(update={"adapters": AdapterConfig(blocks="none", convolutions="none")})


def enlarged_side(side: int, least: int) -> int:
    """`side` times 1, 2 or 4: the first that is at least `least`; at most LARGEST_FRAME."""
    sizes = [side * factor for factor in (1, 2, 4)]
    reached = next((size for size in sizes if size >= least), sizes[-1])
    return min(reached, max(side, LARGEST_FRAME))


def _stage(stats: DatasetStats, refinement: RFMedSam2Preset, topology: Topology, labels: LabelSet) -> Stage:
    settings, patch = refinement.settings, topology.patch_size
    small = refinement.backbone == "nano"
    batch = refinement.batch_size if small else refinement.large_batch_size
    share = math.prod(patch) / math.prod(stats.median_shape.tolist())
    stage = stage_of(
        stats,
        settings,
        Sized(topology=topology, sizing=settings.volume, batch_size=batch),
        spacing_mm=stats.spacing_mm,
        median_shape=stats.median_shape,
        # nnU-Net's rule: batch Dice if a patch covers little of a case
        batch_dice=share < settings.low_resolution_share if settings.batch_dice is None else settings.batch_dice,
    )
    assert isinstance(stage.model, UNetConfig)
    model = model_of(
        refinement.backbone,
        stage.model,
        patch[1],
        adapt_encoder=refinement.adapt_encoder,
        propagate_loss=refinement.propagate_loss,
        learn_channels=not refinement.adapt_encoder and len(stats.normalization) not in PLAIN_CHANNELS,
    )
    sampling = stage.sampling.model_copy(
        update={
            "max_prompted_objects": refinement.max_objects if small else refinement.max_objects_pretrained,
            "prompted_runs": True,
            "given_box_share": GIVEN_BOX_SHARE if model.output == "gated" else 0.0,
        }
    )
    stage = stage.model_copy(update={"model": model, "sampling": sampling})
    keeping = stage.model_copy(update={"compute": stage.compute.model_copy(update={"checkpointing": False})})
    return keeping if _activations_gb(keeping, labels, half=False) <= refinement.no_checkpointing_below_gb else stage


def _activations_gb(stage: Stage, labels: LabelSet, *, half: bool) -> float:
    terms = activation_terms(stage, outputs=labels.num_outputs, classes=len(labels.foreground), half=half)
    return total_gib(terms) * 2**30 / 1e9
