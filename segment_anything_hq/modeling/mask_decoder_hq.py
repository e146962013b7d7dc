"""HQ-SAM's mask decoder: SAM's with an extra output token that is applied to high-quality features.

Modules and parameters have the published names. Source: HQ-SAM paper, sections 3.2 and 3.3 (HQ-Output Token;
global-local feature fusion), supplement section 2 (sizes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.mask_decoder import MaskDecoder as SamMaskDecoder
from segment_anything.modeling.transformer import TwoWayTransformer
from torch import Tensor, nn

from segment_anything_hq.modeling.transformer import FirstLayer, attend, first_layer, rows_of

__all__ = ["HQ_PARTS", "MLP", "Decoded", "ImageSide", "LayerNorm2d", "MaskDecoderHQ", "hq_parameters", "mask_features"]

HQ_PARTS = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")
"""Modules that HQ-SAM adds to SAM; only these are trained."""
PLACES_AT_ONCE = {"cpu": 64 * 64}
"""Embedding positions, summed over prompts, decoded per chunk. On a CPU that is one prompt of a 1024-pixel frame, whose
maps fit into the caches, which makes it faster than larger chunks; other devices use `OTHERWISE_AT_ONCE`."""
OTHERWISE_AT_ONCE = 64 * 64 * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSide:
    """Everything in the decoder that depends on B images alone, computed once for all of their prompts.

    Attributes:
        embedding: (B, N, d), N = s * s positions.
        position: (N, d) positional encoding.
        first: projections of the images in the transformer's first layer, without a mask prompt.
        hq_features: (B, d/8, 4s, 4s) from the encoder's last and early features.
    """

    embedding: Tensor
    position: Tensor
    first: FirstLayer
    hq_features: Tensor

    def __len__(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Masks of P prompts.

    Attributes:
        sam: (K, 4s, 4s) logits of SAM's own token; None if they were not requested.
        hq: (K, 4s, 4s) logits of the HQ-Output token.
        scores: (P,) SAM's predicted IoU.
        kept: (K,) prompt index of each mask: all prompts, or those whose score is high enough.
    """

    sam: Tensor | None
    hq: Tensor
    scores: Tensor
    kept: Tensor

    @property
    def logits(self) -> Tensor:
        """HQ-SAM's logits (K, 4s, 4s): the sum of both tokens' logits, or the HQ token's if only that was computed."""
        return self.hq if self.sam is None else self.sam + self.hq


class MaskDecoderHQ(SamMaskDecoder):
    """SAM's mask decoder with the HQ-Output token.

    Args:
        transformer_dim: d, channels of the embedding.
        transformer: TwoWayTransformer of `segment_anything`.
        num_multimask_outputs: number of masks for an ambiguous prompt.
        activation: activation of the upscaling.
        iou_head_depth: layers of the head that predicts the IoU.
        iou_head_hidden_dim: hidden channels of that head.
        vit_dim: channels of the encoder's early features.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: nn.Module,
        num_multimask_outputs: int = 3,
        activation: type[nn.Module] = nn.GELU,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        vit_dim: int = 1024,
    ) -> None:
        super().__init__(
            transformer_dim=transformer_dim,
            transformer=transformer,
            num_multimask_outputs=num_multimask_outputs,
            activation=activation,
            iou_head_depth=iou_head_depth,
            iou_head_hidden_dim=iou_head_hidden_dim,
        )
        middle, fine = transformer_dim // 4, transformer_dim // 8
        self.num_mask_tokens = num_multimask_outputs + 2
        self.hf_token = nn.Embedding(1, transformer_dim)
        self.hf_mlp = MLP(transformer_dim, transformer_dim, fine, 3)
        self.compress_vit_feat = _upscaling(vit_dim, transformer_dim, fine)
        self.embedding_encoder = _upscaling(transformer_dim, middle, fine)
        self.embedding_maskfeature = mask_features(fine)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        hq_token_only: bool,
        interm_embeddings: list[Tensor] | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks for P prompts of one image.

        Args:
            image_embeddings: (1, d, s, s).
            image_pe: (1, d, s, s) positional encoding.
            sparse_prompt_embeddings: (P, k, d).
            dense_prompt_embeddings: (P, d, s, s), or (1, d, s, s) shared by all prompts.
            multimask_output: use the best by predicted IoU of the masks for ambiguous prompts, not the single one.
            hq_token_only: return the HQ token's logits alone, not their sum with SAM's.
            interm_embeddings: the encoder's early features; the first is (1, s, s, C).

        Returns:
            logits (P, 1, 4s, 4s) and predicted IoU (P, 1).
        """
        dense = dense_prompt_embeddings
        shared = len(dense) == 1 or dense.stride(0) == 0
        image = self.prepare(image_embeddings, image_pe, interm_embeddings, dense[:1])
        decoded = self.decode(
            image,
            sparse_prompt_embeddings,
            dense=None if shared else dense,
            multimask=multimask_output,
            hq_token_only=hq_token_only,
        )
        return decoded.logits[:, None], decoded.scores[:, None]

    def hq_features(self, image_embeddings: Tensor, interm_embeddings: list[Tensor] | Tensor) -> Tensor:
        """HQ features (B, d/8, 4s, 4s) from the last features (B, d, s, s) and the first early ones (B, s, s, C)."""
        early = interm_embeddings[0].permute(0, 3, 1, 2)
        return self.embedding_encoder(image_embeddings) + self.compress_vit_feat(early)

    def prepare(self, embedding: Tensor, position: Tensor, early: list[Tensor] | Tensor, no_mask: Tensor) -> ImageSide:
        """Compute what depends on B images alone, before any prompt is known.

        Args:
            embedding: (B, d, s, s).
            position: (1, d, s, s) positional encoding.
            early: the encoder's early features; the first is (B, s, s, C).
            no_mask: (1, d, s, s) the prompt encoder's embedding for "no mask prompt".
        """
        places, positions = _places(embedding), _places(position)[0]
        return ImageSide(
            embedding=places,
            position=positions,
            first=first_layer(self._transformer, places + _places(no_mask), positions),
            hq_features=self.hq_features(embedding, early),
        )

    def decode(
        self,
        image: ImageSide,
        sparse: Tensor,
        *,
        images: Tensor | None = None,
        dense: Tensor | None = None,
        multimask: bool = False,
        hq_token_only: bool = False,
        least_score: float | None = None,
    ) -> Decoded:
        """Predict masks for P prompts of B images.

        Args:
            image: result of `prepare`.
            sparse: (P, k, d) embeddings of points and boxes.
            images: (P,) index of each prompt's image; None: all belong to the first.
            dense: (P, d, s, s) mask prompts; None: no prompt has a mask.
            multimask: use the best by predicted IoU of the masks for ambiguous prompts, not the single one.
            hq_token_only: skip SAM's own mask.
            least_score: compute masks only for prompts whose predicted IoU is above this.
        """
        images = sparse.new_zeros(len(sparse), dtype=torch.long) if images is None else images
        size = max(1, PLACES_AT_ONCE.get(sparse.device.type, OTHERWISE_AT_ONCE) // image.embedding.shape[1])
        none = image.hq_features.new_zeros(0, *image.hq_features.shape[-2:])
        sams, hqs, scores, kept = [none], [none], [], []
        for rows in _parts(len(sparse), size):
            tokens, keys = self._attended(image, sparse[rows], images[rows], None if dense is None else dense[rows])
            score, sam = self._chosen(tokens, multimask)
            which = images[rows]
            passed = None if least_score is None else score > least_score
            if passed is not None:
                tokens, keys, sam, which = tokens[passed], keys[passed], sam[passed], which[passed]
            scores.append(score)
            kept.append(torch.ones_like(score, dtype=torch.bool) if passed is None else passed)
            if len(keys) == 0:
                continue
            fine = self._upscaled(keys, tuple(image.hq_features.shape[-2:]))
            if not hq_token_only:
                sams.append(_product(fine, sam))
            hqs.append(self._hq_mask(fine, self.hf_mlp(tokens[:, self.num_mask_tokens]), image.hq_features, which))
        return Decoded(
            sam=None if hq_token_only else torch.cat(sams),
            hq=torch.cat(hqs),
            scores=torch.cat(scores),
            kept=torch.cat(kept).nonzero()[:, 0],
        )

    def predict_masks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        hq_features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Predict all masks of P prompts of one image, SAM's first, the HQ token's last, step by step as in the paper.

        For export and comparison, without sharing work between prompts. Shapes as in `forward`; hq_features is
        (1, d/8, 4s, 4s).

        Returns:
            logits (P, masks + 1, 4s, 4s) and predicted IoU (P, masks).
        """
        prompts = sparse_prompt_embeddings.shape[0]
        tokens = torch.cat([self._own_tokens().expand(prompts, -1, -1), sparse_prompt_embeddings], dim=1)
        keys = image_embeddings.expand(prompts, -1, -1, -1) + dense_prompt_embeddings
        hs, places = self.transformer(keys, image_pe.expand(prompts, -1, -1, -1), tokens)
        upscaled = self.output_upscaling(places.transpose(1, 2).view(keys.shape))
        features = self.embedding_maskfeature(upscaled) + hq_features
        hyper = [mlp(hs[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        sam = torch.einsum("pmc,pchw->pmhw", torch.stack(hyper, dim=1), upscaled)
        hq = torch.einsum("pc,pchw->phw", self.hf_mlp(hs[:, self.num_mask_tokens]), features)
        return torch.cat([sam, hq[:, None]], dim=1), self.iou_prediction_head(hs[:, 0])

    @property
    def _transformer(self) -> TwoWayTransformer:
        if not isinstance(self.transformer, TwoWayTransformer):
            raise TypeError("MaskDecoderHQ needs segment_anything's TwoWayTransformer")
        return self.transformer

    def _own_tokens(self) -> Tensor:
        """Output tokens (1, tokens, d): predicted IoU, SAM's masks, the HQ mask."""
        return torch.cat([self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight])[None]

    def _attended(self, image: ImageSide, sparse: Tensor, images: Tensor, dense: Tensor | None) -> tuple[Tensor, ...]:
        tokens = torch.cat([self._own_tokens().expand(len(sparse), -1, -1), sparse], dim=1)
        keys = rows_of(image.first, images) if dense is None else image.embedding[images] + _places(dense)
        return attend(self._transformer, keys, tokens, image.position)

    def _chosen(self, tokens: Tensor, multimask: bool) -> tuple[Tensor, Tensor]:
        """Predicted IoU (P,) of SAM's selected mask, and that mask's feature weights (P, d/8)."""
        scores = self.iou_prediction_head(tokens[:, 0])
        mlps = self.output_hypernetworks_mlps
        if not multimask:
            return scores[:, 0], mlps[0](tokens[:, 1])
        best = scores[:, 1:].max(dim=1)
        hyper = torch.stack([mlps[i](tokens[:, 1 + i]) for i in range(1, len(mlps))], dim=1)
        return best.values, hyper[torch.arange(len(hyper), device=hyper.device), best.indices]

    def _upscaled(self, keys: Tensor, size: tuple[int, ...]) -> Tensor:
        """SAM's upscaled embedding (P, 4s, 4s, d/8), channels last, of keys (P, N, d)."""
        first, norm, activation, second, last = self.output_upscaling
        rows, columns = size[0] // 4, size[1] // 4
        x = activation(_normalized(_spread(first, keys.unflatten(1, (rows, columns))), norm))
        x = last(_spread(second, x))
        # (P, row, column, dy, dx, ddy, ddx, channel): up to here the pixels of a position are contiguous
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(keys), *size, -1)

    def _hq_mask(self, fine: Tensor, weights: Tensor, features: Tensor, images: Tensor) -> Tensor:
        """Logits (P, 4s, 4s): weights (P, d/8) x (SAM's upscaled embedding, convolved, + the images' HQ features).

        The last convolution and the product are both linear, so the weights are folded into the convolution's kernel,
        which then has one output instead of d/8.
        """
        first, norm, activation, last = self.embedding_maskfeature
        assert isinstance(first, nn.Conv2d)
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        x = F.conv2d(fine.permute(0, 3, 1, 2), first.weight, first.bias, padding=1).permute(0, 2, 3, 1)
        x = activation(_normalized(x, norm)).flatten(1, 2)
        kernel = torch.einsum("po,oikl->pikl", weights, last.weight).flip(2, 3).flatten(2)
        size = tuple(fine.shape[1:3])
        mask = F.fold(kernel.transpose(1, 2) @ x.transpose(1, 2), size, 3, padding=1)[:, 0]
        if len(features) == 1:
            image = weights @ features[0].flatten(1)
        else:
            image = (weights[:, None] @ features[images].flatten(2))[:, 0]
        return mask + (image + (weights @ last.bias)[:, None]).view(mask.shape)


def hq_parameters(decoder: MaskDecoderHQ) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that HQ-SAM adds to SAM."""
    return ((name, p) for name, p in decoder.named_parameters() if name.split(".")[0] in HQ_PARTS)


def mask_features(channels: int) -> nn.Sequential:
    """Convolutions from SAM's or SAM 2's upscaled embedding to HQ features, (B, channels, h, w) -> the same shape."""
    return nn.Sequential(
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        LayerNorm2d(2 * channels),
        nn.GELU(),
        nn.Conv2d(2 * channels, channels, 3, padding=1),
    )


def _upscaling(channels: int, middle: int, fine: int) -> nn.Sequential:
    """(B, channels, s, s) -> (B, fine, 4s, 4s)."""
    return nn.Sequential(
        nn.ConvTranspose2d(channels, middle, 2, stride=2),
        LayerNorm2d(middle),
        nn.GELU(),
        nn.ConvTranspose2d(middle, fine, 2, stride=2),
    )


def _places(maps: Tensor) -> Tensor:
    """(B, d, s, s) -> (B, N, d)."""
    return maps.flatten(2).transpose(1, 2)


def _parts(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows; a single empty one if `count` is 0."""
    return (slice(start, start + size) for start in range(0, max(count, 1), size))


def _spread(convolution: nn.Module, x: Tensor) -> Tensor:
    """A 2 x 2 transposed convolution of stride 2 as a matrix product: (..., c) -> (..., 2, 2, outputs)."""
    assert isinstance(convolution, nn.ConvTranspose2d)
    assert convolution.bias is not None
    weight = convolution.weight.permute(2, 3, 1, 0)
    return F.linear(x, weight.flatten(0, 2), convolution.bias.repeat(4)).unflatten(-1, weight.shape[:3])


def _normalized(x: Tensor, norm: nn.Module) -> Tensor:
    """SAM's LayerNorm2d for channels-last tensors."""
    assert isinstance(norm, LayerNorm2d)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _product(fine: Tensor, weights: Tensor) -> Tensor:
    """(P, h, w, c) x (P, c) -> (P, h, w)."""
    return (fine.flatten(1, 2) @ weights[..., None]).view(fine.shape[:3])
