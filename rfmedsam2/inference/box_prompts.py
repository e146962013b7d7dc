"""Box prompts of an image (a label map, or a list of boxes) on the slices of its planned grid.

They are transformed like the image: reoriented, cropped, transposed, resampled. A label map is resampled like training
labels, and boxes are taken from the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rfmedsam2.errors import GeometryError, ImageError, UsageError, shortlist
from rfmedsam2.geometry import Shape
from rfmedsam2.prompts import Prompts, prompts_from_labels, prompts_from_members
from rfmedsam2.records.box_prompts import BoxPrompt
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Resampling
from rfmedsam2.store.orientation import Orientation
from rfmedsam2.transforms.prepare import Restore
from rfmedsam2.transforms.resample import resample_label, separate_axis

BoxPrompts = np.ndarray | Sequence[BoxPrompt]
"""A label map (Z, Y, X), or a list of boxes, in the axes of the image file."""
FRAMES_AT_ONCE = 16


def planned_boxes(
    given: BoxPrompts, restore: Restore, orientation: Orientation | None, labels: LabelSet, resampling: Resampling
) -> Prompts:
    """Boxes of all slices and classes of an image.

    Args:
        given: box prompts of the image, in the axes of its file.
        restore: how the image was cropped, transposed and resampled.
        orientation: how it was reoriented before.
        labels: labels of the model.
        resampling: resampling settings of the model's stage.

    Returns:
        Prompts of (slices, K) in pixels of the planned grid. Several boxes of a class on one slice are merged into
        their enclosing box.

    Raises:
        UsageError: unknown labels, or boxes outside the image; lists all of them.
        GeometryError: the shape of the label map differs from the image's.
        ImageError: the label map has values unknown to the model.
    """
    if isinstance(given, np.ndarray):
        return _from_label_map(given, restore, orientation, labels, resampling)
    return _from_boxes(given, restore, orientation, labels)


def _from_label_map(
    label: np.ndarray, restore: Restore, orientation: Orientation | None, labels: LabelSet, resampling: Resampling
) -> Prompts:
    label = label.reshape(label.shape[-3:])
    shape = _shape_of_file(restore, orientation)
    if label.shape != shape:
        raise GeometryError("The shape of a label map differs", expected=f"{shape} (z, y, x)", found=label.shape)
    undeclared = sorted(set(np.unique(label).tolist()) - set(labels.allowed_values))
    if undeclared:
        raise ImageError(
            "A label map holds values unknown to the model", expected=labels.allowed_values, found=undeclared
        )
    turned = label if orientation is None else orientation.apply(label)
    planned = planned_label(turned, restore, resampling)
    parts = [
        _boxes_on(planned[start : start + FRAMES_AT_ONCE], labels) for start in range(0, len(planned), FRAMES_AT_ONCE)
    ]
    boxes, present = (torch.cat([getattr(part, name) for part in parts]) for name in ("boxes", "present"))
    return Prompts(boxes=boxes, present=present)


def planned_label(label: np.ndarray, restore: Restore, resampling: Resampling) -> np.ndarray:
    """A label map (Z, Y, X), reoriented as its image, on the planned grid: (a, b, c) int32."""
    cropped = label[tuple(slice(*limits) for limits in restore.box)].transpose(restore.transpose_forward)
    axis = separate_axis(restore.spacing_source, restore.spacing_planned, resampling.anisotropy_threshold)
    order, order_z = resampling.order_label, resampling.order_z
    return resample_label(
        np.ascontiguousarray(cropped, np.int32), restore.shape_planned, separate=axis, order=order, order_z=order_z
    )


def _boxes_on(frames: np.ndarray, labels: LabelSet) -> Prompts:
    if labels.has_regions:
        members = [np.isin(frames, values) for values in labels.foreground.values()]
        return prompts_from_members(torch.from_numpy(np.stack(members, 1)))
    # the ignore label belongs to no class either
    numbers = np.zeros(max(labels.allowed_values) + 1, np.int32)
    numbers[list(labels.values)] = np.arange(len(labels.values))
    return prompts_from_labels(torch.from_numpy(numbers[frames]), len(labels.values) - 1)


def _from_boxes(
    given: Sequence[BoxPrompt], restore: Restore, orientation: Orientation | None, labels: LabelSet
) -> Prompts:
    kinds = np.array(classes_of(given, labels), np.int64)
    lows, highs = _planned_edges(_edges(given, _shape_of_file(restore, orientation)), restore, orientation)
    frames, rows, columns = restore.shape_planned
    first, stop = np.ceil(lows[:, 0] - 0.5), np.ceil(highs[:, 0] - 0.5)
    # a slice between the centers of two coarser planned slices goes to the one that contains it
    between = stop <= first
    first = np.where(between, np.floor((lows[:, 0] + highs[:, 0]) / 2), first)
    stop = np.where(between, first + 1, stop)
    inside = ((highs > 0) & (lows < (frames, rows, columns))).all(1)
    near = np.full((frames, labels.num_outputs - (not labels.has_regions), 2), np.inf)
    far = -near
    for box in np.flatnonzero(inside):
        part = slice(max(0, int(first[box])), min(frames, int(stop[box])))
        near[part, kinds[box]] = np.minimum(near[part, kinds[box]], lows[box, 1:])
        far[part, kinds[box]] = np.maximum(far[part, kinds[box]], highs[box, 1:])
    present = np.isfinite(near).all(2)
    near = np.maximum(near, 0)
    # a pixel's index is its near edge; a box has at least one pixel
    far = np.maximum(np.minimum(far, (rows, columns)) - 1, near)
    boxes = np.concatenate([near[..., ::-1], far[..., ::-1]], 2)
    boxes[~present] = 0
    return Prompts(boxes=torch.from_numpy(boxes.astype(np.float32)), present=torch.from_numpy(present))


def _edges(given: Sequence[BoxPrompt], shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Near and far edges (q, 3) of boxes along z, y, x of the file, in voxels."""
    outside = []
    lows, highs = np.empty((len(given), 3)), np.empty((len(given), 3))
    for i, box in enumerate(given):
        x0, y0, x1, y1 = box.box
        lows[i], highs[i] = (box.slice, y0, x0), (box.slice + 1, y1 + 1, x1 + 1)
        if box.slice >= shape[0] or y1 > shape[1] - 1 or x1 > shape[2] - 1:
            outside.append(f"{box.label} on slice {box.slice}: {list(box.box)}")
    if outside:
        z, y, x = (n - 1 for n in shape)
        raise UsageError(
            f"{len(outside)} box(es) are outside the image",
            expected=f"slices 0 to {z}, x from 0 to {x}, y from 0 to {y}",
            found=shortlist(outside, separator="; "),
        )
    return lows, highs


def _planned_edges(
    edges: tuple[np.ndarray, np.ndarray], restore: Restore, orientation: Orientation | None
) -> tuple[np.ndarray, np.ndarray]:
    """The edges along the planned axes, in planned voxels."""
    lows, highs = edges
    if orientation is not None:
        lows, highs = lows[:, orientation.source_axes], highs[:, orientation.source_axes]
        size, flip = np.array(restore.source_grid.shape_zyx), np.array(orientation.flipped)
        lows, highs = np.where(flip, size - highs, lows), np.where(flip, size - lows, highs)
    begin = np.array([start for start, _ in restore.box])
    scale = np.array(restore.shape_planned) / np.array(restore.shape_cropped)
    forward = list(restore.transpose_forward)
    return (lows - begin)[:, forward] * scale, (highs - begin)[:, forward] * scale


def _shape_of_file(restore: Restore, orientation: Orientation | None) -> Shape:
    shape = restore.source_grid.shape_zyx
    if orientation is None:
        return shape
    z, y, x = (shape[orientation.source_axes.index(axis)] for axis in range(3))
    return (z, y, x)


def classes_of(given: Sequence[BoxPrompt], labels: LabelSet) -> list[int]:
    """Class index, from 0, of each box.

    Raises:
        UsageError: labels unknown to the model.
    """
    regions = labels.regions_class_order or ()
    values = list(regions) if labels.has_regions else list(labels.values[1:])
    numbers: dict[str | int, int] = {value: i for i, value in enumerate(values)}
    for i, (name, own) in enumerate(labels.foreground.items()):
        numbers[name] = i if labels.has_regions else values.index(own[0])
    unknown = sorted({str(box.label) for box in given} - {str(label) for label in numbers})
    if unknown:
        raise UsageError(
            "Boxes have labels unknown to the model",
            expected=f"one of {', '.join(labels.foreground)}",
            found=", ".join(unknown),
        )
    by_text = {str(label): number for label, number in numbers.items()}
    return [numbers[box.label] if box.label in numbers else by_text[str(box.label)] for box in given]
