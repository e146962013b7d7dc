"""PatchDiff: refine again what the last click changed, within a window (SAM-REF paper, section 3.4).

Windows are (x0, y0, x1, y1), whole-numbered pixel edges of the maps: a window covers the pixels x0 to x1 - 1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from torchvision.ops import roi_align

from rfmedsam2.nn.segmenter import PromptBatch
from segment_anything_hq.nn.global_diff import WIDTH, ErrorDetailHeads, Refined, in_map

EXPANSION = 1.4
"""Factor by which the box of the change is enlarged (FocalClick's; the paper does not specify one)."""
LEAST_SHARE = 1 / 8
"""Side of the smallest window, as a share of the map's."""
WITHIN_PLANES = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
"""Connectivity for labeling a stack of masks: 8-connected within a mask, not connected across masks."""


class PatchDiff(nn.Module):
    """Error and detail heads on RoIAlign crops of the fused features, both masks so far and the disks of the clicks."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = ErrorDetailHeads(WIDTH + 4)

    def forward(self, features: Tensor, prompt_map: Tensor, refined: Tensor, windows: Tensor) -> tuple[Refined, Tensor]:
        """Refine SAM's masks within windows.

        Args:
            features: (P, 64, h, w) GlobalDiff's fused features.
            prompt_map: (P, 3, h, w) disks and SAM's logits.
            refined: (P, h, w) GlobalDiff's mask.
            windows: (P, 4).

        Returns:
            Error and mask (P, h, w), with the window scaled to the whole map, and SAM's logits within the window in the
            same shape.
        """
        maps = torch.cat([features.float(), prompt_map, refined[:, None]], 1)
        patch = cropped(maps, windows)
        coarse = patch[:, WIDTH + 2]
        return self.heads(patch, coarse), coarse


def cropped(maps: Tensor, windows: Tensor, *, side: int | None = None) -> Tensor:
    """Crop windows (P, 4) from maps (P, C, h, w) and scale them to (P, C, h, w) by RoIAlign.

    Args:
        maps: (P, C, h, w).
        windows: in pixels of these maps, or of maps of side `side`.
        side: side of the maps that the windows refer to, and of the result; None: that of `maps`.
    """
    index = torch.arange(len(maps), device=maps.device, dtype=maps.dtype)[:, None]
    rois = torch.cat([index, windows.to(maps.dtype)], 1)
    size, scale = (maps.shape[2], maps.shape[3]), 1.0
    if side is not None:
        size, scale = (side, side), maps.shape[3] / side
    return roi_align(maps, rois, size, spatial_scale=scale, sampling_ratio=1, aligned=True)


def pasted(patches: Tensor, into: Tensor, windows: Tensor) -> Tensor:
    """Paste `patches` (P, h, w), scaled to their windows (P, 4), into masks `into` (P, h, w)."""
    height, width = into.shape[1:]
    x0, y0, x1, y1 = windows.to(patches.dtype)[..., None].unbind(1)
    across = (torch.arange(width, device=into.device) + 0.5 - x0) / (x1 - x0)
    down = (torch.arange(height, device=into.device) + 0.5 - y0) / (y1 - y0)
    grid = torch.stack(torch.broadcast_tensors(across[:, None], down[..., None]), -1) * 2 - 1
    scaled = F.grid_sample(patches[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    inside = ((down > 0) & (down < 1))[..., None] & ((across > 0) & (across < 1))[:, None]
    return torch.where(inside, scaled, into)


def change_windows(masks: Tensor, before: Tensor, prompted: PromptBatch) -> Tensor:
    """Windows (P, 4) of what changed around the last click.

    A window is the box of the changed connected component that contains the click, enlarged by `EXPANSION`. If the
    click lies outside all changes, it is a small window around the click; without clicks, the box of all changes;
    without changes, the whole map.

    Args:
        masks: (P, h, w) logits.
        before: (P, h, w) logits of the previous click.
        prompted: the clicks; the last one of each row is the newest.
    """
    change = ((masks > 0) ^ (before > 0)).detach()
    height, width = change.shape[1:]
    clicks, clicked = last_clicks(prompted, width=width, height=height)
    chosen = torch.where(clicked[:, None, None], _component_at(change, clicks), change)
    boxes = _boxes(chosen)
    least = max(1.0, LEAST_SHARE * width)
    around = torch.cat([clicks - least / 2, clicks + least / 2], 1)
    whole = boxes.new_tensor([0, 0, width, height])
    found = chosen.any(2).any(1)[:, None]
    boxes = torch.where(found, boxes, torch.where(clicked[:, None], around, whole))
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    side = (boxes[:, 2:] - boxes[:, :2]) * torch.where(found, EXPANSION, 1.0)
    side = side.clamp_min(least)
    low = (center - side / 2).floor().clamp_min(0)
    high = torch.minimum((center + side / 2).ceil(), whole[2:])
    return torch.cat([low, high], 1)


def last_clicks(prompted: PromptBatch, *, width: int, height: int) -> tuple[Tensor, Tensor]:
    """The newest click of each row in whole pixels of the map, (P, 2) float, and whether one exists, (P,) bool."""
    if prompted.points is None or prompted.point_labels is None or not prompted.points.shape[1]:
        none = torch.zeros(len(prompted), 2, device=prompted.images.device)
        return none, torch.zeros(len(prompted), dtype=torch.bool, device=none.device)
    given = prompted.point_labels >= 0
    order = torch.arange(1, given.shape[1] + 1, device=given.device)
    newest = (given * order).argmax(1)
    points = in_map(prompted.points.float())[torch.arange(len(prompted), device=given.device), newest].round()
    top = points.new_tensor([width - 1, height - 1])
    return torch.minimum(points.clamp_min(0), top), given.any(1)


def _component_at(change: Tensor, clicks: Tensor) -> Tensor:
    """The connected component of masks (P, h, w) bool that contains the click (P, 2); empty where no component does."""
    components = np.empty(change.shape, np.int32)
    ndimage.label(change.cpu().numpy(), structure=WITHIN_PLANES, output=components)
    labels = torch.from_numpy(components).to(change.device)
    x, y = clicks.long().unbind(1)
    at = labels[torch.arange(len(labels), device=labels.device), y, x][:, None, None]
    return (labels == at) & (at > 0)


def _boxes(masks: Tensor) -> Tensor:
    """Edges (P, 4) float of the boxes of masks (P, h, w) bool; the whole map for empty masks."""
    (x0, x1), (y0, y1) = (_ends(masks.any(axis)) for axis in (1, 2))
    return torch.stack([x0, y0, x1, y1], 1).float()


def _ends(held: Tensor) -> tuple[Tensor, Tensor]:
    """Index (P,) of the first True of each row (P, n), and one past the last."""
    return held.int().argmax(1), held.shape[1] - held.flip(1).int().argmax(1)
