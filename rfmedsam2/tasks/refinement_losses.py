"""Losses of RFMedSAM 2 besides those of whole class maps: of SAM 2's own masks, of parts of slices, of prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from torch import Tensor

from rfmedsam2.losses import LossFunction, generalized_box_iou_loss
from rfmedsam2.nn.refinement_state import ABSENT, Size, StepMasks, StepOutputs, upsample
from rfmedsam2.prompts import Prompts, resized
from rfmedsam2.records.model import RFMedSam2Config


def generator_losses(steps: StepOutputs, reference: Prompts, size: int) -> dict[str, Tensor]:
    """Losses of box generators: presence (binary cross-entropy), L1 and generalized IoU of the boxes.

    Args:
        steps: outputs of the network.
        reference: boxes in pixels of frames of side `size`.
        size: side length of the frames in pixels.
    """
    parts: dict[str, Tensor] = {}
    if steps.presence is not None:
        parts["step0/presence"] = F.binary_cross_entropy_with_logits(steps.presence.float(), reference.present.float())
    if steps.found is not None:
        found = steps.found.float()[reference.present]
        wanted = reference.boxes[reference.present] / max(1, size - 1)
        # a sum over an empty selection is 0 and stays connected to the graph
        count = max(1, len(found))
        parts["step0/box_l1"] = (found - wanted).abs().sum() / count
        parts["step0/box_giou"] = generalized_box_iou_loss(found, wanted).sum() / count
    return parts


def counted_voxels(steps: StepOutputs, size: Size, config: RFMedSam2Config) -> dict[int, Tensor]:
    """What counts in the losses of Steps 1 and 2: step -> (B * D,) or (B * D, H, W) bool; steps that miss count whole.

    Args:
        steps: outputs of the network.
        size: rows and columns of the slices.
        config: the model; `refinement_loss.box_margin` counts the surroundings of decoded boxes alone.
    """
    margin = config.refinement_loss.box_margin
    found: dict[int, Tensor] = {}
    for number in (number for number in steps.logits if number):
        decoded = steps.decoded.get(number)
        if margin is not None and decoded is not None and len(decoded.objects):
            logits = steps.logits[number]
            assert isinstance(logits, Tensor)
            areas = boxes_as_masks(decoded, size, frame_size=config.frame_size, margin=margin)
            covered = areas.new_zeros((logits.shape[0] * logits.shape[2], *size), dtype=torch.uint8)
            found[number] = covered.index_add_(0, decoded.objects[:, 0], areas.to(torch.uint8)).bool()
        elif steps.frames is not None:
            found[number] = steps.frames
    return found


def own_mask_losses(steps: StepOutputs, members: Tensor, config: RFMedSam2Config) -> dict[str, Tensor]:
    """Cross-entropy + Dice of SAM 2's masks, each object against all else, before they are composed with Step 0.

    A gate that starts at 0 passes hardly any gradient to the decoder: this loss trains it from the start, so that its
    masks can stand alone, as they do where a person gives the boxes.

    Args:
        steps: outputs of the network.
        members: (B * D, K, H, W) bool, the reference.
        config: the model; `refinement_loss` has weight and margin.
    """
    weight, margin = config.refinement_loss.own_masks, config.refinement_loss.box_margin
    size = (members.shape[-2], members.shape[-1])
    parts: dict[str, Tensor] = {}
    for number, decoded in steps.decoded.items():
        if not len(decoded.objects):
            continue
        # a mask that was emptied by its object score has a logit far beyond any other
        masks = upsample(torch.where(decoded.masks > NO_OBJ_SCORE, decoded.masks, ABSENT), size).float()
        wanted = members[decoded.objects[:, 0], decoded.objects[:, 1]].float()
        if margin is None:
            inside = torch.ones_like(wanted)
        else:
            inside = boxes_as_masks(decoded, size, frame_size=config.frame_size, margin=margin).float()
        entropy = F.binary_cross_entropy_with_logits(masks, wanted, reduction="none")
        probabilities, wanted = masks.sigmoid() * inside, wanted * inside
        overlap = (2 * (probabilities * wanted).sum((1, 2)) + 1) / (probabilities + wanted).sum((1, 2)).add(1)
        parts[f"step{number}/mask_cross_entropy"] = weight * (entropy * inside).sum() / inside.sum().clamp_min(1)
        parts[f"step{number}/mask_dice"] = weight * (1 - overlap.mean())
    return parts


@torch.no_grad()
def boxes_as_masks(decoded: StepMasks, size: Size, *, frame_size: int, margin: float) -> Tensor:
    """Masks (q, H, W) bool of the prompts' boxes, widened on every side by a share of it, and by a pixel at least.

    Args:
        decoded: objects with boxes in pixels of SAM 2's frames.
        size: rows and columns of the masks.
        frame_size: side of SAM 2's frames in pixels.
        margin: share of a box's side.
    """
    present = torch.ones_like(decoded.boxes[:, 0], dtype=torch.bool)
    boxes = resized(Prompts(boxes=decoded.boxes, present=present), (frame_size, frame_size), size).boxes
    x0, y0, x1, y1 = boxes[..., None].unbind(1)
    wider, taller = ((margin * (high - low + 1)).clamp_min(1) for low, high in ((x0, x1), (y0, y1)))
    rows, columns = (torch.arange(n, device=boxes.device) for n in size)
    across = (columns >= x0 - wider) & (columns <= x1 + wider)
    down = (rows >= y0 - taller) & (rows <= y1 + taller)
    return down[:, :, None] & across[:, None, :]


def losses_of_part(
    logits: Tensor, target: Tensor, counted: Tensor, loss: LossFunction, *, together: bool
) -> dict[str, Tensor]:
    """Losses of some frames or voxels, as if each volume were these alone.

    Args:
        logits: (B, outputs, D, H, W).
        target: (B, D, H, W) label values.
        counted: (B * D,) or (B * D, H, W) bool, frames or voxels that count.
        loss: loss of patches.
        together: what counts of all volumes is one patch (batch Dice), else the losses of volumes are averaged.
    """
    chosen = counted.unflatten(0, (len(logits), -1))
    parts = [(own[:, part], labels[part]) for own, labels, part in zip(logits, target, chosen, strict=True)]
    parts = [(own, labels) for own, labels in parts if len(labels)]
    if together:
        parts = [(torch.cat([own for own, _ in parts], 1), torch.cat([labels for _, labels in parts]))]
    found = [loss(own[None], labels[None]) for own, labels in parts]
    return {name: torch.stack([part[name] for part in found]).mean() for name in found[0]}


def object_score_loss(steps: StepOutputs, reference: Prompts) -> dict[str, Tensor]:
    """Binary cross-entropy of the decoder's object scores: 1 where the class is on the slice, 0 where it is not."""
    if steps.scores is None or steps.objects is None or not len(steps.scores):
        return {}
    present = reference.present[steps.objects[:, 0], steps.objects[:, 1]]
    return {"step1/object_score": F.binary_cross_entropy_with_logits(steps.scores.float(), present.float())}
