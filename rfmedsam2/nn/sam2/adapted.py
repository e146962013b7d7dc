"""Inserting adapters into SAM 2 (RFMedSAM 2 paper, appendix D), listing and removing them.

Each wrapper holds the official module as `original` and reimplements its forward with adapters: those after an
attention get its output, those parallel to an MLP get the MLP's input. SAM 2's weights are loaded before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sam2.modeling.backbones.hieradet import MultiScaleBlock, do_pool
from sam2.modeling.backbones.image_encoder import FpnNeck
from sam2.modeling.backbones.utils import window_partition, window_unpartition
from sam2.modeling.memory_attention import MemoryAttentionLayer
from sam2.modeling.sam.transformer import TwoWayAttentionBlock
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from rfmedsam2.nn.adapters import (
    Adapter,
    CNNAdapter,
    DWConvAdapter,
    WithAdapter,
    adapted,
    adapted_positions,
    on_positions,
)
from rfmedsam2.nn.sam2.adapted_tiny_vit import (
    AdaptedTinyVitBlock,
    MakeAdapter,
    adapt_tiny_vit_blocks,
    adapt_tiny_vit_convolutions,
)
from rfmedsam2.nn.sam2.tiny_vit import TinyVitEncoder
from rfmedsam2.records.model import AdapterConfig


class AdaptedHieraBlock(nn.Module):
    """A Hiera block with an adapter after its attention, on the whole map, and one parallel to its MLP (D.1)."""

    def __init__(self, original: MultiScaleBlock, make: MakeAdapter) -> None:
        super().__init__()
        self.original = original
        self.after_attention = make(original.dim_out)
        self.beside_mlp = make(original.dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, dim) -> (n, h', w', dim_out), as the official block."""
        block = self.original
        normed = block.norm1(x)
        shortcut = block.proj(normed) if block.dim != block.dim_out else x
        if block.pool is not None:
            shortcut = do_pool(shortcut, block.pool)
        attended = self._attend(normed, (shortcut.shape[1], shortcut.shape[2]))
        x = shortcut + block.drop_path(adapted(attended, self.after_attention))
        normed = block.norm2(x)
        return x + block.drop_path(block.mlp(normed) + self.beside_mlp(normed))

    def _attend(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attention within windows, or over all positions; returns the whole map, `size` after pooling."""
        block = self.original
        window = block.window_size
        if window == 0:
            return block.attn(x)
        x, padded = window_partition(x, window)
        x = block.attn(x)
        if block.q_stride:
            window //= block.q_stride[0]
            padded = tuple(n + (window - n % window) % window for n in size)
        return window_unpartition(x, window, padded, size)


class AdaptedNeck(nn.Module):
    """The feature pyramid with an adapter on each used output (D.1)."""

    def __init__(self, original: FpnNeck, make: MakeAdapter, *, levels: int) -> None:
        super().__init__()
        self.original = original
        self.d_model = original.d_model
        self.levels = nn.ModuleDict({f"stride_{4 << level}": make(original.d_model) for level in range(levels)})

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps and their position encodings, finest first, as the official neck."""
        features, positions = self.original(maps)
        for level, adapter in enumerate(self.levels.values()):
            features[level] = adapted(features[level], adapter)
        return features, positions


class AdaptedTwoWayBlock(nn.Module):
    """A block of the mask decoder's transformer: plain adapters on tokens, `make`'s on image positions (D.2)."""

    def __init__(self, original: TwoWayAttentionBlock, make: MakeAdapter, *, ratio: float) -> None:
        super().__init__()
        features = original.norm1.normalized_shape[0]
        self.original = original
        self.after_self = Adapter(features, ratio=ratio)
        self.after_token_to_image = Adapter(features, ratio=ratio)
        self.beside_mlp = Adapter(features, ratio=ratio)
        self.after_image_to_token = make(features)

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, t, c) and image positions (n, h*w, c) with their encodings, as the official block."""
        block = self.original
        if block.skip_first_layer_pe:
            queries = adapted(block.self_attn(q=queries, k=queries, v=queries), self.after_self)
        else:
            q = queries + query_pe
            queries = queries + adapted(block.self_attn(q=q, k=q, v=queries), self.after_self)
        queries = block.norm1(queries)

        q, k = queries + query_pe, keys + key_pe
        attended = block.cross_attn_token_to_image(q=q, k=k, v=keys)
        queries = block.norm2(queries + adapted(attended, self.after_token_to_image))

        queries = block.norm3(queries + (block.mlp(queries) + self.beside_mlp(queries)))

        # keys have not changed since k was made
        attended = block.cross_attn_image_to_token(q=k, k=queries + query_pe, v=queries)
        keys = block.norm4(keys + adapted_positions(attended, self.after_image_to_token))
        return queries, keys


class AdaptedMemoryLayer(nn.Module):
    """A layer of memory attention with adapters after both attentions and parallel to the MLP (D.3).

    The official layer's submodules keep their names, so that code that runs its parts separately also works with this
    class. The adapters take positions (n, h, w, features).
    """

    def __init__(self, original: MemoryAttentionLayer, make: MakeAdapter) -> None:
        super().__init__()
        self.original = original
        self.after_self = make(original.d_model)
        self.after_cross = make(original.d_model)
        self.beside_mlp = make(original.d_model)

    self_attn = property(lambda self: self.original.self_attn)
    cross_attn_image = property(lambda self: self.original.cross_attn_image)
    linear1 = property(lambda self: self.original.linear1)
    linear2 = property(lambda self: self.original.linear2)
    norm1 = property(lambda self: self.original.norm1)
    norm2 = property(lambda self: self.original.norm2)
    norm3 = property(lambda self: self.original.norm3)
    activation = property(lambda self: self.original.activation)
    pos_enc_at_attn = property(lambda self: self.original.pos_enc_at_attn)
    pos_enc_at_cross_attn_keys = property(lambda self: self.original.pos_enc_at_cross_attn_keys)
    pos_enc_at_cross_attn_queries = property(lambda self: self.original.pos_enc_at_cross_attn_queries)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
        num_k_exclude_rope: int = 0,
    ) -> Tensor:
        """(n, h*w, features) of square maps, as the official layer."""
        layer = self.original
        normed = layer.norm1(tgt)
        q = normed if not layer.pos_enc_at_attn or query_pos is None else normed + query_pos
        tgt = tgt + layer.dropout1(adapted_positions(layer.self_attn(q, q, v=normed), self.after_self))

        normed = layer.norm2(tgt)
        attended = layer.cross_attn_image(
            q=normed if not layer.pos_enc_at_cross_attn_queries or query_pos is None else normed + query_pos,
            k=memory if not layer.pos_enc_at_cross_attn_keys or pos is None else memory + pos,
            v=memory,
            **({"num_k_exclude_rope": num_k_exclude_rope} if num_k_exclude_rope else {}),
        )
        tgt = tgt + layer.dropout2(adapted_positions(attended, self.after_cross))

        normed = layer.norm3(tgt)
        hidden = layer.linear2(layer.dropout(layer.activation(layer.linear1(normed))))
        return tgt + layer.dropout3(hidden + on_positions(self.beside_mlp, normed))


WRAPPERS = (AdaptedHieraBlock, AdaptedNeck, AdaptedTwoWayBlock, AdaptedMemoryLayer, AdaptedTinyVitBlock, WithAdapter)


def inject(base: SAM2Base, config: AdapterConfig) -> None:
    """Insert adapters into a SAM 2 whose weights are loaded (RFMedSAM 2 paper, appendix D).

    The feature pyramid's lowest level, which SAM 2 discards, gets none, so that every adapter is used in every pass
    through its module.

    Raises:
        ValueError: it already has adapters.
    """
    if adapters_of(base):
        raise ValueError("this SAM 2 has adapters already: remove them first")

    def on_map(features: int) -> nn.Module:
        kind = DWConvAdapter if config.blocks == "dwconv" else Adapter
        return kind(features, ratio=config.ratio)

    def behind_convolution(features: int) -> nn.Module:
        return CNNAdapter(features, ratio=config.ratio)

    encoder = base.image_encoder if config.encoder else None
    if config.blocks != "none":
        _adapt_encoder_blocks(encoder, on_map)
        decoder = base.sam_mask_decoder.transformer
        _wrap_each(decoder.layers, lambda block: AdaptedTwoWayBlock(block, on_map, ratio=config.ratio))
        _wrap_each(base.memory_attention.layers, lambda layer: AdaptedMemoryLayer(layer, on_map))
    if config.convolutions != "none":
        _adapt_encoder_levels(encoder, behind_convolution)
        _adapt_convolutions(base, behind_convolution)


def adapters_of(base: SAM2Base) -> dict[str, nn.Module]:
    """All adapters by module path, such as `memory_attention.layers.0.after_cross`."""
    kinds = (Adapter, DWConvAdapter, CNNAdapter)
    return {name: module for name, module in base.named_modules() if isinstance(module, kinds)}


def remove(base: SAM2Base) -> None:
    """Replace the wrappers of `inject` by the official modules; does nothing without adapters."""
    wrappers = [(name, module) for name, module in base.named_modules() if isinstance(module, WRAPPERS)]
    for path, wrapper in wrappers:
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, wrapper.original)


def _wrap_each(modules: Any, wrap: Callable[[Any], nn.Module]) -> None:
    """Replace every module of a list."""
    for i, module in enumerate(modules):
        modules[i] = wrap(module)


def _adapt_encoder_blocks(encoder: Any, make: MakeAdapter) -> None:
    """Insert adapters into the attention blocks of either encoder; none if it is None."""
    if isinstance(encoder, TinyVitEncoder):
        adapt_tiny_vit_blocks(encoder, make)
    elif encoder is not None:
        _wrap_each(encoder.trunk.blocks, lambda block: AdaptedHieraBlock(block, make))


def _adapt_encoder_levels(encoder: Any, make: MakeAdapter) -> None:
    """Insert adapters on the output levels of either encoder; none if it is None."""
    if isinstance(encoder, TinyVitEncoder):
        adapt_tiny_vit_convolutions(encoder, make)
    elif encoder is not None:
        levels = len(encoder.neck.convs) - encoder.scalp
        encoder.neck = AdaptedNeck(encoder.neck, make, levels=levels)


def _adapt_convolutions(base: SAM2Base, make: MakeAdapter) -> None:
    """Insert adapters after the decoder's two upscaling convolutions, and in the memory encoder (D.2, D.3)."""
    upscaling = base.sam_mask_decoder.output_upscaling
    for i, convolution in enumerate(upscaling):
        if isinstance(convolution, nn.ConvTranspose2d):
            upscaling[i] = WithAdapter(convolution, make(convolution.out_channels))
    memory = base.memory_encoder
    features = memory.pix_feat_proj.out_channels
    memory.mask_downsampler = WithAdapter(memory.mask_downsampler, make(features))
    memory.fuser = WithAdapter(memory.fuser, make(features))
