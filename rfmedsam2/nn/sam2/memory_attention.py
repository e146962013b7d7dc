"""SAM 2's memory attention, batched over many objects, with shared computations done once.

The official module (`sam2.modeling.memory_attention`) runs per frame and object. This implementation is equal up to
rounding and does less work:

1. The first layer's self-attention and queries depend only on the frame: computed once per frame, for all classes.
2. A memory's key depends only on the memory, except for its temporal encoding, and projection and rotation are linear.
   So each memory is projected once, and the projected temporal encoding is added per position.
3. Rows of attention weights sum to 1, so values can be averaged before they are projected, over the M channels of
   memories instead of C projected channels; value and output projection then are one matrix.

It assumes SAM 2's settings: one head, no dropout, ReLU, position encodings added at the input and to memory keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_utils import get_1d_sine_pe
from torch import Tensor, nn

from rfmedsam2.nn.adapters import adapted_positions, on_positions
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import MemoryBank, Slots

INPUT_POSITION_SHARE = 0.1
"""Factor of the position encoding that SAM 2 adds to the input of memory attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedFrames:
    """The part of memory attention that depends only on the N frames, not on memories. T = s * s positions.

    Attributes:
        embedding: (N, C, s, s), the input.
        tokens: (N, T, C) after the first layer's self-attention.
        queries: (N, T, C) of the first layer's cross-attention, rotated and scaled.
        rotation: (T, C / 2) complex, the rotary position encoding.
        layers: projections of each layer.
    """

    embedding: Tensor
    tokens: Tensor
    queries: Tensor
    rotation: Tensor
    layers: tuple[_Projections, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projections:
    """A layer's projections as (weight, bias); consecutive ones are merged.

    Attributes:
        self_keys: queries (scaled) and keys of self-attention, (2C, C).
        self_output: values and output of self-attention, (C, C).
        queries: of cross-attention, scaled, (C, C).
        output: values and output of cross-attention, (C, M).
    """

    self_keys: tuple[Tensor, Tensor]
    self_output: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    output: tuple[Tensor, Tensor]


def prepare_frames(sam: Sam2, embedding: Tensor) -> PreparedFrames:
    """Compute what all objects of a frame share.

    Args:
        sam: SAM 2, with or without adapters.
        embedding: (N, C, s, s), frames' embeddings from the image encoder.
    """
    attention: Any = sam.base.memory_attention
    layers = tuple(_projections(layer) for layer in attention.layers)
    first = attention.layers[0]
    rotation = first.self_attn.compute_cis(end_x=sam.side, end_y=sam.side).to(embedding.device)
    tokens = (embedding + INPUT_POSITION_SHARE * sam.image_position()).flatten(2).transpose(1, 2)
    tokens = _attend_itself(first, layers[0], tokens, rotation)
    queries = _rotated(F.linear(first.norm2(tokens), *layers[0].queries), rotation)
    return PreparedFrames(embedding=embedding, tokens=tokens, queries=queries, rotation=rotation, layers=layers)


def condition_on_memory(sam: Sam2, prepared: PreparedFrames, frames: Tensor, bank: MemoryBank, slots: Slots) -> Tensor:
    """Condition the embeddings of n objects on their memories (`SAM2Base._prepare_memory_conditioned_features`).

    Args:
        sam: SAM 2, with or without adapters (those of memory attention are applied).
        prepared: result of `prepare_frames` with the same weights.
        frames: (n,) long: row of `prepared` of each object.
        bank: memory bank.
        slots: memories that each object attends to; objects without any get SAM 2's no-memory embedding.

    Returns:
        (n, C, s, s). Working memory is O(n * T * keys) per layer, with T = s * s positions and T keys per memory.
    """
    if not slots.maps.shape[1]:
        return prepared.embedding[frames] + sam.base.no_mem_embed.reshape(1, -1, 1, 1)
    attention: Any = sam.base.memory_attention
    memories = _gather(sam, bank, slots)
    tokens, queries = prepared.tokens[frames], prepared.queries[frames]
    for i, (layer, projections) in enumerate(zip(attention.layers, prepared.layers, strict=True)):
        if i:
            tokens = _attend_itself(layer, projections, tokens, prepared.rotation)
            queries = _rotated(F.linear(layer.norm2(tokens), *projections.queries), prepared.rotation)
        keys = _keys(layer.cross_attn_image.k_proj, memories, prepared.rotation)
        attended = F.linear(_averaged(queries, keys, memories.values), *projections.output)
        tokens = tokens + adapted_positions(attended, getattr(layer, "after_cross", None))
        tokens = tokens + _mlp(layer, layer.norm3(tokens))
    result = attention.norm(tokens).transpose(1, 2).unflatten(2, (sam.side, sam.side))
    return prepared.embedding[frames] + result if sam.residual_memory else result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memories:
    """Memories of n objects, a maps and p pointer tokens each; u different maps among them.

    Attributes:
        values: (n, a * T + p, M), values of attention.
        maps: (u, T, M), including spatial position encodings.
        places: (n, a) long, rows of `maps`.
        temporal: (t, M) encodings of temporal positions.
        positions: (n, a) long, rows of `temporal`.
        pointers: (n, p, M), including temporal position encodings.
    """

    values: Tensor
    maps: Tensor
    places: Tensor
    temporal: Tensor
    positions: Tensor
    pointers: Tensor


def _gather(sam: Sam2, bank: MemoryBank, slots: Slots) -> _Memories:
    base = sam.base
    width = sam.memory_channels
    rows, places = slots.maps.unique(return_inverse=True)
    maps = bank.maps[rows].flatten(2).transpose(1, 2)
    # a pointer of C channels is split into C / M tokens
    pointers = bank.pointers[slots.pointers].unflatten(2, (-1, width))
    encoded = base.obj_ptr_tpos_proj(get_1d_sine_pe(slots.distances, dim=sam.channels))[:, :, None]
    return _Memories(
        values=torch.cat([_rows(maps, places).flatten(1, 2), pointers.flatten(1, 2)], 1),
        maps=maps + sam.position().flatten(1).T,
        places=places,
        temporal=base.maskmem_tpos_enc.flatten(1),
        positions=slots.positions,
        pointers=(pointers + encoded).flatten(1, 2),
    )


def _keys(projection: nn.Linear, memories: _Memories, rotation: Tensor) -> Tensor:
    """Keys (n, a * T + p, C) of all memories of all objects; pointers are not rotated (`num_k_exclude_rope`)."""
    maps = _rotated(projection(memories.maps), rotation)
    temporal = F.linear(memories.temporal, projection.weight)
    temporal = _rotated(temporal[:, None].expand(-1, maps.shape[1], -1), rotation)
    keys = _rows(maps, memories.places).add_(_rows(temporal, memories.positions))
    return torch.cat([keys.flatten(1, 2), projection(memories.pointers)], 1)


def _averaged(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention with scaled queries: (n, T, width of values)."""
    if queries.is_cuda:
        return F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    # on the CPU the fused kernel needs values of the same width as the keys
    return (queries @ keys.transpose(1, 2)).softmax(-1) @ values


def _attend_itself(layer: Any, projections: _Projections, tokens: Tensor, rotation: Tensor) -> Tensor:
    """Self-attention of tokens (n, T, C) with a skip connection."""
    normed = layer.norm1(tokens)
    placed = F.linear(normed, *projections.self_keys).unflatten(2, (2, -1))
    queries, keys = _rotated(placed, rotation[:, None]).unbind(2)
    attended = F.linear(_averaged(queries, keys, normed), *projections.self_output)
    return tokens + adapted_positions(attended, getattr(layer, "after_self", None))


def _mlp(layer: Any, normed: Tensor) -> Tensor:
    # in place: linear1's output is not used elsewhere, not even in the backward pass
    hidden = layer.linear2(layer.linear1(normed).relu_())
    adapter = getattr(layer, "beside_mlp", None)
    return hidden if adapter is None else hidden + on_positions(adapter, normed)


def _projections(layer: Any) -> _Projections:
    own, cross = layer.self_attn, layer.cross_attn_image
    with torch.autocast(own.q_proj.weight.device.type, enabled=False):
        queries, keys = _scaled(own.q_proj), (own.k_proj.weight, own.k_proj.bias)
        return _Projections(
            self_keys=(torch.cat([queries[0], keys[0]]), torch.cat([queries[1], keys[1]])),
            self_output=_composed(own.v_proj, own.out_proj),
            queries=_scaled(cross.q_proj),
            output=_composed(cross.v_proj, cross.out_proj),
        )


def _scaled(projection: nn.Linear) -> tuple[Tensor, Tensor]:
    """Query projection divided by the square root of its width, as in scaled dot-product attention."""
    scale = projection.out_features**-0.5
    return projection.weight * scale, projection.bias * scale


def _composed(first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor]:
    """The composition of two linear maps as one."""
    return second.weight @ first.weight, F.linear(first.bias, second.weight, second.bias)


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Apply rotary position encoding to (..., T, C), or to (..., T, 2, C) with a rotation of (T, 1, C / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows (n, a, ...) of a table; indexing a matrix is several times faster than indexing more axes."""
    chosen = table.flatten(1).index_select(0, index.flatten())
    return chosen.view(*index.shape, *table.shape[1:])
