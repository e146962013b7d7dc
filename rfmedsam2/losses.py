"""Losses of volumetric segmentation: cross-entropy + Dice and their variants, regions, ignore label, deep supervision.

Equal to nnU-Net's DC_and_CE_loss, DC_and_BCE_loss and DC_and_topk_loss, and to MONAI's FocalLoss and TverskyLoss
(checked by parity tests). Logits are (B, K, ...spatial); targets
are integer label maps (B, ...spatial), so that no one-hot targets have to be transferred from the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from rfmedsam2.extensions import make
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import SegmentationLoss, Stage

LossFunction = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""(logits (B, K, ...), target (B, ...) label values) -> named scalar parts, whose sum is minimized."""


def memberships(target: Tensor, labels: LabelSet) -> Tensor:
    """Label values (B, ...) -> membership of each voxel in the outputs, (B, K, ...) bool.

    Classes: K includes background, exactly one is true. Regions: one channel per region; regions may overlap.
    """
    if labels.has_regions:
        # one extra entry, which index -1 (outside the volume) refers to, and which belongs to no output
        lookup = torch.zeros(max(labels.allowed_values) + 2, len(labels.foreground), dtype=torch.bool)
        for channel, values in enumerate(labels.foreground.values()):
            lookup[list(values), channel] = True
        return lookup.to(target.device)[target.long()].movedim(-1, 1)
    values = torch.tensor(labels.values, device=target.device, dtype=target.dtype)
    return target[:, None] == values.view(1, -1, *[1] * (target.ndim - 1))


def soft_overlap(probabilities: Tensor, members: Tensor, *, mask: Tensor | None, config: SegmentationLoss) -> Tensor:
    """Mean soft Dice coefficient, or Tversky index, over channels (and samples unless `config.batch_dice`).

    Args:
        probabilities: (B, K, ...).
        members: (B, K, ...) of 0 and 1.
        mask: (B, 1, ...) voxels to include; None: all.
        config: its `batch_dice` (sum over the batch and over ranks before dividing, as for one large patch),
            `dice_smooth` (added to numerator and denominator) and `tversky` count.
    """
    axes = tuple(range(2, probabilities.ndim))
    if mask is not None:
        probabilities, members = probabilities * mask, members * mask
    overlap = (probabilities * members).sum(axes, dtype=torch.float32)
    predicted = probabilities.sum(axes, dtype=torch.float32)
    reference = members.sum(axes, dtype=torch.float32)
    if config.batch_dice:
        overlap, predicted, reference = (_over_ranks(t.sum(0)) for t in (overlap, predicted, reference))
    # of false positives (predicted - overlap) and negatives (reference - overlap); with 1 and 1 nothing is rounded
    positive, negative = (2 * weight for weight in config.tversky)
    errors = positive * predicted + negative * reference + (2 - positive - negative) * overlap
    return ((2 * overlap + config.dice_smooth) / (errors + config.dice_smooth).clamp_min(1e-8)).mean()


def segmentation_losses(
    logits: Tensor, target: Tensor, labels: LabelSet, config: SegmentationLoss
) -> dict[str, Tensor]:
    """Weighted loss parts of one resolution: `cross_entropy` and `dice` (the negative coefficient, as in nnU-Net).

    Args:
        logits: (B, K, ...).
        target: (B, ...) integer label values, possibly with `labels.ignore`.
        labels: labels that define the outputs.
        config: weights and Dice variant.
    """
    mask = None if labels.ignore is None else target != labels.ignore
    clean = target if mask is None else torch.where(mask, target, 0)
    members = memberships(clean, labels)
    mask = None if mask is None else mask[:, None]
    if labels.has_regions:
        entropies = F.binary_cross_entropy_with_logits(logits, members.to(logits.dtype), reduction="none")
        entropies = _focal(entropies, config.focal_gamma)
        probabilities = logits.sigmoid()
    else:
        indices = _class_indices(clean, labels)
        entropies = _focal(F.cross_entropy(logits, indices, reduction="none")[:, None], config.focal_gamma)
        if config.class_balance:
            entropies = entropies * _class_weights(indices, mask, config.class_balance)
        probabilities, members = logits.softmax(1)[:, 1:], members[:, 1:]
    overlap = soft_overlap(probabilities, members, mask=mask, config=config)
    mean = _mean_over(entropies, mask) if config.top_k == 100 else _mean_of_largest(entropies, mask, config.top_k)
    return {"cross_entropy": config.cross_entropy * mean, "dice": -config.dice * overlap}


def deep_supervision_weights(levels: int, *, lowest: bool = False) -> list[float]:
    """Weights halve per level and sum to 1 (paper, eq. 2); unless `lowest`, the last of several is 0, as in nnU-Net."""
    weights = [0.5**level for level in range(levels)]
    if levels > 1 and not lowest:
        weights[-1] = 0.0
    total = sum(weights)
    return [w / total for w in weights]


def loss_of(stage: Stage, labels: LabelSet) -> LossFunction:
    """The loss of a stage: cross-entropy + Dice, or an extension's."""
    if stage.extensions.loss is not None:
        return make("loss", stage.extensions.loss, labels=labels)
    return partial(segmentation_losses, labels=labels, config=stage.loss)


def deep_supervision_losses(
    outputs: Sequence[Tensor], target: Tensor, loss: LossFunction, *, lowest: bool = False
) -> dict[str, Tensor]:
    """Weighted sums of a loss's parts over resolutions, highest first; the target is downsampled to each.

    Levels of weight 0 contribute a zero gradient, so that every parameter is used in distributed training.
    """
    total: dict[str, Tensor] = {}
    for weight, logits in zip(deep_supervision_weights(len(outputs), lowest=lowest), outputs, strict=True):
        if weight == 0:
            first = next(iter(total))
            total[first] = total[first] + 0 * logits.float().sum()
            continue
        parts = loss(logits.float(), shrink_labels(target, logits.shape[2:]))
        for name, part in parts.items():
            total[name] = weight * part + total.get(name, 0)
    return total


def shrink_labels(target: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample labels (B, ...) to `shape` with nearest-exact, as nnU-Net's deep supervision transform does."""
    if tuple(target.shape[1:]) == tuple(shape):
        return target
    return F.interpolate(target[:, None].float(), tuple(shape), mode="nearest-exact")[:, 0].to(target.dtype)


def _class_indices(target: Tensor, labels: LabelSet) -> Tensor:
    """Label values (B, ...) -> int64 output indices; an arg-max over memberships takes 50 times as long."""
    lookup = torch.zeros(max(labels.allowed_values) + 2, dtype=torch.int64)  # one extra entry, as in `memberships`
    lookup[list(labels.values)] = torch.arange(len(labels.values))
    return lookup.to(target.device).take(target.long())


def _class_weights(indices: Tensor, mask: Tensor | None, exponent: float) -> Tensor:
    """Weights (B, 1, ...) of voxels by the size of their class in the batch, with mean 1 over the included voxels."""
    included = indices if mask is None else indices[mask[:, 0]]
    counts = torch.bincount(included.flatten(), minlength=int(indices.max()) + 1).clamp_min(1).double()
    weights = counts**-exponent
    weights = weights * (counts.sum() / (weights * counts).sum())
    return weights.float().take(indices)[:, None]


def _mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over included voxels; with a mask, channels are summed, as nnU-Net weights regions in that case."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp_min(1)


def _mean_of_largest(values: Tensor, mask: Tensor | None, percentage: float) -> Tensor:
    """Mean over the largest of the included voxels' values; nnU-Net counts ignored voxels, too, as zeros."""
    included = values.flatten() if mask is None else values[mask.expand_as(values)]
    if not len(included):
        return 0 * values.sum()
    return included.topk(max(1, int(len(included) * percentage / 100)), sorted=False).values.mean()


def _focal(entropies: Tensor, gamma: float) -> Tensor:
    """Cross-entropy -log p, weighted by (1 - p) ** gamma."""
    if gamma == 0:
        return entropies
    # the power has no finite slope at 0 if gamma is below 1
    return (-torch.expm1(-entropies)).clamp_min(1e-12) ** gamma * entropies


class _SumOverRanks(torch.autograd.Function):
    """All-reduce with an all-reduced gradient."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:  # noqa: ARG004
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


def _over_ranks(value: Tensor) -> Tensor:
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return value
    return _SumOverRanks.apply(value)  # type: ignore[return-value]


def generalized_box_iou_loss(boxes: Tensor, references: Tensor) -> Tensor:
    """1 - GIoU of pairs of boxes: GIoU is the IoU minus the fraction of the enclosing box that neither covers.

    Equal to torchvision.ops.generalized_box_iou_loss, whose import takes longer than all other imports of a training.

    Args:
        boxes: (n, 4) coordinates x0, y0, x1, y1.
        references: (n, 4) coordinates x0, y0, x1, y1.

    Returns:
        (n,) losses, from 0 to 2.
    """
    smallest = 1e-7  # as torchvision: keeps empty boxes finite
    low, high = torch.maximum(boxes[:, :2], references[:, :2]), torch.minimum(boxes[:, 2:], references[:, 2:])
    # disjoint boxes have no overlap, although the product of their negative sides may be positive
    overlap = torch.where((high > low).all(1), (high - low).prod(1), 0)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (references[:, 2:] - references[:, :2]).prod(1) - overlap
    outer_low, outer_high = (
        torch.minimum(boxes[:, :2], references[:, :2]),
        torch.maximum(boxes[:, 2:], references[:, 2:]),
    )
    hull = (outer_high - outer_low).prod(1)
    return 1 - overlap / (union + smallest) + (hull - union) / (hull + smallest)
