"""SAM as a segmenter: ViT-B, L, H and MobileSAM's TinyViT, prompts of several images as one batch.

Prompt encoder, mask decoder and ViT are the `segment_anything` package's, TinyViT is `rfmedsam2`'s; parameter names are
those of the published checkpoints. The mask decoder is run here and not by its own `forward`, which takes one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from rfmedsam2.errors import CheckpointError, PlanError
from rfmedsam2.nn.sam import VITS, SamName, Vit, sam_name
from rfmedsam2.nn.sam2.tiny_vit import TinyVitEncoder
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented, normalized

SamBackbone = Literal["vit_b", "vit_l", "vit_h", "vit_tiny", "vit_nano"]
Trained = Literal["none", "decoder"]
"""What of a base is trained: nothing (zero-shot, or under a refiner), or its mask decoder."""

STRIDE = 16
PUBLISHED_SIZE = 1024
PUBLISHED: dict[SamName, SamBackbone] = {
    "SAM ViT-B": "vit_b",
    "SAM ViT-L": "vit_l",
    "SAM ViT-H": "vit_h",
    "MobileSAM": "vit_tiny",
}
ENCODERS: dict[SamBackbone, tuple[int, Vit]] = {PUBLISHED[vit.name]: (channels, vit) for channels, vit in VITS.items()}
"""Channels and sizes of the ViTs; that of nano, which no weights exist for, is for tests."""
ENCODERS["vit_nano"] = (32, Vit(name="SAM ViT-B", depth=2, heads=2, global_blocks=(1,)))
NANO_CHANNELS = 64
WINDOW = 14


class SamSegmenter(nn.Module):
    """SAM on frames and prompts as batches.

    Args:
        backbone: its image encoder.
        frame_size: S, a multiple of 16; TinyViT's of 32.
        best_of_three: a single point without box and mask is ambiguous: of three masks take the one that SAM scores
            best, as its authors advise. Otherwise the single-mask output, as interactive benchmarks do.
        trained: "decoder": the mask decoder is trained, "none": nothing.

    Raises:
        PlanError: a frame size that the encoder cannot take.
    """

    def __init__(
        self,
        backbone: SamBackbone,
        *,
        frame_size: int = PUBLISHED_SIZE,
        best_of_three: bool = False,
        trained: Trained = "none",
    ) -> None:
        super().__init__()
        least = 2 * STRIDE if backbone == "vit_tiny" else STRIDE
        if frame_size < 64 or frame_size % least:
            raise PlanError(
                f"{backbone} cannot see frames of this size",
                expected=f"a multiple of {least} from 64",
                found=frame_size,
            )
        self.backbone: SamBackbone = backbone
        self.frame_size = frame_size
        self.best_of_three = best_of_three
        self.trained: Trained = trained
        self.channels = NANO_CHANNELS if backbone == "vit_nano" else 256
        self.image_encoder = _image_encoder(backbone, frame_size, self.channels)
        side = frame_size // STRIDE
        self.prompt_encoder = PromptEncoder(
            embed_dim=self.channels,
            image_embedding_size=(side, side),
            input_image_size=(frame_size, frame_size),
            mask_in_chans=16,
        )
        transformer = TwoWayTransformer(depth=2, embedding_dim=self.channels, mlp_dim=8 * self.channels, num_heads=8)
        self.mask_decoder = MaskDecoder(transformer_dim=self.channels, transformer=transformer)
        self.requires_grad_(False)
        self.mask_decoder.requires_grad_(trained == "decoder")

    def normalize(self, images: Tensor) -> Tensor:
        """Frames (B, 3, S, S) of images (B, 3, h, w) of 0 to 255."""
        return normalized(images, self.frame_size)

    def encode(self, frames: Tensor) -> Embedded:
        """Embed frames (B, 3, S, S)."""
        encoder = self.image_encoder
        if isinstance(encoder, TinyVitEncoder):
            # its convolutions are quicker with channels last
            seen = frames.contiguous(memory_format=torch.channels_last)
            return Embedded(embedding=encoder.neck(encoder.stages(seen)[-1]), frames=frames)
        return Embedded(embedding=encoder(frames), frames=frames)

    def segment(self, embedded: Embedded, prompted: PromptBatch, *, previous: Segmented | None = None) -> Segmented:  # noqa: ARG002
        """Mask the prompted objects; the mask before takes part only as `prompted.masks`."""
        masks = embedded.embedding.new_empty(len(prompted), *(2 * [self.frame_size // 4]), dtype=torch.float32)
        scores = masks.new_empty(len(prompted))
        for rows, group in prompted.by_click_count():
            logits, quality = self._decoded(embedded.embedding[group.images], group)
            masks = masks.index_copy(0, rows, logits.float())
            scores = scores.index_copy(0, rows, quality.float())
        return Segmented(logits=masks, scores=scores)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the mask decoder, or none."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def _decoded(self, embedding: Tensor, prompted: PromptBatch) -> tuple[Tensor, Tensor]:
        """Masks (p, 4s, 4s) and their scores (p,) of prompts with equally many points, and embeddings of their own."""
        sparse, dense = prompt_embeddings(self.prompt_encoder, prompted)
        with torch.autocast(embedding.device.type, enabled=False):
            positions = self.prompt_encoder.get_dense_pe()
        masks, quality = decoded_masks(self.mask_decoder, embedding + dense, positions=positions, sparse=sparse)
        if not (self.best_of_three and is_ambiguous(prompted)):
            return masks[:, 0], quality[:, 0]
        best = 1 + quality[:, 1:].argmax(1)
        row = torch.arange(len(masks), device=masks.device)
        return masks[row, best], quality[row, best]


def prompt_embeddings(encoder: PromptEncoder, prompted: PromptBatch) -> tuple[Tensor, Tensor]:
    """Sparse (p, n, C) and dense (p, C, s, s) embeddings of prompts with equally many points.

    At full precision: half of it misplaces a point by as much as two pixels of 1024.
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
    """All four masks (p, 4, 4s, 4s) of SAM's mask decoder, the single one first, and their scores (p, 4).

    Args:
        decoder: SAM's.
        source: (p, C, s, s) image embeddings, the dense prompts' added.
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
    """Prompts of a single point and nothing else: of a part, an object, or several."""
    alone = prompted.boxes is None and prompted.masks is None
    return alone and prompted.points is not None and prompted.points.shape[1] == 1


def build_sam(
    weights: Mapping[str, Tensor],
    *,
    where: object,
    frame_size: int = PUBLISHED_SIZE,
    best_of_three: bool = False,
    trained: Trained = "none",
) -> SamSegmenter:
    """The SAM that these weights are of, loaded, in evaluation mode.

    Args:
        weights: by the published names (`rfmedsam2.store.published_weights.read_published`).
        where: what error messages name.
        frame_size: S; published weights are for 1024, others are fitted (see `load_sam`).
        best_of_three: see `SamSegmenter`.
        trained: see `SamSegmenter`.

    Raises:
        CheckpointError: weights of no SAM that is known, or that lack something.
    """
    backbone = _backbone(weights, where=where)
    sam = SamSegmenter(backbone, frame_size=frame_size, best_of_three=best_of_three, trained=trained)
    load_sam(sam, weights, where=where)
    return sam.eval()


def load_sam(sam: SamSegmenter, weights: Mapping[str, Tensor], *, where: object) -> None:
    """Copy published weights into a SAM of the same backbone.

    Of another frame size the table of positions is interpolated; relative positions are as the encoder itself would.

    Raises:
        CheckpointError: weights of another backbone, or that lack something.
    """
    found = "vit_nano" if sam.backbone == "vit_nano" else _backbone(weights, where=where)
    if found != sam.backbone:
        raise CheckpointError(
            "These weights are of another backbone", where=where, expected=sam.backbone, found=found, remedy=_REMEDY
        )
    wanted = sam.state_dict()
    fitted = {name: fitted_positions(name, weights[name], wanted[name].shape) for name in wanted if name in weights}
    lacking = [name for name in wanted if name not in weights]
    wrong = [name for name, tensor in fitted.items() if tensor.shape != wanted[name].shape]
    if lacking or wrong:
        raise CheckpointError(
            f"These weights do not fit {sam.backbone}",
            where=where,
            found=f"{len(lacking)} missing, {len(wrong)} of another shape ({', '.join([*lacking, *wrong][:5])} ...)",
            remedy="Take the published file",
        )
    sam.load_state_dict(fitted)


_REMEDY = "Take that backbone's file, or name the backbone that these weights are of"


def _backbone(weights: Mapping[str, Tensor], *, where: object) -> SamBackbone:
    name = sam_name(weights)
    if name is None or name not in PUBLISHED:
        raise CheckpointError(
            "These are weights of no SAM for natural images that is known",
            where=where,
            expected="sam_vit_b, sam_vit_l, sam_vit_h or mobile_sam.pt",
            found=name or f"{len(weights)} tensors ({', '.join(list(weights)[:3])} ...)",
        )
    return PUBLISHED[name]


def fitted_positions(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """A ViT's table of positions, or of relative positions, for maps of another side."""
    if tensor.shape == shape or not name.startswith("image_encoder."):
        return tensor
    if name.endswith("pos_embed") and tensor.shape[-1] == shape[-1]:
        size = (shape[1], shape[2])
        x = F.interpolate(tensor.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
        return x.permute(0, 2, 3, 1).to(tensor.dtype)
    if name.endswith(("rel_pos_h", "rel_pos_w")) and tensor.shape[-1] == shape[-1]:
        return F.interpolate(tensor.T[None].float(), shape[0], mode="linear")[0].T.to(tensor.dtype)
    return tensor


def _image_encoder(backbone: SamBackbone, frame_size: int, channels: int) -> nn.Module:
    if backbone == "vit_tiny":
        encoder = TinyVitEncoder(frame_size=frame_size)
        encoder.laterals = nn.ModuleList()  # they are for SAM 2's decoder
        return encoder
    width, vit = ENCODERS[backbone]
    return ImageEncoderViT(
        depth=vit.depth,
        embed_dim=width,
        img_size=frame_size,
        norm_layer=cast(type[nn.Module], partial(nn.LayerNorm, eps=1e-6)),
        num_heads=vit.heads,
        global_attn_indexes=vit.global_blocks,
        use_rel_pos=True,
        window_size=WINDOW,
        out_chans=channels,
    )
