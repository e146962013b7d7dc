"""Planning: makes a plan from dataset.json, fingerprint and preset.

Target spacing, axis order, normalization, the low-resolution rule and the median shape are nnU-Net 2.8's; patch, batch,
network and training settings come from a preset (presets.py) through nnU-Net's topology rule (topology.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rfmedsam2.choices import Preset
from rfmedsam2.errors import PlanError
from rfmedsam2.geometry import Triple
from rfmedsam2.pipeline.planning.presets import CaseSizing, PatchSizing, UNetPreset, get_preset
from rfmedsam2.pipeline.planning.spacing import SPACING_STEP, coarsened_by, median_shape, target_spacing
from rfmedsam2.pipeline.planning.topology import (
    Topology,
    batch_that_fits,
    feature_map_size,
    fitted_topology,
    isotropic_start,
)
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.plan import Normalization, Plan, Stage

CASCADE = "3d_cascade_fullres"
SMALL_AFTER_CROP = 0.75
"""If the median fraction of voxels left by the crop is below this, z-score statistics use the non-zero mask."""
NORMALIZATION_OF_CHANNEL = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale_0_1",
    "rgb_to_0_1": "rgb_0_1",
}


class PlannableDataset(Protocol):
    """The attributes of a raw dataset that planning uses."""

    @property
    def name(self) -> str:
        """Folder name."""
        ...

    @property
    def json(self) -> DatasetJson:
        """Its dataset.json."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStats:
    """Statistics of a dataset that determine the sizes of a stage, in planned axis order."""

    transpose_forward: tuple[int, int, int]
    spacing_mm: np.ndarray
    """(3,) target spacing of 3d_fullres."""
    median_shape: np.ndarray
    """(3,) at that spacing; may hold halves."""
    median_slices: float
    """Median number of slices along the first axis, as stored."""
    median_slice_distance_mm: float
    cases: int
    outputs: int
    """Output channels by which nnU-Net estimates memory: all declared labels."""
    normalization: tuple[Normalization, ...]


def plan(
    dataset: PlannableDataset,
    fingerprint: Fingerprint,
    *,
    preset: Preset = "default",
    gpu_memory_gb: float | None = None,
    name: str | None = None,
    spacing_zyx_mm: Triple | None = None,
) -> Plan:
    """Make the plan of a dataset.

    Args:
        dataset: its name and dataset.json.
        fingerprint: fingerprint of its training cases.
        preset: name of the preset.
        gpu_memory_gb: memory to plan for, with `default` and nnU-Net's presets; None: the preset's.
        name: name of the plan; None: the preset's.
        spacing_zyx_mm: target spacing of 3d_fullres in the axis order of the files; None: nnU-Net's rule.

    Returns:
        A plan with the stages 3d_fullres, 3d_lowres and 3d_cascade_fullres (if cases are much larger than the patch)
        and 2d; only 2d if the median case is a single slice.

    Raises:
        UsageError: the preset does not exist, or has sizes of its own besides `gpu_memory_gb`.
        PlanError: the fingerprint is of another dataset or has no cases, or no patch fits the memory.
    """
    settings = get_preset(preset, gpu_memory_gb=gpu_memory_gb)
    stats = dataset_stats(dataset, fingerprint, spacing_zyx_mm, settings.case)
    stages: dict[str, Stage] = {}
    if stats.median_shape[0] != 1:
        stages = _volume_stages(stats, settings)
    # slices are seen whole anyway
    slices = dataset_stats(dataset, fingerprint, spacing_zyx_mm, settings.case and settings.case.hard)
    stages["2d"] = _slice_stage(slices, settings)
    return plan_of(dataset, fingerprint, stats, name=name or settings.plan_name, stages=stages)


def plan_of(
    dataset: PlannableDataset, fingerprint: Fingerprint, stats: DatasetStats, *, name: str, stages: dict[str, Stage]
) -> Plan:
    """Assemble a plan from its stages and the dataset's statistics."""
    reader = dataset.json.overwrite_image_reader_writer or ""
    return Plan(
        name=name,
        dataset=dataset.name,
        fingerprint=fingerprint.digest,
        channels=dataset.json.channels,
        labels=dataset.json.label_set,
        file_ending=dataset.json.file_ending,
        reorient="RAS" if reader.endswith("WithReorient") else None,
        transpose_forward=stats.transpose_forward,
        intensities=fingerprint.intensities,
        stages=stages,
    )


def channel_normalizations(
    channels: tuple[str, ...], median_relative_size_after_crop: float
) -> tuple[Normalization, ...]:
    """nnU-Net's scheme by channel name (z-score by default) and its rule for using the non-zero mask."""
    kinds = [NORMALIZATION_OF_CHANNEL.get(channel.casefold(), "zscore") for channel in channels]
    masked = median_relative_size_after_crop < SMALL_AFTER_CROP
    return tuple(Normalization.parse({"kind": kind, "use_mask": masked and kind == "zscore"}) for kind in kinds)


def check_fingerprint(dataset: PlannableDataset, fingerprint: Fingerprint) -> None:
    """Raise a PlanError if there are no classes, or if the fingerprint is not of this dataset's cases and channels."""
    if not dataset.json.label_set.foreground:
        raise PlanError(
            "The dataset has no class besides background, so there is nothing to segment",
            where=f"dataset.json of {dataset.name}",
            expected='at least one label, for instance "labels": {"background": 0, "liver": 1}',
        )
    channels = len(dataset.json.channels)
    if fingerprint.cases and fingerprint.dataset == dataset.name and len(fingerprint.intensities) == channels:
        return
    raise PlanError(
        "The fingerprint does not match the dataset",
        where=dataset.name,
        expected=f"at least one training case and {channels} channel(s) of {dataset.name}",
        found=f"{len(fingerprint.cases)} case(s), {len(fingerprint.intensities)} channel(s) of {fingerprint.dataset}",
        remedy="Compute the fingerprint again (rfmed_plan_and_preprocess --clean)",
    )


def dataset_stats(
    dataset: PlannableDataset, fingerprint: Fingerprint, spacing_zyx_mm: Triple | None, sizing: CaseSizing | None
) -> DatasetStats:
    """Target spacing, axis order, median shape and normalization of a dataset; see `plan` for arguments and errors."""
    check_fingerprint(dataset, fingerprint)
    json = dataset.json
    target = target_spacing(fingerprint) if spacing_zyx_mm is None else np.asarray(spacing_zyx_mm, dtype=float)
    if not np.all(np.isfinite(target)) or not np.all(target > 0):
        raise PlanError("A target spacing is not positive", expected="three spacings above 0 mm", found=target.tolist())
    forward = _axis_order(target, fingerprint)
    if sizing is not None:
        # a given spacing is coarsened only where cases would be too large for the preset
        limits = sizing if spacing_zyx_mm is None else sizing.hard
        target = coarsened_by(limits, target, fingerprint, json.label_set.values)
    shape = median_shape(fingerprint, target)
    if not np.all(shape >= 1):
        raise PlanError(
            "A target spacing is wider than the images", expected="one voxel or more of a case", found=target.tolist()
        )
    order = list(forward)
    return DatasetStats(
        transpose_forward=forward,
        spacing_mm=target[order],
        median_shape=shape[order],
        median_slices=float(np.median([case.shape_after_crop_zyx[forward[0]] for case in fingerprint.cases])),
        median_slice_distance_mm=float(np.median([case.spacing_zyx_mm[forward[0]] for case in fingerprint.cases])),
        cases=len(fingerprint.cases),
        outputs=len(json.labels),
        normalization=channel_normalizations(json.channels, fingerprint.median_relative_size_after_crop),
    )


def _axis_order(spacing: np.ndarray, fingerprint: Fingerprint) -> tuple[int, int, int]:
    # 2D images stored as volumes: the axis of one voxel is the slice axis, whatever its spacing
    flat = [axis for axis in range(3) if all(case.shape_zyx[axis] == 1 for case in fingerprint.cases)]
    first = flat[0] if flat else int(np.argmax(spacing))
    second, third = (axis for axis in range(3) if axis != first)
    return first, second, third


def _volume_stages(stats: DatasetStats, preset: UNetPreset) -> dict[str, Stage]:
    full = _size(stats, stats.spacing_mm, stats.median_shape, preset.volume)
    low_spacing, low = _low_resolution(stats, preset, full)
    dice = preset.batch_dice
    stages = {
        "3d_fullres": stage_of(
            stats,
            preset,
            full,
            spacing_mm=stats.spacing_mm,
            median_shape=stats.median_shape,
            batch_dice=low is not None if dice is None else dice,
        )
    }
    if low is not None:
        stages["3d_lowres"] = stage_of(
            stats,
            preset,
            low,
            spacing_mm=low_spacing,
            median_shape=stats.spacing_mm / low_spacing * stats.median_shape,
            batch_dice=False if dice is None else dice,
        )
        stages[CASCADE] = stages["3d_fullres"].model_copy(update={"previous_stage": "3d_lowres"})
    return stages


def _slice_stage(stats: DatasetStats, preset: UNetPreset) -> Stage:
    # the first axis of a 2D stage is never resampled; its entries only describe the median case
    sized = _size(stats, stats.spacing_mm[1:], stats.median_shape[1:], preset.slice)
    return stage_of(
        stats,
        preset,
        sized,
        spacing_mm=np.array([stats.median_slice_distance_mm, *stats.spacing_mm[1:]]),
        median_shape=np.array([stats.median_slices, *stats.median_shape[1:]]),
        batch_dice=True if preset.batch_dice is None else preset.batch_dice,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """Patch and network shape, the settings they follow from, and the batch size."""

    topology: Topology
    sizing: PatchSizing
    batch_size: int


def _size(
    stats: DatasetStats,
    spacing_mm: np.ndarray,
    shape: np.ndarray,
    sizing: PatchSizing,
    *,
    dataset_voxels: float | None = None,
) -> Sized:
    """Patch, topology and batch of a stage at a spacing and median shape, both (2,) or (3,)."""

    def samples(topology: Topology) -> float:
        """Number of samples that the preset's limits allow."""
        limits = [math.inf]
        if sizing.feature_budget is not None:
            network = sizing.width.network(topology)
            estimate = feature_map_size(network, topology.patch_size, outputs=stats.outputs)
            limits.append(sizing.feature_budget / estimate * sizing.budget_batch)
        if sizing.max_batch_voxels is not None:
            limits.append(sizing.max_batch_voxels / math.prod(topology.patch_size))
        return min(limits)

    topology = fitted_topology(
        spacing_mm.tolist(),
        shape.tolist(),
        start=sizing.start or isotropic_start(spacing_mm.tolist()),
        fits=lambda candidate: samples(candidate) >= sizing.least_batch,
    )
    if dataset_voxels is None:
        dataset_voxels = float(np.prod(stats.median_shape)) * stats.cases
    if sizing.batch_size is not None:
        batch_size = max(1, int(min(sizing.batch_size, samples(topology))))
    else:
        batch_size = batch_that_fits(
            samples(topology),
            patch_voxels=math.prod(topology.patch_size),
            allowed_voxels=dataset_voxels * sizing.max_dataset_share,
        )
    return Sized(topology=topology, sizing=sizing, batch_size=batch_size)


def _low_resolution(stats: DatasetStats, preset: UNetPreset, full: Sized) -> tuple[np.ndarray, Sized | None]:
    """nnU-Net's low-resolution rule: coarsen until the patch covers enough of a case; None if barely coarser."""
    voxels = full_voxels = float(np.prod(stats.median_shape))
    patch_voxels, spacing, sized = math.prod(full.topology.patch_size), stats.spacing_mm.copy(), None
    while patch_voxels / voxels < preset.low_resolution_share:
        # finer axes first, until none is more than a factor 2 finer than the coarsest
        finer = spacing.max() / spacing > 2
        spacing[finer if finer.any() else slice(None)] *= SPACING_STEP
        shape = stats.spacing_mm / spacing * stats.median_shape
        voxels = float(np.prod(shape))
        rounded = np.array([max(1, round(float(n))) for n in shape])
        sized = _size(stats, spacing, rounded, preset.volume, dataset_voxels=voxels * stats.cases)
        patch_voxels = math.prod(sized.topology.patch_size)
    return spacing, None if full_voxels / voxels < 2 else sized


def stage_of(
    stats: DatasetStats,
    preset: UNetPreset,
    sized: Sized,
    *,
    spacing_mm: np.ndarray,
    median_shape: np.ndarray,
    batch_dice: bool,
) -> Stage:
    """Make a stage with a preset's settings and a U-Net of the given topology."""
    patch = sized.topology.patch_size
    a, b, c = (float(s) for s in spacing_mm)
    k, m, n = (max(1, round(float(size))) for size in median_shape)
    return Stage(
        spacing_mm=(a, b, c),
        median_shape=(k, m, n),
        patch_size=patch,
        batch_size=sized.batch_size,
        normalization=stats.normalization,
        augmentation=preset.augmentation.model_copy(
            update={"mirror_axes": tuple(range(len(patch))) if preset.mirror else ()}
        ),
        model=sized.sizing.width.network(sized.topology),
        loss=preset.loss.model_copy(update={"batch_dice": batch_dice}),
        train=preset.train,
        validation=preset.validation,
        inference=preset.inference,
    )
