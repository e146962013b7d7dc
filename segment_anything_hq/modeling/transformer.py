"""SAM's two-way attention between a few prompt tokens and a whole image, without repeating what prompts share.

The weights are those of `segment_anything`'s TwoWayTransformer, and so is the result. Two things save work. Until its
first layer has answered, the image is the same for all prompts: what that layer projects of it is projected once. And
with fewer tokens than channels the tokens are taken through the projections instead of the image:
q (K x)' = (q K) x', so that nothing as large as the image is ever projected.
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
    """What the first layer sees of B images, N places each: H heads of c channels.

    Attributes:
        keys: (B, N, d) the embedding with what stands for "no mask".
        asked: (B, H, N, c) its projection for the tokens' questions; `answers`: (B, H, N, c) likewise the values.
        asking: (B, H, N, c) its own questions to the tokens.
    """

    keys: Tensor
    asked: Tensor
    answers: Tensor
    asking: Tensor


def first_layer(transformer: TwoWayTransformer, keys: Tensor, position: Tensor) -> FirstLayer:
    """Project keys (B, N, d) at positions (N, d), once for all prompts of these images."""
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
    """Let P prompts' tokens and their images attend to each other, as the transformer's `forward` does.

    Args:
        transformer: whose weights.
        image: of every prompt (`first_layer`, rows picked by `rows_of`), or its keys (P, N, d) where no two share any.
        tokens: (P, T, d).
        position: (N, d).

    Returns:
        tokens (P, T, d) and keys (P, N, d).
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
    """The images (P,) that prompts are of; a single image is not copied."""

    def rows(x: Tensor) -> Tensor:
        return x.expand(len(images), *x.shape[1:]) if len(x) == 1 else x[images]

    return FirstLayer(
        keys=rows(image.keys), asked=rows(image.asked), answers=rows(image.answers), asking=rows(image.asking)
    )


def _blocks(transformer: TwoWayTransformer) -> list[TwoWayAttentionBlock]:
    return [block for block in transformer.layers if isinstance(block, TwoWayAttentionBlock)]


def _among_tokens(block: TwoWayAttentionBlock, queries: Tensor, tokens: Tensor) -> Tensor:
    """Attention of the tokens to one another, normalized."""
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
    """Whether taking the tokens through the projections is less work than projecting the image."""
    return tokens * attention.num_heads < attention.internal_dim


def _ask_projected(attention: Attention, queries: Tensor, image: FirstLayer) -> Tensor:
    """Tokens (P, T, d) ask the image, whose keys and values are projected already."""
    q = _by_head(attention.q_proj(queries), attention)
    answer = F.scaled_dot_product_attention(q, image.asked, image.answers)
    return attention.out_proj(answer.transpose(1, 2).flatten(2))


def _ask(attention: Attention, queries: Tensor, keyed: Tensor, keys: Tensor) -> Tensor:
    """Tokens (P, T, d) ask the image (P, N, d); `keyed` is it with its positions."""
    if not _few(attention, queries.shape[1]):
        return attention(q=queries, k=keyed, v=keys)
    q = _by_head(attention.q_proj(queries), attention)
    _, heads, tokens, channels = q.shape
    # the keys' bias adds the same to all places: softmax does not see it
    through = q @ _per_head(attention.k_proj.weight, heads) * channels**-0.5
    weights = (through.flatten(1, 2) @ keyed.transpose(1, 2)).softmax(-1)
    seen = (weights @ keys).unflatten(1, (heads, tokens))
    answer = (seen @ _per_head(attention.v_proj.weight, heads).transpose(1, 2)).transpose(1, 2).flatten(2)
    return attention.out_proj(answer + attention.v_proj.bias)


def _answer_projected(attention: Attention, image: FirstLayer, keyed: Tensor, values: Tensor) -> Tensor:
    """The image's keys with what the tokens (P, T, d) answer to its questions, which are projected already."""
    k = _by_head(attention.k_proj(keyed), attention)
    scores = (k * k.shape[-1] ** -0.5) @ image.asking.transpose(2, 3)
    return _with_answers(attention, image.keys, scores, values)


def _answered(attention: Attention, image: tuple[Tensor, Tensor], keyed: Tensor, values: Tensor) -> Tensor:
    """The image's keys (P, N, d), the first of `image`, with what the tokens answer; the second has its positions."""
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
    """Keys (P, N, d) + the answers of tokens (P, T, d) by the scores (P, H, T, N) of every head."""
    v = _by_head(attention.v_proj(values), attention)
    # each head's weights add up to one, so its share of the bias can travel with its values
    out = attention.out_proj.weight.unflatten(1, (v.shape[1], -1)).permute(1, 2, 0)
    through = v @ out + attention.out_proj.bias / v.shape[1]
    weights = scores.softmax(2)
    return torch.baddbmm(keys, weights.flatten(1, 2).transpose(1, 2), through.flatten(1, 2))


def _per_head(weight: Tensor, heads: int) -> Tensor:
    """A projection's weight (H c, d) -> (H, c, d)."""
    return weight.unflatten(0, (heads, -1))
