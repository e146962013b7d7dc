"""SAM as a segmenter, batched over images and prompts: ViT-B, L, H, MobileSAM and LiteMedSAM.

All of SAM's parts are built here: `SamSegmenter` for the prompt study and the refiners, and for HQ-SAM
`build_vit`, `build_prompt_encoder` and `build_transformer`. Prompt encoder, mask decoder and ViT are the
`segment_anything` package's, TinyViT is ours (`sam2/tiny_vit.py`); parameters have the names of the published files
(`sam_weights.py`). The mask decoder is run here and not by its own `forward`, which takes one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar, cast

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from rfmedsam2.errors import PlanError
from rfmedsam2.nn.sam2.tiny_vit import TinyVitEncoder, scaled
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented, normalized, padded
from rfmedsam2.records.model import LARGEST_FRAME

SamBackbone = Literal["vit_b", "vit_l", "vit_h", "vit_tiny", "lite_medsam", "vit_nano"]
Trained = Literal["none", "decoder"]
"""Trainable part: none (zero-shot, or below a refiner), or the mask decoder."""

NAMES: dict[SamBackbone, str] = {
    "vit_b": "SAM ViT-B",
    "vit_l": "SAM ViT-L",
    "vit_h": "SAM ViT-H",
    "vit_tiny": "MobileSAM",
    "lite_medsam": "LiteMedSAM",
    "vit_nano": "SAM ViT-nano",
}
"""Names as in papers; nano has no published weights and is for tests."""
CHANNELS = 256
NANO_CHANNELS = 64
STRIDE = 16
LITE_STRIDE = 4
"""Stride of LiteMedSAM's embedding, whose frames have 256 x 256 pixels instead of 1024 x 1024."""
PUBLISHED_SIDE = 64
"""Side length of the embedding that published weights were trained with."""
WINDOW = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class VitSizes:
    """Sizes of an image encoder: channels, blocks, heads, and the blocks with attention over the whole image."""

    channels: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


VITS: dict[SamBackbone, VitSizes] = {
    "vit_b": VitSizes(channels=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    "vit_l": VitSizes(channels=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": VitSizes(channels=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    "vit_nano": VitSizes(channels=32, depth=2, heads=2, global_blocks=(1,)),
}
"""The official ones: segment_anything/build_sam.py."""
VitT = TypeVar("VitT", bound=ImageEncoderViT)


class SamSegmenter(nn.Module):
    """SAM batched over frames and prompts.

    Args:
        backbone: image encoder.
        frame_size: S, a multiple of the embedding's stride, 16 (LiteMedSAM: 4), for TinyViT of twice the stride. None:
            as published, 1024 (LiteMedSAM: 256).
        best_of_three: for a single point without box and mask, which is ambiguous, use the best of three masks by
            SAM's score, as its authors recommend. Otherwise the single-mask output, as in interactive benchmarks.
        trained: "decoder": the mask decoder is trained, "none": nothing.

    Raises:
        PlanError: the encoder does not support the frame size.
    """

    def __init__(
        self,
        backbone: SamBackbone,
        *,
        frame_size: int | None = None,
        best_of_three: bool = False,
        trained: Trained = "none",
    ) -> None:
        super().__init__()
        stride = LITE_STRIDE if backbone == "lite_medsam" else STRIDE
        frame_size = PUBLISHED_SIDE * stride if frame_size is None else frame_size
        least = stride if backbone in VITS else 2 * stride
        if not 4 * stride <= frame_size <= LARGEST_FRAME or frame_size % least:
            raise PlanError(
                f"Invalid frame size for {backbone}",
                expected=f"a multiple of {least} from {4 * stride} to {LARGEST_FRAME}",
                found=frame_size,
            )
        self.backbone: SamBackbone = backbone
        self.frame_size = frame_size
        self.best_of_three = best_of_three
        self.trained: Trained = trained
        self.channels = NANO_CHANNELS if backbone == "vit_nano" else CHANNELS
        self.side = frame_size // stride
        self.image_encoder = (
            build_vit(backbone, frame_size=frame_size, channels=self.channels)
            if backbone in VITS
            else _tiny_vit(self.side, strided=backbone == "vit_tiny")
        )
        self.prompt_encoder = build_prompt_encoder(frame_size, side=self.side, channels=self.channels)
        self.mask_decoder = MaskDecoder(transformer_dim=self.channels, transformer=build_transformer(self.channels))
        self.requires_grad_(False)
        self.mask_decoder.requires_grad_(trained == "decoder")

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize and pad images (B, 3, h, w), 0 to 255, to frames (B, 3, S, S); LiteMedSAM scales each to 0 to 1."""
        if self.backbone == "lite_medsam":
            return padded(scaled(images.float(), "unit"), self.frame_size)
        return normalized(images, self.frame_size)

    def encode(self, frames: Tensor) -> Embedded:
        """Embed frames (B, 3, S, S)."""
        encoder = self.image_encoder
        if isinstance(encoder, TinyVitEncoder):
            # its convolutions are faster with channels last
            seen = frames.contiguous(memory_format=torch.channels_last)
            return Embedded(embedding=encoder.neck(encoder.stages(seen)[-1]), frames=frames)
        return Embedded(embedding=encoder(frames), frames=frames)

    def segment(self, embedded: Embedded, prompted: PromptBatch, *, previous: Segmented | None = None) -> Segmented:  # noqa: ARG002
        """Segment the prompted objects; the previous mask is only used as `prompted.masks`."""
        size = (len(prompted), 4 * self.side, 4 * self.side)
        masks = embedded.embedding.new_empty(size, dtype=torch.float32)
        scores = masks.new_empty(len(prompted))
        for rows, group in prompted.by_click_count():
            logits, quality = self._decoded(embedded.embedding[group.images], group)
            masks = masks.index_copy(0, rows, logits.float())
            scores = scores.index_copy(0, rows, quality.float())
        return Segmented(logits=masks, scores=scores)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the mask decoder, or none."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def _decoded(self, embedding: Tensor, prompted: PromptBatch) -> tuple[Tensor, Tensor]:
        """Masks (p, 4s, 4s) and scores (p,) of prompts with the same number of points, one embedding each."""
        sparse, dense = prompt_embeddings(self.prompt_encoder, prompted)
        with torch.autocast(embedding.device.type, enabled=False):
            positions = self.prompt_encoder.get_dense_pe()
        masks, quality = decoded_masks(self.mask_decoder, embedding + dense, positions=positions, sparse=sparse)
        if not (self.best_of_three and is_ambiguous(prompted)):
            return masks[:, 0], quality[:, 0]
        best = 1 + quality[:, 1:].argmax(1)
        row = torch.arange(len(masks), device=masks.device)
        return masks[row, best], quality[row, best]


def build_vit(
    backbone: SamBackbone,
    *,
    frame_size: int,
    channels: int = CHANNELS,
    kind: type[VitT] = ImageEncoderViT,
) -> VitT:
    """Build a ViT of SAM, randomly initialized.

    Args:
        backbone: one of `VITS`.
        frame_size: S, a multiple of 16.
        channels: channels of the embedding.
        kind: class to build: `segment_anything`'s, or one with the same arguments.
    """
    sizes = VITS[backbone]
    return kind(
        depth=sizes.depth,
        embed_dim=sizes.channels,
        img_size=frame_size,
        norm_layer=cast(type[nn.Module], partial(nn.LayerNorm, eps=1e-6)),
        num_heads=sizes.heads,
        global_attn_indexes=sizes.global_blocks,
        use_rel_pos=True,
        window_size=WINDOW,
        out_chans=channels,
    )


def build_prompt_encoder(frame_size: int, *, side: int | None = None, channels: int = CHANNELS) -> PromptEncoder:
    """Build SAM's prompt encoder for frames of side S and an embedding of side `side` (None: S / 16)."""
    side = frame_size // STRIDE if side is None else side
    return PromptEncoder(
        embed_dim=channels,
        image_embedding_size=(side, side),
        input_image_size=(frame_size, frame_size),
        mask_in_chans=16,
    )


def build_transformer(channels: int = CHANNELS) -> TwoWayTransformer:
    """Build the transformer of SAM's mask decoder."""
    return TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=8 * channels, num_heads=8)


def _tiny_vit(side: int, *, strided: bool) -> TinyVitEncoder:
    # a pixel of LiteMedSAM counts as 4 x 4 pixels of the frame
    encoder = TinyVitEncoder(frame_size=STRIDE * side, strided=strided)
    encoder.laterals = nn.ModuleList()  # they are for SAM 2's decoder
    return encoder


def prompt_embeddings(encoder: PromptEncoder, prompted: PromptBatch) -> tuple[Tensor, Tensor]:
    """Sparse (p, n, C) and dense (p, C, s, s) embeddings of prompts with the same number of points.

    In full precision: half precision shifts a point by up to two pixels of 1024.
    """
    points = None if prompted.points is None or prompted.point_labels is None else prompted.points.float()
    with torch.autocast(prompted.images.device.type, enabled=False):
        sparse, dense = encoder(
            points=None if points is None else (points, prompted.point_labels),
            boxes=None if prompted.boxes is None else prompted.boxes.float(),
            masks=None if prompted.masks is None else prompted.masks[:, None].float(),
        )
    return sparse.expand(len(prompted), -1, -1), dense.expand(len(prompted), -1, -1, -1)


def decoded_masks(decoder: MaskDecoder, source: Tensor, *, positions: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """All four masks (p, 4, 4s, 4s) of SAM's mask decoder, the single-mask output first, and their scores (p, 4).

    Args:
        decoder: SAM's.
        source: (p, C, s, s) image embeddings plus dense prompt embeddings.
        positions: (1, C, s, s).
        sparse: (p, n, C).
    """
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    queries, keys = decoder.transformer(
        source, positions, torch.cat([tokens.expand(len(source), -1, -1).to(sparse.dtype), sparse], 1)
    )
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
    heads = enumerate(decoder.output_hypernetworks_mlps)
    weights = torch.stack([head(queries[:, 1 + i]) for i, head in heads], 1)
    return torch.einsum("pkc,pchw->pkhw", weights, upscaled), decoder.iou_prediction_head(queries[:, 0])


def is_ambiguous(prompted: PromptBatch) -> bool:
    """Whether prompts are a single point each, which may mean a part, an object, or several."""
    alone = prompted.boxes is None and prompted.masks is None
    return alone and prompted.points is not None and prompted.points.shape[1] == 1
