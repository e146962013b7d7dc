"""Export: slabs of logits -> label map on the grid of the source file.

Resampling and arg-max are fused, plane by plane as the slabs arrive: equal to resampling all logits and taking the
arg-max (nnU-Net's order of operations), but without storing the logits of a whole volume or at full resolution.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rfmedsam2.errors import PlanError
from rfmedsam2.inference.export_kernels import paint_classes, paint_regions
from rfmedsam2.inference.probabilities import ProbabilityMap
from rfmedsam2.inference.sliding_window import Slab
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Resampling
from rfmedsam2.transforms.prepare import Restore
from rfmedsam2.transforms.resample import linear_taps, nearest_index, separate_axis

MAX_THREADS = 8
Taps = tuple[np.ndarray, np.ndarray]
"""Source index (int32) and weight of the next source (float32) for every target voxel along an axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Target planes with the same source: planes `near` and, with `weight`, `far`, each as (logits, index)."""

    first: int
    last: int
    near: tuple[Tensor, int]
    far: tuple[Tensor, int]
    weight: float

    def source(self) -> tuple[Tensor, int]:
        """Logits (K, planes, b, c) and the index of the source plane in them; blended only if necessary."""
        if self.weight == 0:
            return self.near
        (near, i), (far, j) = self.near, self.far
        return torch.lerp(near[:, i : i + 1], far[:, j : j + 1], self.weight), 0


def labels_from_slabs(
    slabs: Iterable[Slab],
    restore: Restore,
    labels: LabelSet,
    resampling: Resampling,
    *,
    probabilities: ProbabilityMap | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Resample logits to the source grid, take the arg-max, and insert the result into the uncropped volume.

    Args:
        slabs: all planes of the planned grid in order (`predict_slabs`), on the device that does the work.
        restore: how the image was cropped, transposed and resampled.
        labels: classes (arg-max) or regions (painted in `regions_class_order` if the sigmoid exceeds 0.5).
        resampling: interpolation order of the logits; as in nnU-Net, with a separate axis if anisotropic.
        probabilities: collects the softmax or sigmoid at full resolution.
        threads: number of threads for CPU slabs; default: the machine's cores, at most `MAX_THREADS`.

    Returns:
        (Z, Y, X) in the axes and shape of `restore.source_grid`; uint8, or uint16 if a value exceeds 255.

    Raises:
        PlanError: the slabs do not match `restore` or `labels`.
        StoreError: the probabilities cannot be written.
    """
    taps = _taps(restore, resampling)
    table = label_table(labels)
    result = np.zeros(restore.source_grid.shape_zyx, dtype=table.dtype)
    inside = tuple(slice(start, stop) for start, stop in restore.box)
    view = result[inside].transpose(restore.transpose_forward)
    workers = threads or min(os.cpu_count() or 1, MAX_THREADS)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        file = None if probabilities is None else stack.enter_context(probabilities)
        painter = _Painter(table, taps[1:], regions=labels.has_regions)
        for targets in _targets(slabs, taps[0], restore.shape_planned, labels.num_outputs):
            for target, plane in zip(targets, pool.map(painter, targets), strict=True):
                view[target.first : target.last] = plane
            if file is not None:
                for target in targets:
                    file.add(target.last - target.first, painter.interpolated(target))
            target = None
            targets.clear()  # release the slab's logits before the next ones are computed
    return result


def _targets(slabs: Iterable[Slab], taps: Taps, shape: Sequence[int], outputs: int) -> Iterator[list[Target]]:
    """For each slab, the target planes that can be computed; the last plane of a slab is kept for the next."""
    index, weight = taps
    done, end = 0, 0
    last: tuple[Tensor, int] | None = None
    for slab in slabs:
        logits = slab.logits.contiguous()
        if slab.start != end or logits.shape[0] != outputs or tuple(logits.shape[2:]) != tuple(shape[1:]):
            expected = f"plane {end} of ({outputs}, *, {shape[1]}, {shape[2]})"
            raise PlanError("A slab of logits does not match", expected=expected, found=(slab.start, *logits.shape))
        end += logits.shape[1]
        reach = index + (weight > 0)
        ready = int(np.searchsorted(reach, end, side="left"))
        targets = []
        while done < ready:
            stop = done + 1
            while stop < ready and index[stop] == index[done] and weight[stop] == weight[done]:
                stop += 1
            near, far = (_plane(logits, slab.start, last, int(i)) for i in (index[done], reach[done]))
            targets.append(Target(first=done, last=stop, near=near, far=far, weight=float(weight[done])))
            del near, far
            done = stop
        last = (logits[:, -1:].clone(memory_format=torch.contiguous_format), end - 1)
        del slab, logits  # only `targets` refers to them, until they are painted
        yield targets
    if end != shape[0] or done != len(index):
        raise PlanError("Slabs of logits are missing", expected=f"{shape[0]} planes", found=f"{end}")


def _plane(logits: Tensor, start: int, last: tuple[Tensor, int] | None, index: int) -> tuple[Tensor, int]:
    if index >= start:
        return logits, index - start
    assert last is not None
    assert last[1] == index
    return last[0], 0


class _Painter:
    """Turns a target's logits into its plane of labels; thread-safe."""

    def __init__(self, table: np.ndarray, taps: Sequence[Taps], *, regions: bool) -> None:
        self.table = table
        self.taps = (taps[0], taps[1])
        self.regions = regions
        self.shape = (len(taps[0][0]), len(taps[1][0]))

    def __call__(self, target: Target) -> np.ndarray:
        """Labels (B, C) of the target's planes."""
        if target.near[0].device.type != "cpu":
            return self._on_device(target)
        logits, index = target.source()
        plane = np.empty(self.shape, self.table.dtype)
        paint = paint_regions if self.regions else paint_classes
        rows, columns = self.taps
        paint(logits.numpy(), index, self.table, rows, columns, plane)
        return plane

    def interpolated(self, target: Target) -> Tensor:
        """Interpolate the logits of the target's planes to full resolution, float32 (K, B, C), on their device."""
        logits, index = target.source()
        plane = logits[:, index]
        for axis, (start, weight) in enumerate(self.taps, start=1):
            if plane.shape[axis] == len(start) and not weight.any():
                continue
            near = torch.from_numpy(start).to(plane.device, torch.int64)
            far = near + torch.from_numpy(weight > 0).to(plane.device, torch.int64)
            shape = (1, -1, 1) if axis == 1 else (1, 1, -1)
            share = torch.from_numpy(weight).to(plane.device).view(shape)
            plane = torch.lerp(plane.index_select(axis, near), plane.index_select(axis, far), share)
        return plane

    def _on_device(self, target: Target) -> np.ndarray:
        plane = self.interpolated(target)
        if self.regions:
            order = torch.arange(1, plane.shape[0] + 1, device=plane.device).view(-1, 1, 1)
            winner = ((plane > 0) * order).amax(0)
        else:
            winner = plane.argmax(0)
        small = winner.to(torch.uint8) if len(self.table) <= 256 else winner.to(torch.int16)
        return self.table[small.cpu().numpy()]


def _taps(restore: Restore, resampling: Resampling) -> list[Taps]:
    """Interpolation taps from the planned grid to the cropped source grid, per planned axis."""
    separate = separate_axis(restore.spacing_planned, restore.spacing_source, resampling.anisotropy_threshold)
    taps = []
    for axis, (n_in, n_out) in enumerate(zip(restore.shape_planned, restore.shape_cropped, strict=True)):
        order = resampling.order_z if axis == separate else resampling.order_logits
        if order == 0:
            taps.append((nearest_index(n_in, n_out), np.zeros(n_out, np.float32)))
        else:
            taps.append(linear_taps(n_in, n_out))
    return taps


def label_table(labels: LabelSet) -> np.ndarray:
    """Label values by index of the winner: class, or region + 1 with 0 for none."""
    values = (0, *(labels.regions_class_order or ())) if labels.has_regions else labels.values
    return np.asarray(values, dtype=np.uint8 if max(values) <= 255 else np.uint16)
