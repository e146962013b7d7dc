"""What a training says of its objects: prompts drawn from the masks, or clicks where the answer before was wrong."""

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


def by_clicks(
    network: Network, embedded: Embedded, ground_truths: Tensor, *, figures: ClickConfig, rng: np.random.Generator
) -> Segmented:
    """The answer to the last of some simulated clicks, the only one with gradients (InterFormer; SAM-REF supplement).

    Args:
        network: in training mode; clicks before the last are answered in evaluation mode.
        embedded: of B frames.
        ground_truths: (B, S, S) int8: 1 object, 0 background, -1 ignored.
        figures: how many clicks, and whether boxes come first.
        rng: of this batch.
    """
    count = draw_click_count(rng, gamma=figures.gamma, max_clicks=figures.max_clicks)
    boxed = figures.box > 0 and rng.random() < figures.box
    images = torch.arange(len(ground_truths), device=ground_truths.device)
    boxes = boxes_of(ground_truths == 1) if boxed else None
    points = torch.zeros(len(ground_truths), 0, 2, device=ground_truths.device)
    labels = torch.zeros(len(ground_truths), 0, dtype=torch.long, device=ground_truths.device)
    previous: Segmented | None = None
    seen = embedded
    if isinstance(network, SamRef) and count > 1:
        seen = network.prepare(embedded)
    for number in range(count):
        if number or not boxed:
            wrong = (
                torch.zeros_like(ground_truths, dtype=torch.bool)
                if previous is None
                else shown(previous, ground_truths)
            )
            point, label = training_clicks(ground_truths, wrong, rng)
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
            previous = network.segment(seen, prompted, previous=previous)
        network.train()
    raise AssertionError("at least one click is drawn")


def shown(answer: Segmented, ground_truths: Tensor) -> Tensor:
    """(B, S, S) bool: the masks of an answer on their frames."""
    return on_frames(answer.final, ground_truths.shape[-1]) > 0


def on_frames(logits: Tensor, size: int) -> Tensor:
    """Logits (B, h, w) interpolated to frames (B, S, S)."""
    if logits.shape[-1] == size:
        return logits.float()
    return F.interpolate(logits[:, None].float(), (size, size), mode="bilinear", align_corners=False)[:, 0]
