"""Prediction of one volume in two halves: preprocessing, then network and export, with the seconds of each part."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from rfmedsam2.arguments import choice_of, path_of, whole_number
from rfmedsam2.arrays import intensity_limit
from rfmedsam2.choices import Backend
from rfmedsam2.errors import ImageError, PlanError
from rfmedsam2.geometry import Grid
from rfmedsam2.inference.box_prompts import BoxPrompts, planned_boxes
from rfmedsam2.inference.export import labels_from_slabs
from rfmedsam2.inference.prediction import Prediction
from rfmedsam2.inference.probabilities import ProbabilityMap
from rfmedsam2.inference.refined_tiles import Request, Tiling
from rfmedsam2.inference.refinement import predict_refined_slabs, require_possible
from rfmedsam2.inference.sliding_window import Execution, Network, Precision, Slab, predict_slabs
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.prompts import Prompts
from rfmedsam2.records.plan import Inference, Plan, Stage
from rfmedsam2.store.orientation import Orientation, reoriented
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.transforms.prepare import Prepared, prepare
from rfmedsam2.transforms.previous_stage import with_previous_labels
from rfmedsam2.volume import Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions:
    """Options of prediction; None: the plan's value.

    Raises:
        UsageError: an unknown precision, or a number of threads or a step that is none.

    Attributes:
        step_size: distance of tiles as a fraction of the patch, at least half a voxel, up to 1.
        mirror: whether to average over flips (along the axes mirrored in training).
        tile_batch: number of tiles per forward pass.
        skip_empty: whether to skip tiles without body; see `sliding_window.Execution`.
        step: step whose result to return, for models with several (RFMedSAM 2: 0, 1, 2); None: the last step.
        precision: precision of the networks; see `sliding_window.Execution`.
        threads: number of planes resampled or exported in parallel; None: the machine's cores, at most 8.
        backend: what runs the networks; see `backends.choice.run_networks`.
        cache_folder: where networks that a backend has converted are kept; None: ~/.cache/rfmedsam2.
    """

    step_size: float | None = None
    mirror: bool | None = None
    tile_batch: int | None = None
    skip_empty: bool = False
    step: int | None = None
    precision: Precision = "auto"
    threads: int | None = None
    backend: Backend = "auto"
    cache_folder: Path | None = None

    def __post_init__(self) -> None:
        choice_of(self.precision, get_args(Precision), "precision")
        choice_of(self.backend, get_args(Backend), "backend")
        if self.cache_folder is not None:
            object.__setattr__(self, "cache_folder", path_of(self.cache_folder, "cache_folder"))
        for name, least in (("threads", 1), ("step", 0)):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_number(given, name, least=least))

    def inference(self, stage: Stage) -> Inference:
        """The plan's settings with these options applied.

        Raises:
            RecordError: a value is out of range.
        """
        given = {"step_size": self.step_size, "mirror": self.mirror, "tile_batch": self.tile_batch}
        chosen = {name: value for name, value in given.items() if value is not None}
        return Inference.parse(
            stage.inference.model_dump() | chosen, where="prediction options", remedy="Correct these options"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedCase:
    """A preprocessed volume.

    Attributes:
        prepared: image in planned axes and spacing.
        grid: grid of the volume as given.
        orientation: how the volume was reoriented; None: not at all.
        seconds: duration of preprocessing.
        boxes: its box prompts, on the planned grid.
        waiting: all of the volume where more networks follow that need it preprocessed otherwise than `prepared`: the
            second stage of a cascade, which also needs the first's labels, and the other models of an ensemble.
    """

    prepared: Prepared
    grid: Grid
    orientation: Orientation | None
    seconds: float
    boxes: Prompts | None = None
    waiting: Volume | None = None


def preprocess_case(
    volume: Volume,
    plan: Plan,
    stage: str,
    *,
    boxes: BoxPrompts | None = None,
    previous: np.ndarray | None = None,
    threads: int | None = None,
) -> PreparedCase:
    """Do everything that comes before the network; no device is touched.

    Args:
        volume: (C, Z, Y, X) as read; reoriented to `plan.reorient` here.
        plan: the plan that the network was trained with.
        stage: name of the stage.
        boxes: box prompts in the volume's axes: a label map (Z, Y, X), or a list of boxes.
        previous: for the second stage of a cascade, the first's label map (Z, Y, X) in the volume's axes.
        threads: number of planes resampled in parallel.

    Raises:
        PlanError: the stage does not exist, or the number of channels differs from the plan's.
        ImageError: voxels are not finite, or not allowed by the planned normalization.
        UsageError: a box is outside the image, or its label is unknown.
    """
    started = time.perf_counter()
    require_finite(volume)
    grid, orientation = volume.grid, None
    if plan.reorient is not None:
        volume, orientation = reoriented(volume, plan.reorient)
        previous = None if previous is None else orientation.apply(previous)
    prepared = prepare(volume, plan, stage, label=previous, threads=threads or 1)
    # one sum is cheap, and NaN and infinity propagate to it
    if not np.isfinite(prepared.image.sum(dtype=np.float64)):
        raise ImageError(
            "Preprocessing makes voxels of this image that are not finite",
            expected="intensities that 32-bit floats can normalize",
            found=f"{volume.array.min():g} to {volume.array.max():g}",
            remedy="Scale the image, for instance to the range of the training images",
        )
    if previous is not None:
        prepared = with_previous_labels(prepared, plan.labels)
    prompts = None
    if boxes is not None:
        resampling = plan.stage(stage).resampling
        prompts = planned_boxes(boxes, prepared.restore, orientation, plan.labels, resampling)
    seconds = time.perf_counter() - started
    return PreparedCase(prepared=prepared, grid=grid, orientation=orientation, seconds=seconds, boxes=prompts)


def require_finite(volume: Volume) -> None:
    """Refuse NaN and infinity before they spread to neighbors (resampling) or become numbers (clipping).

    Raises:
        ImageError: says how many voxels of which channel are concerned; also those beyond the range of 32-bit floats,
            and integers beyond 2^53.
    """
    if volume.array.dtype.kind != "f" and volume.array.dtype.itemsize < 8:
        return
    limit = intensity_limit(volume.array.dtype)
    for number, channel in enumerate(volume.array):
        with np.errstate(invalid="ignore"):
            # as Python's floats: half precision has no such limit. False for NaN
            if float(channel.min()) >= -limit and float(channel.max()) <= limit:
                continue
            wide = channel.astype(np.float32) if channel.dtype == np.float16 else channel
            bad = int(np.count_nonzero(~((wide >= -limit) & (wide <= limit))))
        floats = channel.dtype.kind == "f"
        which = f" in channel {number}" if len(volume.array) > 1 else ""
        raise ImageError(
            "The image contains voxels that are not finite"
            if floats
            else "The image contains numbers that are too large",
            expected="numbers in the range of 32-bit floats" if floats else "whole numbers within 2^53",
            found=f"{bad} voxel(s) of NaN or infinity{which}" if floats else f"{bad} voxel(s) beyond{which}",
            remedy="Replace them, for instance by 0",
        )


def predict_prepared(
    networks: Sequence[Network],
    prepared_case: PreparedCase,
    plan: Plan,
    stage: str,
    *,
    device: torch.device,
    options: PredictOptions,
    probabilities: Path | bool = False,
    track: Track = silent,
) -> Prediction:
    """Predict a preprocessed volume: network, export, and reorienting back to the axes of the given volume.

    Args:
        networks: networks (folds of one model) in eval mode on `device`, or what a backend made of them.
        prepared_case: result of `preprocess_case` for the same plan and stage.
        plan: the plan that the networks were trained with.
        stage: name of the stage.
        device: device of the networks.
        options: options of prediction.
        probabilities: a file (.b2nd) to write them to, or whether to keep them in memory.
        track: progress display over tiles.

    Raises:
        UsageError: `options.step` is not produced by this model, or the model does not accept boxes or needs them.
        StoreError: the probabilities cannot be written.
    """
    started = time.perf_counter()
    config = plan.stages[stage]
    restore, orientation = prepared_case.prepared.restore, prepared_case.orientation
    maps = None
    if probabilities:
        path = probabilities if isinstance(probabilities, Path) else None
        maps = ProbabilityMap(restore, plan.labels, path=path, orientation=orientation)
    slabs = _Timed(_slabs(networks, prepared_case, plan, config, device, options, track))
    labels = labels_from_slabs(
        slabs, restore, plan.labels, config.resampling, probabilities=maps, threads=options.threads
    )
    if orientation is not None:
        labels = np.ascontiguousarray(orientation.undo(labels))
    export = time.perf_counter() - started - slabs.seconds
    return Prediction(
        labels=labels,
        grid=prepared_case.grid,
        classes=plan.labels,
        seconds={"prepare": prepared_case.seconds, "network": slabs.seconds, "export": export},
        probabilities=maps.array if maps is not None and maps.path is None else None,
    )


def _slabs(
    networks: Sequence[Network],
    prepared_case: PreparedCase,
    plan: Plan,
    stage: Stage,
    device: torch.device,
    options: PredictOptions,
    track: Track,
) -> Iterator[Slab]:
    """Slabs of logits: by sliding window, or by refinement for RFMedSAM 2."""
    require_possible(stage.model, step=options.step, boxes=prepared_case.boxes is not None)
    image, inference = prepared_case.prepared.image, options.inference(stage)
    execution = Execution(precision=options.precision, skip_empty=options.skip_empty, track=track)
    refining = [network for network in networks if isinstance(network, RFMedSam2)]
    if refining:
        return predict_refined_slabs(
            refining,
            image,
            tiling=Tiling(patch_size=stage.patch_size, inference=inference, mirror_axes=mirror_axes(stage)),
            device=device,
            request=Request(step=options.step, boxes=prepared_case.boxes),
            execution=execution,
        )
    return predict_slabs(
        networks,
        image,
        patch_size=stage.patch_size,
        inference=inference,
        mirror_axes=mirror_axes(stage),
        device=device,
        outputs=plan.labels.num_outputs,
        regions=plan.labels.has_regions,
        execution=replace(execution, recycle=True),  # exported one by one
    )


def precision_on(device: torch.device, precision: Precision) -> str:
    """The precision asked for, as far as it makes a difference on this device."""
    differs = device.type == "cuda" or (device.type == "cpu" and precision == "bf16")
    return precision if differs else "fp32"


def mirror_axes(stage: Stage) -> tuple[int, ...]:
    """Axes of the patch flipped by test-time mirroring: those mirrored in training.

    Raises:
        PlanError: a 3D axis in a stage that is not 2D, beyond the patch.
    """
    axes = stage.augmentation.mirror_axes
    if stage.is_2d:
        # the default lists all three axes of a volume; a slice has two
        return tuple(axis for axis in axes if axis < 2)
    if any(axis > 2 for axis in axes):
        raise PlanError("The plan mirrors an axis that volumes do not have", expected="0, 1, 2", found=axes)
    return axes


class _Timed:
    """Iterates over slabs and measures the seconds spent waiting for them."""

    def __init__(self, slabs: Iterable[Slab]) -> None:
        self.slabs = slabs
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Slab]:
        started = time.perf_counter()
        for slab in self.slabs:
            if slab.logits.device.type == "cuda":
                torch.cuda.synchronize(slab.logits.device)
            self.seconds += time.perf_counter() - started
            yield slab
            del slab  # release before the next is computed
            started = time.perf_counter()
        self.seconds += time.perf_counter() - started
