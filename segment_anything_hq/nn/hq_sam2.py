"""HQ-SAM 2: SAM 2 with an extra output token in its mask decoder, for high-quality masks.

Modules and parameters have the names of the published sam2.1_hq_hiera_* files. Unlike in HQ-SAM, the HQ features are
the decoder's upscaled embedding alone, since SAM 2 already adds the encoder's finer levels to it. Source: HQ-SAM paper,
section 3; HQ-SAM 2's published model (November 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam2_utils import MLP
from torch import Tensor, nn

from rfmedsam2.nn.loading import LoadReport
from rfmedsam2.nn.sam import is_ambiguous
from rfmedsam2.nn.sam2.weights import load_sam2
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented
from segment_anything_hq.modeling.mask_decoder_hq import mask_features
from segment_anything_hq.nn.sam2_base import (
    PUBLISHED_SIZE,
    Sam2Backbone,
    Sam2Segmenter,
    fall_back_when_unstable,
    finer_levels,
    prompt_embeddings,
)

HQ_PARTS = ("hf_token", "hf_mlp", "embedding_maskfeature")
"""Modules that HQ-SAM 2 adds to SAM 2's mask decoder; only these are trained."""
SAM_MASKS = 4
"""Mask tokens of SAM 2: the single mask, and three for an ambiguous prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """The decoder's output for p prompts.

    Attributes:
        sam: (p, m, 4s, 4s) logits of SAM 2's tokens, one or three.
        hq: (p, 1, 4s, 4s) logits of the HQ-Output token.
        quality: (p, m) predicted IoU of SAM 2's masks.
        tokens: (p, m, C) output tokens of SAM 2's masks, for object pointers.
        scores: (p, 1) object scores.
    """

    sam: Tensor
    hq: Tensor
    quality: Tensor
    tokens: Tensor
    scores: Tensor


class HqMaskDecoder(MaskDecoder):
    """SAM 2's mask decoder with the HQ-Output token; `forward` has the official signature, as videos need it.

    Args:
        decoder: SAM 2's decoder, which defines the sizes and whose transformer is reused.

    Attributes:
        hq_token_only: return the HQ token's logits alone, not their sum with SAM 2's.
    """

    def __init__(self, decoder: MaskDecoder) -> None:
        channels = decoder.transformer_dim
        super().__init__(
            transformer_dim=channels,
            transformer=decoder.transformer,
            iou_head_hidden_dim=len(decoder.state_dict()["iou_prediction_head.layers.0.bias"]),
            use_high_res_features=True,
            iou_prediction_use_sigmoid=decoder.iou_prediction_head.sigmoid_output,
            pred_obj_scores=True,
            pred_obj_scores_mlp=True,
            use_multimask_token_for_obj_ptr=decoder.use_multimask_token_for_obj_ptr,
        )
        fine = channels // 8
        self.hf_token = nn.Embedding(1, channels)
        self.hf_mlp = MLP(channels, channels, fine, 3)
        self.embedding_maskfeature = mask_features(fine)
        self.hq_token_only = False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        repeat_image: bool,
        high_res_features: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `sam2.modeling.sam.mask_decoder.MaskDecoder`; the HQ token's logits are added to every mask."""
        assert high_res_features is not None
        count = len(sparse_prompt_embeddings)
        embedding = image_embeddings.expand(count, -1, -1, -1) if repeat_image else image_embeddings
        decoded = self.decode(
            embedding + dense_prompt_embeddings,
            positions=image_pe,
            sparse=sparse_prompt_embeddings,
            finer=high_res_features,
            multimask=multimask_output,
        )
        masks = decoded.hq.expand_as(decoded.sam) if self.hq_token_only else decoded.sam + decoded.hq
        return masks, decoded.quality, decoded.tokens, decoded.scores

    def decode(
        self, source: Tensor, *, positions: Tensor, sparse: Tensor, finer: list[Tensor], multimask: bool
    ) -> Decoded:
        """Decode p prompts; SAM 2's masks and the HQ token's are returned separately.

        Args:
            source: (p, C, s, s) image embeddings plus dense prompt embeddings.
            positions: (1, C, s, s) positional encoding.
            sparse: (p, n, C) sparse prompt embeddings.
            finer: feature maps (p or 1, C/8, 4s, 4s) and (p or 1, C/4, 2s, 2s).
            multimask: return SAM 2's three masks for an ambiguous prompt instead of the single one.
        """
        own = [self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight]
        tokens = torch.cat([torch.cat(own).to(sparse.dtype).expand(len(source), -1, -1), sparse], 1)
        queries, keys = self.transformer(source, positions, tokens)
        scores, quality = self.pred_obj_score_head(queries[:, 0]), self.iou_prediction_head(queries[:, 1])
        of_masks, of_hq = queries[:, 2 : 2 + SAM_MASKS], queries[:, 2 + SAM_MASKS]
        upscaled = self._upscaled(keys.transpose(1, 2).reshape(source.shape), finer)
        heads = enumerate(self.output_hypernetworks_mlps)
        weights = torch.stack([head(of_masks[:, i]) for i, head in heads], 1)
        sam = torch.einsum("pkc,pchw->pkhw", weights, upscaled)
        hq = self._hq_mask(upscaled, self.hf_mlp(of_hq))
        pointer = of_masks[:, :1]
        if multimask:
            pointer = of_masks[:, 1:] if self.use_multimask_token_for_obj_ptr else pointer
            sam, quality = sam[:, 1:], quality[:, 1:]
        elif self.dynamic_multimask_via_stability and not self.training:
            sam, quality = self._dynamic_multimask_via_stability(sam, quality)
        else:
            sam, quality = sam[:, :1], quality[:, :1]
        return Decoded(sam=sam, hq=hq, quality=quality, tokens=pointer, scores=scores)

    def _upscaled(self, keys: Tensor, finer: list[Tensor]) -> Tensor:
        """SAM 2's upscaled embedding (p, C/8, 4s, 4s), with its finer levels added."""
        to_stride_8, norm, first, to_stride_4, second = self.output_upscaling
        fine, middle = finer
        return second(to_stride_4(first(norm(to_stride_8(keys) + middle))) + fine)

    def _hq_mask(self, upscaled: Tensor, weights: Tensor) -> Tensor:
        """Logits (p, 1, 4s, 4s): weights (p, C/8) x the upscaled embedding, convolved.

        The last convolution and the product are both linear, so the weights are folded into its kernel, which then has
        one output per prompt instead of C/8.
        """
        first, norm, activation, last = self.embedding_maskfeature
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        x = activation(norm(first(upscaled)))
        kernels = torch.einsum("po,oikl->pikl", weights, last.weight)
        hq = F.conv2d(x.flatten(0, 1)[None], kernels.to(x.dtype), padding=1, groups=len(x))
        return hq.transpose(0, 1) + (weights @ last.bias)[:, None, None, None]


class HqSam2(Sam2Segmenter):
    """HQ-SAM 2 as a segmenter: only what it adds to SAM 2 is trained.

    Args:
        backbone: size of SAM 2.
        frame_size: S, a multiple of 32.
        hq_token_only: return the HQ token's mask alone, not its sum with SAM 2's mask.

    Attributes:
        base: SAM 2 with the HQ decoder; the official video code accepts it like any other SAM 2.
        load_report: which parameters the last loaded weights contained; None before any are loaded.
    """

    load_report: LoadReport | None = None

    def __init__(
        self, backbone: Sam2Backbone, *, frame_size: int = PUBLISHED_SIZE, hq_token_only: bool = False
    ) -> None:
        super().__init__(backbone, frame_size=frame_size)
        decoder = HqMaskDecoder(self.base.sam_mask_decoder)
        decoder.hq_token_only = hq_token_only
        self.base.sam_mask_decoder = decoder
        fall_back_when_unstable(self.base)
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(name.startswith(HQ_PARTS))

    @property
    def decoder(self) -> HqMaskDecoder:
        """The mask decoder."""
        decoder = self.base.sam_mask_decoder
        assert isinstance(decoder, HqMaskDecoder)
        return decoder

    def train(self, mode: bool = True) -> HqSam2:
        """Keep all modules in evaluation mode: SAM 2 is frozen, and the HQ modules behave alike in both modes."""
        super().train(False)
        self.training = mode
        return self

    def segment(self, embedded: Embedded, prompted: PromptBatch, *, previous: Segmented | None = None) -> Segmented:  # noqa: ARG002
        """Segment prompted objects; `extra` holds both tokens' logits (P, 4s, 4s) as "sam" and "hq"."""
        groups = prompted.by_click_count()
        parts = [self._decoded_apart(embedded, group) for _, group in groups]
        order = torch.cat([rows for rows, _ in groups]).argsort()
        sam, hq, scores = (torch.cat(each).float()[order] for each in zip(*parts, strict=True))
        logits = hq if self.decoder.hq_token_only else sam + hq
        return Segmented(logits=logits, scores=scores, extra={"sam": sam, "hq": hq})

    def _decoded_apart(self, embedded: Embedded, prompted: PromptBatch) -> tuple[Tensor, Tensor, Tensor]:
        """SAM 2's and the HQ token's logits (p, 4s, 4s), predicted IoU (p,), for prompts with equally many points."""
        sparse, dense, positions = prompt_embeddings(self.base, prompted)
        decoded = self.decoder.decode(
            embedded.embedding[prompted.images] + dense,
            positions=positions,
            sparse=sparse,
            finer=finer_levels(embedded, prompted.images),
            multimask=self.best_of_three and is_ambiguous(prompted),
        )
        best = decoded.quality.argmax(1)
        row = torch.arange(len(best), device=best.device)
        return decoded.sam[row, best], decoded.hq[:, 0], decoded.quality[row, best]


def load_hq_sam2(model: HqSam2, weights: Mapping[str, Tensor], *, where: object) -> LoadReport:
    """Load published weights of HQ-SAM 2 or of SAM 2; of SAM 2, what HQ-SAM 2 adds stays untrained.

    Args:
        model: model of the same size as the weights.
        weights: tensors by their published names (`rfmedsam2.store.published_weights.read_published`).
        where: source of the weights, for error messages.

    Returns:
        a report of what was loaded; `missing` lists the tensors that keep their initial values.

    Raises:
        CheckpointError: the weights are of another model or size, incomplete for SAM 2, or hold only some of HQ-SAM
            2's additions.
    """
    own = {f"sam_mask_decoder.{name}": t for name, t in model.decoder.state_dict().items() if name.startswith(HQ_PARTS)}
    new = {} if own.keys() & weights.keys() else own
    report = load_sam2(model.base, {**weights, **new}, where=where)
    return LoadReport(
        loaded=tuple(name for name in report.loaded if name not in new),
        missing=(*report.missing, *new),
        unexpected=report.unexpected,
    )
