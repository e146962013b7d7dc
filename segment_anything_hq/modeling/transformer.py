"""SAM's two-way transformer between a few prompt tokens and a whole image, without repeating work that prompts share.

Weights and results are those of `segment_anything`'s TwoWayTransformer. Two things save work. The input image of the
first layer is the same for all prompts, so its projections are computed once. And with few tokens, the tokens are
multiplied by the projection weights instead of the image: q (K x)' = (q K) x', so that the much larger image is never
projected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling.transformer import Attention, MLPBlock, TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor

__all__ = [
    "Attention",
    "FirstLayer",
    "MLPBlock",
    "TwoWayAttentionBlock",
    "TwoWayTransformer",
    "attend",
    "first_layer",
    "rows_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLayer:
    """The first layer's projections of B images with N positions each; H heads of c channels.

    Attributes:
        keys: (B, N, d) the embedding plus the "no mask" embedding.
        asked: (B, H, N, c) keys of the token-to-image attention.
        answers: (B, H, N, c) values of the token-to-image attention.
        asking: (B, H, N, c) queries of the image-to-token attention.
    """

    keys: Tensor
    asked: Tensor
    answers: Tensor
    asking: Tensor


def first_layer(transformer: TwoWayTransformer, keys: Tensor, position: Tensor) -> FirstLayer:
    """Project keys (B, N, d) with positions (N, d), once for all prompts of these images."""
    block = _blocks(transformer)[0]
    asking, answering = block.cross_attn_image_to_token, block.cross_attn_token_to_image
    keyed = keys + position
    return FirstLayer(
        keys=keys,
        asked=_by_head(answering.k_proj(keyed), answering),
        answers=_by_head(answering.v_proj(keys), answering),
        asking=_by_head(asking.q_proj(keyed), asking),
    )


def attend(
    transformer: TwoWayTransformer, image: FirstLayer | Tensor, tokens: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the transformer's `forward` on the tokens and images of P prompts.

    Args:
        transformer: transformer whose weights are used.
        image: every prompt's image: projections (`first_layer`, selected by `rows_of`), or keys (P, N, d) if no two
            prompts share an image.
        tokens: (P, T, d).
        position: (N, d) positional encoding.

    Returns:
        updated tokens (P, T, d) and keys (P, N, d).
    """
    queries = tokens
    keys = image.keys if isinstance(image, FirstLayer) else image
    for index, block in enumerate(_blocks(transformer)):
        queries = _among_tokens(block, queries, tokens)
        to_image, to_tokens = block.cross_attn_token_to_image, block.cross_attn_image_to_token
        if index == 0 and isinstance(image, FirstLayer):
            answer = _ask_projected(to_image, queries + tokens, image)
            queries = block.norm3(_with_mlp(block, block.norm2(queries + answer)))
            keys = _answer_projected(to_tokens, image, queries + tokens, queries)
        else:
            keyed = keys + position
            queries = block.norm2(queries + _ask(to_image, queries + tokens, keyed, keys))
            queries = block.norm3(_with_mlp(block, queries))
            keys = _answered(to_tokens, (keys, keyed), queries + tokens, queries)
        keys = block.norm4(keys)
    answer = _ask(transformer.final_attn_token_to_image, queries + tokens, keys + position, keys)
    return transformer.norm_final_attn(queries + answer), keys


def rows_of(image: FirstLayer, images: Tensor) -> FirstLayer:
    """Select each prompt's image by index (P,); a single image is expanded without copying."""

    def rows(x: Tensor) -> Tensor:
        return x.expand(len(images), *x.shape[1:]) if len(x) == 1 else x[images]

    return FirstLayer(
        keys=rows(image.keys), asked=rows(image.asked), answers=rows(image.answers), asking=rows(image.asking)
    )


def _blocks(transformer: TwoWayTransformer) -> list[TwoWayAttentionBlock]:
    return [block for block in transformer.layers if isinstance(block, TwoWayAttentionBlock)]


def _among_tokens(block: TwoWayAttentionBlock, queries: Tensor, tokens: Tensor) -> Tensor:
    """Self-attention of the tokens and layer normalization."""
    if block.skip_first_layer_pe:
        return block.norm1(block.self_attn(q=queries, k=queries, v=queries))
    asking = queries + tokens
    return block.norm1(queries + block.self_attn(q=asking, k=asking, v=queries))


def _with_mlp(block: TwoWayAttentionBlock, queries: Tensor) -> Tensor:
    return queries + block.mlp(queries)


def _by_head(x: Tensor, attention: Attention) -> Tensor:
    """(P, n, H c) -> (P, H, n, c)."""
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _few(attention: Attention, tokens: int) -> bool:
    """Whether multiplying the tokens by the projection weights is less work than projecting the image."""
    return tokens * attention.num_heads < attention.internal_dim


def _ask_projected(attention: Attention, queries: Tensor, image: FirstLayer) -> Tensor:
    """Token-to-image attention of tokens (P, T, d), with already projected keys and values."""
    q = _by_head(attention.q_proj(queries), attention)
    answer = F.scaled_dot_product_attention(q, image.asked, image.answers)
    return attention.out_proj(answer.transpose(1, 2).flatten(2))


def _ask(attention: Attention, queries: Tensor, keyed: Tensor, keys: Tensor) -> Tensor:
    """Token-to-image attention of tokens (P, T, d) to an image (P, N, d); `keyed` includes its positions."""
    if not _few(attention, queries.shape[1]):
        return attention(q=queries, k=keyed, v=keys)
    q = _by_head(attention.q_proj(queries), attention)
    _, heads, tokens, channels = q.shape
    # the keys' bias adds a constant to the scores of all positions, which softmax cancels
    through = q @ _per_head(attention.k_proj.weight, heads) * channels**-0.5
    weights = (through.flatten(1, 2) @ keyed.transpose(1, 2)).softmax(-1)
    seen = (weights @ keys).unflatten(1, (heads, tokens))
    answer = (seen @ _per_head(attention.v_proj.weight, heads).transpose(1, 2)).transpose(1, 2).flatten(2)
    return attention.out_proj(answer + attention.v_proj.bias)


def _answer_projected(attention: Attention, image: FirstLayer, keyed: Tensor, values: Tensor) -> Tensor:
    """Image-to-token attention to tokens (P, T, d), with already projected queries; returns the updated keys."""
    k = _by_head(attention.k_proj(keyed), attention)
    scores = (k * k.shape[-1] ** -0.5) @ image.asking.transpose(2, 3)
    return _with_answers(attention, image.keys, scores, values)


def _answered(attention: Attention, image: tuple[Tensor, Tensor], keyed: Tensor, values: Tensor) -> Tensor:
    """Image-to-token attention; `image` holds keys (P, N, d) without and with positions. Returns the updated keys."""
    if not _few(attention, keyed.shape[1]):
        return image[0] + attention(q=image[1], k=keyed, v=values)
    k = _by_head(attention.k_proj(keyed), attention)
    _, heads, tokens, channels = k.shape
    k = k * channels**-0.5
    through = (k @ _per_head(attention.q_proj.weight, heads)).flatten(1, 2)
    bias = (k @ attention.q_proj.bias.view(heads, channels, 1)).flatten(1, 2)
    scores = torch.baddbmm(bias, through, image[1].transpose(1, 2)).unflatten(1, (heads, tokens))
    return _with_answers(attention, image[0], scores, values)


def _with_answers(attention: Attention, keys: Tensor, scores: Tensor, values: Tensor) -> Tensor:
    """Keys (P, N, d) plus the attention output for tokens (P, T, d) and scores (P, H, T, N)."""
    v = _by_head(attention.v_proj(values), attention)
    # each head's weights sum to one, so its share of the output bias can be added to its values
    out = attention.out_proj.weight.unflatten(1, (v.shape[1], -1)).permute(1, 2, 0)
    through = v @ out + attention.out_proj.bias / v.shape[1]
    weights = scores.softmax(2)
    return torch.baddbmm(keys, weights.flatten(1, 2).transpose(1, 2), through.flatten(1, 2))


def _per_head(weight: Tensor, heads: int) -> Tensor:
    """Split a projection's weight by head, (H c, d) -> (H, c, d)."""
    return weight.unflatten(0, (heads, -1))
