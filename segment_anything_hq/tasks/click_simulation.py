"""Training with simulated corrective clicks: each is placed on an error of the mask before."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented
from segment_anything_hq.models import Network
from segment_anything_hq.nn.sam_ref import SamRef
from segment_anything_hq.prompts.clicks import draw_click_count, training_clicks
from segment_anything_hq.prompts.sampling import boxes_of
from segment_anything_hq.records import ClickConfig


def segment_with_clicks(
    network: Network, embedded: Embedded, ground_truths: Tensor, *, config: ClickConfig, rng: np.random.Generator
) -> Segmented:
    """Simulate clicks and segment after each; only the last step has gradients (InterFormer; SAM-REF supplement, 1.3).

    Args:
        network: the network in training mode; the steps before the last run in evaluation mode.
        embedded: embedding of B frames.
        ground_truths: (B, S, S) int8: 1 object, 0 background, -1 ignored.
        config: number of clicks, and whether a box comes first.
        rng: generator of this batch.

    Returns:
        the network's output after the last click.
    """
    count = draw_click_count(rng, gamma=config.gamma, max_clicks=config.max_clicks)
    use_boxes = config.box > 0 and rng.random() < config.box
    images = torch.arange(len(ground_truths), device=ground_truths.device)
    boxes = boxes_of(ground_truths == 1) if use_boxes else None
    points = torch.zeros(len(ground_truths), 0, 2, device=ground_truths.device)
    labels = torch.zeros(len(ground_truths), 0, dtype=torch.long, device=ground_truths.device)
    previous: Segmented | None = None
    prepared = embedded
    if isinstance(network, SamRef) and count > 1:
        prepared = network.prepare(embedded)
    for number in range(count):
        if number or not use_boxes:
            predicted = (
                torch.zeros_like(ground_truths, dtype=torch.bool)
                if previous is None
                else predicted_masks(previous, ground_truths)
            )
            point, label = training_clicks(ground_truths, predicted, rng)
            points, labels = torch.cat([points, point[:, None]], 1), torch.cat([labels, label[:, None]], 1)
        prompted = PromptBatch(
            images=images,
            points=points if points.shape[1] else None,
            point_labels=labels if points.shape[1] else None,
            boxes=boxes,
            masks=None if previous is None else previous.logits,
        )
        if number == count - 1:
            return network.segment(embedded, prompted, previous=previous)
        network.eval()
        with torch.no_grad():
            previous = network.segment(prepared, prompted, previous=previous)
        network.train()
    raise AssertionError("at least one click is drawn")


def predicted_masks(answer: Segmented, ground_truths: Tensor) -> Tensor:
    """(B, S, S) bool: predicted masks at the frames' resolution."""
    return upsample_to_frame(answer.final, ground_truths.shape[-1]) > 0


def upsample_to_frame(logits: Tensor, size: int) -> Tensor:
    """Interpolate logits (B, h, w) to the frames' resolution (B, S, S)."""
    if logits.shape[-1] == size:
        return logits.float()
    return F.interpolate(logits[:, None].float(), (size, size), mode="bilinear", align_corners=False)[:, 0]
