"""Planning networks of libraries: the stages of a U-Net's plan, with patches and training settings for the network."""

from __future__ import annotations

import math

from typing_extensions import assert_never

from rfmedsam2.arguments import option
from rfmedsam2.choices import Model, Preset
from rfmedsam2.errors import PlanError
from rfmedsam2.geometry import Triple
from rfmedsam2.pipeline.planning.memory_estimate import activation_terms, total_gib, weight_terms
from rfmedsam2.pipeline.planning.plan import PlannableDataset
from rfmedsam2.pipeline.planning.plan import plan as plan_unet
from rfmedsam2.pipeline.planning.presets import get_preset
from rfmedsam2.pipeline.planning.topology import MIN_BATCH
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.model import (
    PRIMUS_SIZES,
    LibraryNetwork,
    PrimusConfig,
    SegResNetConfig,
    SwinUNETRConfig,
)
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.records.training import AdamW, TrainConfig, WarmupPolySchedule

MODELS: dict[Model, LibraryNetwork] = {
    "segresnet": SegResNetConfig(),
    "swinunetr": SwinUNETRConfig(),
    "primus_s": PrimusConfig(size="S"),
    "primus_b": PrimusConfig(size="B"),
    "primus_m": PrimusConfig(size="M"),
    "primus_l": PrimusConfig(size="L"),
}
WORKSPACE, USABLE = 1.5, 0.9
"""Gradients and workspaces take half as much again as what is kept for the backward pass, and a tenth of a GPU's memory
stays free. Chosen, not measured."""


def plan_library_network(
    dataset: PlannableDataset,
    fingerprint: Fingerprint,
    *,
    model: Model,
    preset: Preset = "default",
    gpu_memory_gb: float | None = None,
    name: str | None = None,
    spacing_zyx_mm: Triple | None = None,
) -> Plan:
    """Make the plan of a dataset for a network of a library.

    Args:
        dataset: its name and dataset.json.
        fingerprint: fingerprint of its training cases.
        model: one of `MODELS`.
        preset: name of the preset, whose U-Net the patches are planned with.
        gpu_memory_gb: memory to plan for, with `default` and nnU-Net's presets; None: the preset's.
        name: name of the plan; None: the preset's, and the network's.
        spacing_zyx_mm: target spacing of 3d_fullres in the axis order of the files; None: nnU-Net's rule.

    Returns:
        A plan with the stages of the U-Net's plan, but without 2d where the network has no 2D form.

    Raises:
        UsageError: the preset does not exist.
        PlanError: as of a U-Net's plan, or the dataset has single slices and the network no 2D form.
    """
    plan = plan_unet(dataset, fingerprint, preset=preset, gpu_memory_gb=gpu_memory_gb, spacing_zyx_mm=spacing_zyx_mm)
    network = MODELS[model]
    memory = get_preset(preset, gpu_memory_gb=gpu_memory_gb).gpu_memory_gb
    stages = {
        key: _fitted(_with_network(stage, network), memory or math.inf)
        for key, stage in plan.stages.items()
        if not (stage.is_2d and isinstance(network, PrimusConfig))
    }
    if not stages:
        raise PlanError(
            "Primus needs volumes of several slices, and these cases are single slices",
            where=dataset.name,
            remedy=f"Plan another network for them ({option('model', 'unet')})",
        )
    return plan.model_copy(update={"name": name or f"{plan.name}_{model}", "stages": stages})


def _with_network(stage: Stage, network: LibraryNetwork) -> Stage:
    """The stage with another network than its U-Net, without deep supervision."""
    if stage.is_2d:
        network = network.model_copy(update={"dimensions": 2})
    patch = fitted_patch(stage.patch_size, stage.median_shape[-network.dimensions :], network.patch_multiple)
    changed = {
        "patch_size": patch,
        "model": network,
        "loss": stage.loss.model_copy(update={"deep_supervision": False, "lowest_level": False}),
        "train": _training(stage.train, network),
    }
    return Stage.model_validate(stage.model_copy(update=changed).model_dump())


def _fitted(stage: Stage, gigabytes: float) -> Stage:
    """The stage with fewer samples, then a smaller patch, until a step in 16 bit fits into the memory.

    Raises:
        PlanError: not even two samples of the smallest patch fit.
    """
    network = stage.model
    assert isinstance(network, SegResNetConfig | SwinUNETRConfig | PrimusConfig)
    while (needed := _needed_gb(stage, network)) > USABLE * gigabytes:
        if stage.batch_size > MIN_BATCH:
            stage = stage.model_copy(update={"batch_size": stage.batch_size - 1})
            continue
        median = stage.median_shape[-len(stage.patch_size) :]
        wide = [axis for axis, n in enumerate(stage.patch_size) if n > network.patch_multiple]
        longest = max(wide, key=lambda axis: stage.patch_size[axis] / median[axis])
        smaller = [n - network.patch_multiple * (axis == longest) for axis, n in enumerate(stage.patch_size)]
        if math.prod(smaller) == network.patch_multiple ** len(smaller):
            raise PlanError(
                "No patch is small enough for the memory",
                where=network.title,
                expected=f"about {needed / USABLE:.1f} GB for a patch of {' x '.join(map(str, stage.patch_size))}",
                found=f"{gigabytes:g} GB",
                remedy="Choose a smaller network, or a preset with more memory",
            )
        stage = stage.model_copy(update={"patch_size": tuple(smaller)})
    return stage


def parameters_of(network: LibraryNetwork) -> int:
    """About the number of parameters, by counts with the default numbers of blocks."""
    match network:
        case SegResNetConfig():
            return 18_400 * network.features**2
        case SwinUNETRConfig():
            return 27_000 * network.features**2
        case PrimusConfig():
            width, layers, _ = PRIMUS_SIZES[network.size]
            return 12 * layers * width**2
        case _:
            assert_never(network)


def _needed_gb(stage: Stage, network: LibraryNetwork) -> float:
    """Memory of a training step in 16 bit, in GB."""
    parameters = parameters_of(network)
    fixed = total_gib(weight_terms(stage, parameters=parameters, trained=parameters, half=True))
    kept = total_gib(activation_terms(stage, outputs=0, classes=0, half=True))
    return (fixed + WORKSPACE * kept) * 2**30 / 1e9


def fitted_patch(patch: tuple[int, ...], median_shape: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """The multiples nearest to a patch's sides, with at least two positions where features are coarsest.

    Args:
        patch: two or three sides in voxels.
        median_shape: median shape of the cases, whose longest axis is doubled for the second position.
        multiple: of the network (`LibraryConfig.patch_multiple`).
    """
    sides = [max(multiple, math.floor(n / multiple + 0.5) * multiple) for n in patch]
    if all(side == multiple for side in sides):
        # SwinUNETR normalizes over these positions, and cannot over one
        sides[median_shape.index(max(median_shape))] *= 2
    return tuple(sides)


def _training(train: TrainConfig, network: LibraryNetwork) -> TrainConfig:
    """Optimizer and rates of a network: Primus as nnU-Net trains it, MONAI's as its Auto3DSeg does.

    Lengths stay the preset's; and so do all settings of presets with AdamW, which are for short trainings.
    """
    if isinstance(network, PrimusConfig):
        return train.model_copy(
            update={
                "learning_rate": 3e-4,
                "weight_decay": 5e-2,
                "optimizer": AdamW(betas=(0.9, 0.98)),
                # nnU-Net: 50 of 1000 epochs
                "schedule": WarmupPolySchedule(warmup_iterations=train.iterations // 20),
                "clip_norm": 1.0,
            }
        )
    if isinstance(train.optimizer, AdamW):
        return train
    return train.model_copy(update={"learning_rate": 2e-4, "weight_decay": 1e-5, "optimizer": AdamW()})
