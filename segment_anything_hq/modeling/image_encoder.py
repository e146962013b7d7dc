"""SAM's ViT with early features for HQ-SAM, and attention that never holds the full N x N score matrix.

It returns the embedding (B, 256, s, s) and the early features, a list of (B, s, s, C): the outputs of the blocks with
global attention, of which HQ-SAM uses the first (HQ-SAM paper, section 3.3).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    LayerNorm2d,
    MLPBlock,
    PatchEmbed,
    add_decomposed_rel_pos,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from segment_anything.modeling.image_encoder import ImageEncoderViT as SamVit
from torch import Tensor

__all__ = [
    "Attention",
    "Block",
    "ImageEncoderViT",
    "LayerNorm2d",
    "MLPBlock",
    "PatchEmbed",
    "add_decomposed_rel_pos",
    "by_products",
    "by_rows",
    "get_rel_pos",
    "window_partition",
    "window_unpartition",
]

SCORES_AT_ONCE = 1 << 21
"""Number of attention scores held at a time on a CPU."""


class ImageEncoderViT(SamVit):
    """SAM's ViT with early features, with the same arguments: frames (B, 3, S, S) -> see the module."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See the class."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        early = []
        for block in self.blocks:
            assert isinstance(block, Block)
            x = _through(block, x)
            if block.window_size == 0:
                early.append(x)
        return self.neck(x.permute(0, 3, 1, 2)), early


def _through(block: Block, x: Tensor) -> Tensor:
    """SAM's block, (B, h, w, C) -> the same shape, without the full score matrix."""
    shortcut, height, width = x, x.shape[1], x.shape[2]
    x = block.norm1(x)
    if block.window_size:
        windows, padded = window_partition(x, block.window_size)
        x = window_unpartition(_attended(block.attn, windows), block.window_size, padded, (height, width))
    else:
        x = _attended(block.attn, x)
    x = shortcut + x
    return x + block.mlp(block.norm2(x))


def _attended(attention: Attention, x: Tensor) -> Tensor:
    """SAM's attention with decomposed relative positions, (B, h, w, C) -> the same shape."""
    batch, height, width, _ = x.shape
    qkv = attention.qkv(x).view(batch, height * width, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv
    if attention.use_rel_pos:
        rows, columns = (
            get_rel_pos(side, side, cast(Tensor, table))
            for side, table in ((height, attention.rel_pos_h), (width, attention.rel_pos_w))
        )
        grid = q.unflatten(2, (height, width))
        to_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rows).flatten(2, 3)
        to_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, columns).flatten(2, 3)
        q = q * attention.scale
        x = (by_products if x.is_cuda else by_rows)(q, k, v, to_rows, to_columns)
    else:
        x = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return attention.proj(x.transpose(1, 2).reshape(batch, height, width, -1))


def by_rows(q: Tensor, k: Tensor, v: Tensor, to_rows: Tensor, to_columns: Tensor) -> Tensor:
    """Attention with relative positions in chunks of queries, so that the scores fit into a CPU's caches.

    Args:
        q: (B, H, N, c), scaled queries.
        k: (B, H, N, c), keys.
        v: (B, H, N, c), values.
        to_rows: (B, H, N, h) bias of each query for the keys of each row.
        to_columns: (B, H, N, w) bias of each query for the keys of each column.

    Returns:
        (B, H, N, c).
    """
    size = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    answers = []
    for asked, row, column in zip(q.split(size, 2), to_rows.split(size, 2), to_columns.split(size, 2), strict=True):
        scores = (asked @ k.transpose(2, 3)).unflatten(3, (row.shape[3], column.shape[3]))
        scores = scores + row[..., :, None] + column[..., None, :]
        answers.append(scores.flatten(3).softmax(-1) @ v)
    return torch.cat(answers, dim=2)


def by_products(q: Tensor, k: Tensor, v: Tensor, to_rows: Tensor, to_columns: Tensor) -> Tensor:
    """The same result as `by_rows` through a fused attention kernel, which never stores the scores.

    A bias per row and column equals a dot product over additional channels: the query's are its biases, the key's are
    one-hot encodings of its row and column.
    """
    places = _places(to_rows.shape[3], to_columns.shape[3], k).expand(*k.shape[:2], -1, -1)
    q = torch.cat([q, to_rows, to_columns], dim=-1)
    return F.scaled_dot_product_attention(q, torch.cat([k, places], dim=-1), v, scale=1.0)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, height + width) one-hot encoding of each position's row and column."""
    rows, columns = (torch.eye(side, dtype=like.dtype, device=like.device) for side in (height, width))
    by_row = rows[:, None].expand(height, width, height)
    return torch.cat([by_row, columns[None].expand(height, width, width)], dim=-1).flatten(0, 1)
