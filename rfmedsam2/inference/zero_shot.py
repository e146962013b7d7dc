"""Zero-shot SAM on volumes, slice by slice with given prompts (RFMedSAM 2 paper, 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2.nn.sam import SamSegmenter
from rfmedsam2.nn.segmenter import PromptBatch, at_image_size, fitted_size
from rfmedsam2.prompts import Prompts, center_points, prompts_from_labels
from rfmedsam2.prompts import resized as resized_prompts
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.study import PromptKind
from rfmedsam2.system.progress import Track, silent

AT_ONCE = 16
"""Number of prompts decoded per batch."""


def reference_prompts(labels_zyx: np.ndarray, labels: LabelSet, kind: PromptKind) -> Prompts:
    """Prompts of (Z, K) slices and classes from a reference label map (Z, Y, X).

    A box is tight about the class; a point is the box of one pixel, the one nearest to the center of gravity.
    """
    found = []
    for values in labels.foreground.values():
        mask = torch.from_numpy(np.isin(labels_zyx, values).view(np.uint8))
        if kind == "box":
            found.append(prompts_from_labels(mask, 1))
        else:
            points, present = center_points(mask, 1)
            found.append(Prompts(boxes=torch.cat([points, points], -1), present=present))
    return Prompts(boxes=torch.cat([f.boxes for f in found], 1), present=torch.cat([f.present for f in found], 1))


def sam_points(prompts: Prompts, kind: PromptKind, size: tuple[int, int], resized: tuple[int, int]) -> Tensor:
    """Coordinates that SAM takes, (Z, K, P, 2) of (x, y), in pixel indices of frames resized from (H, W) to (H, W).

    A box gives its first and last pixel (P = 2), a point the middle of its pixel (P = 1): SAM's coordinate x is the
    middle of pixel x.
    """
    if kind == "box":
        return resized_prompts(prompts, size, resized).boxes.unflatten(-1, (2, 2))
    scale = prompts.boxes.new_tensor([resized[1] / size[1], resized[0] / size[0]])
    return (prompts.boxes[..., None, :2] + 0.5) * scale - 0.5


class Painter:
    """Merges the classes' mask logits into label maps.

    For mutually exclusive classes the highest logit above 0 wins; regions are painted in their order.
    """

    def __init__(self, labels: LabelSet) -> None:
        self.regions = labels.regions_class_order if labels.has_regions else None
        order = self.regions or tuple(values[0] for values in labels.foreground.values())
        self.values = np.asarray(order)
        self.dtype = np.uint8 if self.values.max(initial=0) < 256 else np.uint16

    def paint(self, logits: Tensor, classes: Tensor, target: np.ndarray) -> None:
        """Fill a slice (H, W).

        Args:
            logits: (n, H, W), logits of the segmented classes.
            classes: (n,) their indices, ascending, from 0 in declared order.
            target: label map, filled in place.
        """
        target[:] = 0
        if len(logits) == 0:
            return
        values = self.values[classes.cpu().numpy()]
        if self.regions is None:
            highest, which = logits.max(0)
            target[:] = np.where((highest > 0).cpu().numpy(), values[which.cpu().numpy()], 0)
            return
        for mask, value in zip((logits > 0).cpu().numpy(), values, strict=True):
            target[mask] = value


def segment_slices(
    sam: SamSegmenter, frames: Tensor, prompts: Mapping[PromptKind, Prompts], labels: LabelSet, *, track: Track = silent
) -> dict[PromptKind, np.ndarray]:
    """Run SAM on every slice with a prompt.

    Args:
        sam: the model, on its device; with `best_of_three`, as SAM's authors recommend for points.
        frames: RGB slices (Z, 3, H, W), 0 to 255, on any device.
        prompts: prompts of the slices, by kind; all kinds share each slice's embedding.
        labels: labels of the dataset.
        track: progress display over slices.

    Returns:
        Kind of prompt -> label map (Z, H, W).
    """
    painter = Painter(labels)
    device = next(sam.parameters()).device
    size = (frames.shape[2], frames.shape[3])
    resized = fitted_size(size, sam.frame_size)
    out: dict[PromptKind, np.ndarray] = {kind: np.zeros((len(frames), *size), painter.dtype) for kind in prompts}
    points = {kind: sam_points(each, kind, size, resized) for kind, each in prompts.items()}
    for z in track(range(len(frames)), "slices", len(frames)):
        present: dict[PromptKind, Tensor] = {kind: each.present[z].nonzero()[:, 0] for kind, each in prompts.items()}
        if not any(len(classes) for classes in present.values()):
            continue
        frame = frames[z : z + 1].to(device)
        image = F.interpolate(frame, resized, mode="bilinear", align_corners=False, antialias=True)
        embedded = sam.encode(sam.normalize(image))
        for kind, classes in present.items():
            given = points[kind][z, classes].to(device)
            low = [sam.segment(embedded, as_batch(part, kind)).logits for part in given.split(AT_ONCE)]
            masks = [at_image_size(part, frame_size=sam.frame_size, resized=resized, size=size) for part in low]
            painter.paint(torch.cat(masks), classes, out[kind][z])
    return out


def as_batch(points: Tensor, kind: PromptKind) -> PromptBatch:
    """Boxes (n, 2, 2), near and far corner, or points (n, 1, 2) of one frame, in its pixels, as SAM takes them."""
    images = torch.zeros(len(points), dtype=torch.long, device=points.device)
    if kind == "box":
        return PromptBatch(images=images, boxes=points.flatten(1))
    return PromptBatch(images=images, points=points, point_labels=torch.ones_like(points[..., 0], dtype=torch.long))
