"""Prompt Retargeting: align the updated embedding with the prompts again.

SAM2Refiner paper (section "Prompt Retargeting"; supplement, section 1.2): features are sampled from the embedding in
small patches at the prompts, RFB blocks reduce the channels of patches and embedding, and cross-attention from the
embedding to the patches, both with positional encoding, updates the embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfmedsam2.nn.segmenter import PromptBatch
from rfmedsam2.prompts import prompts_from_members
from segment_anything_hq.nn.localization_augment import attend, zeroed

Encode = Callable[[Tensor], Tensor]
"""Positions (..., 2), XY in pixels of the frame -> positional encoding (..., C)."""
BOX, MASK = 2, 3
"""Kinds of prompts besides 0 and 1, the labels of points."""


class RFB(nn.Module):
    """Receptive field block: three branches with increasing receptive fields (supplement, Figure 1).

    Each branch applies 1x1, 1xn, nx1 and dilated 3x3 convolutions (dilation n). The branches are concatenated and
    merged by a 1x1 convolution; the input, through another 1x1 convolution, is added.

    Args:
        channels_in: channels of the input.
        channels: channels of the branches and the output.
        sizes: n of each branch, odd. The supplement does not specify them; these are the block's usual ones.
    """

    def __init__(self, channels_in: int, channels: int, *, sizes: tuple[int, ...] = (3, 5, 7)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels_in, channels, kernel_size=1),
                nn.Conv2d(channels, channels, kernel_size=(1, n), padding=(0, n // 2)),
                nn.Conv2d(channels, channels, kernel_size=(n, 1), padding=(n // 2, 0)),
                nn.GELU(),
                nn.Conv2d(channels, channels, kernel_size=3, padding=n, dilation=n),
            )
            for n in sizes
        )
        self.merge = nn.Conv2d(len(sizes) * channels, channels, kernel_size=1)
        self.shortcut = nn.Conv2d(channels_in, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, h, w) -> (n, channels, h, w)."""
        seen = torch.cat([branch(x) for branch in self.branches], 1)
        return self.merge(F.gelu(seen)) + self.shortcut(x)


class PromptRetargeting(nn.Module):
    """Update an embedding by cross-attention to features of patches at the prompts.

    The last layer is zero-initialized: untrained, it returns the embedding unchanged.

    Args:
        channels: C, channels of the embedding.
        reduction: C divided by the channels of the attention.
        patch: side of the patches, in positions.
        frame_size: S, side of the frame in pixels.
    """

    def __init__(self, channels: int, *, reduction: int, patch: int, frame_size: int) -> None:
        super().__init__()
        width = channels // reduction
        self.patch = patch
        self.frame_size = frame_size
        self.thin_embedding = RFB(channels, width)
        self.thin_patches = RFB(channels, width)
        self.kinds = nn.Embedding(4, width)
        self.nothing = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Linear(channels, width)
        self.norm_query = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.up = zeroed(nn.Linear(width, channels))

    def thinned(self, embedding: Tensor) -> Tensor:
        """Reduce the embedding (B, C, s, s) to (B, width, s, s), once per image: prompts do not matter here."""
        return self.thin_embedding(embedding)

    def forward(
        self, embedding: Tensor, thin: Tensor, prompted: PromptBatch, *, places: Tensor, encode: Encode
    ) -> Tensor:
        """Return the updated embedding (p, C, s, s).

        Args:
            embedding: (p, C, s, s), one row per prompt.
            thin: (p, width, s, s), from `thinned`.
            prompted: p prompts with the same number of points each, without padding.
            places: (s * s, C) encoded positions of the embedding in row-major order.
            encode: computes the positional encoding of positions.
        """
        seen, seen_places = self._patch_features(embedding, prompted, encode)
        x = thin.flatten(2).transpose(1, 2)
        query = self.query(self.norm_query(x) + self.place(places))
        x = x + self.out(attend(query, self.key(seen + seen_places), self.value(seen)))
        x = x + self.narrow(F.gelu(self.widen(self.norm(x))))
        return embedding + self.up(x).transpose(1, 2).unflatten(2, embedding.shape[2:])

    def _patch_features(self, embedding: Tensor, prompted: PromptBatch, encode: Encode) -> tuple[Tensor, Tensor]:
        """Features (p, m, width) of all patches, and their encoded positions (p, m, width).

        The last one is a learned "nothing" token, so that empty prompts have something to attend to.
        """
        rows = len(prompted)
        nothing = self.nothing.expand(rows, -1, -1)
        boxes, kinds = prompt_windows(prompted, self.patch * self.frame_size / embedding.shape[-1], self.frame_size)
        if boxes.shape[1] == 0:
            return nothing, torch.zeros_like(nothing)
        at = window_positions(boxes, self.patch)
        # grid_sample expects coordinates from -1 to 1
        grid = (at / self.frame_size * 2 - 1).to(embedding.dtype).flatten(1, 2)
        taken = F.grid_sample(embedding, grid, align_corners=False).unflatten(2, (-1, self.patch)).transpose(1, 2)
        thin = self.thin_patches(taken.flatten(0, 1)).unflatten(0, (rows, -1))
        features = self.norm_patches(thin.flatten(3).transpose(2, 3)) + self.kinds(kinds)[:, :, None]
        encoded = self.place(encode(at)).flatten(1, 3)
        features = torch.cat([features.flatten(1, 2), nothing], 1)
        return features, torch.cat([encoded, torch.zeros_like(nothing)], 1)


def prompt_windows(prompted: PromptBatch, side: float, frame_size: int) -> tuple[Tensor, Tensor]:
    """Windows (p, R, 4) of the prompts in the frame, XYXY edges in pixels, and their kinds (p, R).

    Args:
        prompted: p prompts; a point's window is centered on it, a box or mask has its own extent.
        side: side of the points' windows, in pixels.
        frame_size: S; an empty mask gets the whole frame.
    """
    device = prompted.images.device
    windows, kinds = [], []
    if prompted.points is not None and prompted.point_labels is not None:
        centers = prompted.points.float() + 0.5
        windows.append(torch.cat([centers - side / 2, centers + side / 2], -1))
        kinds.append(prompted.point_labels.long())
    if prompted.boxes is not None:
        windows.append(_edges(prompted.boxes.float())[:, None])
        kinds.append(torch.full((len(prompted), 1), BOX, device=device))
    elif prompted.masks is not None:
        found = prompts_from_members(prompted.masks[:, None] > 0)
        own = _edges(found.boxes) * (frame_size / prompted.masks.shape[-1])
        whole = own.new_tensor([0, 0, frame_size, frame_size])
        windows.append(torch.where(found.present[..., None], own, whole))
        kinds.append(torch.full((len(prompted), 1), MASK, device=device))
    if not windows:
        return torch.zeros(len(prompted), 0, 4, device=device), torch.zeros(len(prompted), 0, device=device).long()
    return torch.cat(windows, 1), torch.cat(kinds, 1)


def window_positions(windows: Tensor, patch: int) -> Tensor:
    """Cut windows (p, R, 4) into patch x patch parts; return their centers (p, R, patch, patch, 2), XY."""
    parts = (torch.arange(patch, device=windows.device) + 0.5) / patch
    low, extent = windows[..., :2], windows[..., 2:] - windows[..., :2]
    x, y = (low[..., axis, None] + extent[..., axis, None] * parts for axis in (0, 1))
    size = (*windows.shape[:2], patch, patch)
    return torch.stack([x[:, :, None, :].expand(size), y[:, :, :, None].expand(size)], -1)


def _edges(boxes: Tensor) -> Tensor:
    """Convert boxes of first and last pixels (..., 4) to pixel edges: the far edge is the last index plus 1."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])
