"""SAM 2 batched over frames and objects: encode frames, decode object prompts, encode memories of their masks.

The official modules are run as the official video predictor runs them (`SAM2Base.forward_image`,
`_forward_sam_heads`, `_encode_new_memory`), without its loop over frames and objects.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from torch import Tensor, nn

from rfmedsam2.nn.sam2.positions import SinePositions
from rfmedsam2.nn.sam2.tiny_vit import TinyVitEncoder
from rfmedsam2.nn.sam2.types import DecodedMasks, FrameFeatures, ObjectPrompts

Pyramid = tuple[Tensor, Tensor, Tensor]
"""Outputs of the image encoder: (N, C, 4s, 4s), (N, C, 2s, 2s), (N, C, s, s), strides 4, 8 and 16."""


class Sam2(nn.Module):
    """SAM 2 around a model of `build_base`, with or without adapters.

    Args:
        base: the official modules.
        object_scores: objects with a score of at most 0 get empty masks, and pointers and memories of "no object".

    Attributes:
        frame_size: S, side length of the frames in pixels.
        side: s, side length of the embedding.
        channels: C, channels of the embedding.
        memory_channels: M, channels of memories.
        residual_memory: whether the output of memory attention is added to the embedding.
    """

    def __init__(self, base: SAM2Base, *, object_scores: bool = False) -> None:
        super().__init__()
        assert base.pred_obj_scores or not object_scores, "this base was built without object scores"
        self.base = base
        self.object_scores = object_scores
        self.frame_size: int = base.image_size
        self.side: int = base.sam_image_embedding_size
        self.channels: int = base.hidden_dim
        self.memory_channels: int = base.mem_dim
        self.residual_memory: bool = getattr(base, "residual_memory", False)
        self.padding_point: bool = getattr(base, "padding_point", True)
        self.resizes_frames: bool = getattr(base, "resizes_frames", False)
        self._image_positions = SinePositions(self.channels)
        self._memory_positions = SinePositions(self.memory_channels)

    def encode(self, frames: Tensor) -> FrameFeatures:
        """Features of frames (N, 3, S, S)."""
        return self.features(self.pyramid(frames))

    def pyramid(self, frames: Tensor) -> Pyramid:
        """Run only the image encoder on frames (N, 3, S, S)."""
        fine, middle, embedding = self.base.image_encoder(frames)["backbone_fpn"]
        return fine, middle, embedding

    def frozen(self, frames: Tensor) -> Pyramid:
        """What a frozen encoder computes for frames (N, 3, S, S), for `features_of`; TinyViT's before its laterals."""
        encoder = self.base.image_encoder
        return encoder.levels(frames) if isinstance(encoder, TinyVitEncoder) else self.pyramid(frames)

    def features(self, pyramid: Pyramid) -> FrameFeatures:
        """Features for the mask decoder, whose convolutions reduce the channels of the finer levels."""
        fine, middle, embedding = pyramid
        decoder = self.base.sam_mask_decoder
        return FrameFeatures(embedding=embedding, middle=decoder.conv_s1(middle), fine=decoder.conv_s0(fine))

    def features_of(self, levels: Pyramid) -> FrameFeatures:
        """`features` of what `frozen` gave, equal up to rounding.

        A lateral and the decoder's convolution after it are one convolution, a fourth of the work at stride 4.
        """
        encoder, decoder = self.base.image_encoder, self.base.sam_mask_decoder
        if not isinstance(encoder, TinyVitEncoder):
            return self.features(levels)
        fine, middle, embedding = levels
        finer = [
            F.conv2d(level, *_composed(lateral, reduce))
            for level, lateral, reduce in zip(
                (fine, middle), encoder.laterals, (decoder.conv_s0, decoder.conv_s1), strict=True
            )
        ]
        return FrameFeatures(embedding=embedding, middle=finer[1], fine=finer[0])

    def decode(
        self, features: FrameFeatures, prompts: ObjectPrompts, *, embedding: Tensor | None = None
    ) -> DecodedMasks:
        """Decode n objects, at least one, into single masks (for unambiguous prompts).

        Args:
            features: features of the objects' frames, n rows.
            prompts: prompts of the objects.
            embedding: (n, C, s, s), conditioned on memory; None: the frame's own, with the no-memory embedding.
        """
        base = self.base
        if embedding is None:
            embedding = features.embedding + base.no_mem_embed.reshape(1, -1, 1, 1)
        sparse, dense, positions = self._prompt_embeddings(prompts, len(embedding))
        masks, quality, tokens, scores = base.sam_mask_decoder(
            image_embeddings=embedding,
            image_pe=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=False,
            high_res_features=[features.fine, features.middle],
        )
        pointers = base.obj_ptr_proj(tokens[:, 0])
        if self.object_scores:
            there = scores > 0
            masks = torch.where(there[:, None, None], masks, NO_OBJ_SCORE)
            pointers = there.float() * pointers + (1 - there.float()) * base.no_obj_ptr
        return DecodedMasks(masks=masks[:, 0].float(), pointers=pointers, scores=scores[:, 0], quality=quality[:, 0])

    def encode_memory(self, embedding: Tensor, masks: Tensor, scores: Tensor) -> Tensor:
        """Memories (n, M, s, s) of n objects.

        Args:
            embedding: (n, C, s, s), embeddings of the objects' frames from the image encoder.
            masks: (n, 4s, 4s) logits.
            scores: (n,) object scores.
        """
        base = self.base
        size = (self.frame_size, self.frame_size)
        large = F.interpolate(masks[:, None].float(), size, mode="bilinear", align_corners=False)
        scaled = torch.sigmoid(large) * base.sigmoid_scale_for_mem_enc + base.sigmoid_bias_for_mem_enc
        maps = base.memory_encoder(embedding, scaled, skip_mask_sigmoid=True)["vision_features"]
        if self.object_scores:
            assert base.no_obj_embed_spatial is not None
            absent = 1 - (scores > 0).float()
            maps = maps + absent[:, None, None, None] * base.no_obj_embed_spatial[..., None, None]
        return maps

    def position(self) -> Tensor:
        """Sine position encoding of a memory (M, s, s)."""
        return self._memory_positions.at(self.side, self.base.device)

    def image_position(self) -> Tensor:
        """Sine position encoding of the embedding (C, s, s)."""
        return self._image_positions.at(self.side, self.base.device)

    def _prompt_embeddings(self, prompts: ObjectPrompts, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sparse (n, P, C) and dense (n, C, s, s) embeddings, and the dense position encoding (1, C, s, s).

        In full precision: half precision shifts a box's corner by up to half a pixel of 256.
        """
        encoder = self.base.sam_prompt_encoder
        given = prompts.boxes if prompts.tokens is None else prompts.tokens
        empty = encoder.not_a_point_embed.weight.expand(count, 1, -1)
        with torch.autocast(empty.device.type, enabled=False):
            positions = encoder.get_dense_pe()
            if prompts.tokens is not None:
                sparse = prompts.tokens.float()
            elif prompts.boxes is not None:
                sparse = encoder(points=None, boxes=prompts.boxes.float(), masks=None)[0]
                if prompts.padded is not None:
                    sparse = torch.where(prompts.padded[:, None, None], empty, sparse)
            else:
                sparse = empty[:, :0]
        if self.padding_point:
            # the official predictor uses an empty point if there is no prompt, and always appends one
            sparse = torch.cat([sparse, empty] if given is not None else [empty, empty], 1)
        if prompts.masks is not None:
            return sparse, encoder.mask_downscaling(prompts.masks[:, None]), positions
        none = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return sparse, none.expand(count, -1, self.side, self.side), positions


def _composed(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of two 1x1 convolutions as one."""
    with torch.autocast(first.weight.device.type, enabled=False):
        weight = second.weight.flatten(1) @ first.weight.flatten(1)
        bias = F.linear(first.bias, second.weight.flatten(1), second.bias)
    return weight[..., None, None], bias
