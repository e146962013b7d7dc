"""Random changes of prompts, logits and memories while Steps 1 and 2 are trained (`records.model.Disturbance`).

Randomness comes from torch's global RNG, whose state checkpoints hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2.prompts import Prompts


def jittered(prompts: Prompts, pixels: int, size: tuple[int, int]) -> Prompts:
    """Boxes (N, K, 4) whose sides are moved by -pixels to pixels each, inside frames of `size` and not inverted."""
    if not pixels:
        return prompts
    height, width = size
    moved = prompts.boxes + torch.randint(-pixels, pixels + 1, prompts.boxes.shape, device=prompts.boxes.device)
    x0, y0, x1, y1 = moved.unbind(-1)
    x0, x1 = x0.clamp(0, width - 1), x1.clamp(0, width - 1)
    y0, y1 = y0.clamp(0, height - 1), y1.clamp(0, height - 1)
    low, high = (torch.stack(torch.broadcast_tensors(*pair), -1) for pair in ((x0, y0), (x1, y1)))
    boxes = torch.cat([torch.minimum(low, high), torch.maximum(low, high)], -1)
    return Prompts(boxes=torch.where(prompts.present[..., None], boxes, prompts.boxes), present=prompts.present)


def smooth_noise(like: Tensor, voxels: int) -> Tensor:
    """Noise of mean 0 and standard deviation 1 for maps (B, K, D, H, W), which varies over `voxels` voxels.

    Normal values on a grid `voxels` apart, interpolated linearly; between grid points their deviation would be smaller,
    hence the scaling by the root mean square of each map.
    """
    grid = [max(2, -(-n // voxels) + 1) if n > 1 else 1 for n in like.shape[2:]]
    coarse = torch.randn(*like.shape[:2], *grid, device=like.device)
    fine = F.interpolate(coarse, like.shape[2:], mode="trilinear", align_corners=True)
    return fine / fine.square().mean((2, 3, 4), keepdim=True).sqrt().clamp_min(1e-6)


def with_noise(class_map: Tensor, strength: float, voxels: int) -> Tensor:
    """Class map (B, K, D, H, W) plus smooth noise of this standard deviation."""
    return class_map + strength * smooth_noise(class_map, voxels) if strength else class_map


def without_some(rows: Tensor, share: float) -> Tensor:
    """Rows of a memory bank, of which each is -1 (no memory) with probability `share`."""
    if not share:
        return rows
    return torch.where(torch.rand(rows.shape, device=rows.device) < share, -1, rows)
