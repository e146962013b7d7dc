"""HQ-SAM as a `Segmenter` for the trainer, and loading of published HQ-SAM and SAM weights.

Source: HQ-SAM paper, section 3.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from rfmedsam2.nn.loading import LoadReport
from rfmedsam2.nn.sam import CHANNELS, VITS, SamBackbone, build_prompt_encoder, build_transformer, build_vit
from rfmedsam2.nn.sam2.tiny_vit import DEPTHS, HEADS, WIDTHS, WINDOWS
from rfmedsam2.nn.sam_weights import load_sam
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented, normalized
from segment_anything_hq.modeling import ImageEncoderViT, MaskDecoder, MaskDecoderHQ, Sam, TinyViT
from segment_anything_hq.modeling.mask_decoder_hq import HQ_PARTS, Decoded, hq_parameters
from segment_anything_hq.modeling.tiny_vit_sam import CLASSIFIER

FRAME_SIZE = 1024
"""Frame size of the published weights, in pixels."""
logger = logging.getLogger(__name__)


class HqSam(Sam):
    """HQ-SAM as a `Segmenter`: only what HQ-SAM adds to SAM is trained (HQ-SAM paper, section 3.4).

    Attributes:
        frame_size: S, side of the square frame in pixels.
        channels: channels of the embedding.
        hq_token_only: return the HQ token's mask alone, not its sum with SAM's mask.
    """

    mask_decoder: MaskDecoderHQ  # pyright: ignore[reportIncompatibleVariableOverride]
    hq_token_only = False

    @property
    def frame_size(self) -> int:
        """S, side of the square frame in pixels."""
        return self.image_encoder.img_size

    @property
    def channels(self) -> int:
        """Channels of the embedding."""
        return self.mask_decoder.transformer_dim

    def normalize(self, images: Tensor) -> Tensor:
        """See `Segmenter`."""
        return normalized(images, self.frame_size)

    def encode(self, frames: Tensor) -> Embedded:
        """Embed frames (B, 3, S, S) without gradients; `early` is (B, C, s, s), for TinyViT too."""
        with torch.no_grad():
            embedding, early = self.image_encoder(frames)
        return Embedded(embedding=embedding, early=early[0].permute(0, 3, 1, 2), frames=frames)

    def segment(
        self,
        embedded: Embedded,
        prompted: PromptBatch,
        *,
        previous: Segmented | None = None,  # noqa: ARG002
    ) -> Segmented:
        """Segment prompted objects; `extra` holds both tokens' logits (P, 4s, 4s) as "sam" and "hq"."""
        parts = [(rows, self._decoded(embedded, group)) for rows, group in prompted.by_click_count()]
        order = torch.cat([rows for rows, _ in parts]).argsort()
        sam, hq, scores = (
            torch.cat([getattr(decoded, name) for _, decoded in parts])[order] for name in ("sam", "hq", "scores")
        )
        logits = hq if self.hq_token_only else sam + hq
        return Segmented(logits=logits, scores=scores, extra={"sam": sam, "hq": hq})

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that HQ-SAM adds to SAM."""
        return ((f"mask_decoder.{name}", parameter) for name, parameter in hq_parameters(self.mask_decoder))

    def _decoded(self, embedded: Embedded, prompted: PromptBatch) -> Decoded:
        if embedded.early is None:
            raise ValueError("HQ-SAM needs the encoder's early features")
        points = None
        if prompted.points is not None and prompted.point_labels is not None:
            points = (prompted.points, prompted.point_labels)
        masks = None if prompted.masks is None else prompted.masks[:, None]
        sparse, dense = self.prompt_encoder(points=points, boxes=prompted.boxes, masks=masks)
        image = self.mask_decoder.prepare(
            embedded.embedding,
            self.prompt_encoder.get_dense_pe(),
            [embedded.early.permute(0, 2, 3, 1)],
            no_mask(self.prompt_encoder),
        )
        given = None if masks is None else dense
        sparse = sparse.expand(len(prompted), -1, -1)
        return self.mask_decoder.decode(image, sparse, images=prompted.images, dense=given)


def no_mask(encoder: PromptEncoder) -> Tensor:
    """Dense embedding that stands for "no mask prompt", (1, d, s, s)."""
    return encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(-1, -1, *encoder.image_embedding_size)


def build_hq_sam(backbone: SamBackbone, *, frame_size: int = FRAME_SIZE) -> HqSam:
    """Build HQ-SAM with random weights, in evaluation mode; SAM's parameters do not require gradients."""
    encoder, early = _image_encoder(backbone, frame_size)
    decoder = MaskDecoderHQ(transformer_dim=CHANNELS, transformer=build_transformer(), vit_dim=early)
    sam = HqSam(encoder, build_prompt_encoder(frame_size), decoder).eval()
    for name, parameter in sam.named_parameters():
        parameter.requires_grad_(_is_added(name))
    return sam


def build_plain_sam(backbone: SamBackbone, *, frame_size: int = FRAME_SIZE) -> Sam:
    """Build the published package's plain SAM with random weights, in evaluation mode."""
    decoder = MaskDecoder(transformer_dim=CHANNELS, transformer=build_transformer())
    return Sam(_image_encoder(backbone, frame_size)[0], build_prompt_encoder(frame_size), decoder).eval()


def load_hq_sam(sam: Sam, weights: Mapping[str, Tensor], *, where: object) -> LoadReport:
    """Load published weights of HQ-SAM, SAM or MobileSAM; of the latter two, what HQ-SAM adds stays untrained.

    Args:
        sam: model with the same backbone as the weights.
        weights: tensors by their published names (`store.published_weights.read_published`).
        where: source of the weights, for error messages.

    Returns:
        a report of what was loaded; `missing` lists the tensors that keep their initial values.

    Raises:
        CheckpointError: the weights are of another backbone, incomplete for SAM, or hold only some of HQ-SAM's
            additions.
    """
    added = [name for name in sam.state_dict() if _is_added(name)]
    report = load_sam(sam, weights, where=where, model="HQ-SAM" if added else None, added=added)
    sam.load_report = report
    strange = [name for name in report.unexpected if not name.removeprefix("image_encoder.").startswith(CLASSIFIER)]
    if strange:
        logger.warning("%s has %d tensors that are not part of HQ-SAM: %s", where, len(strange), strange[:5])
    return report


def _image_encoder(backbone: SamBackbone, frame_size: int) -> tuple[ImageEncoderViT | TinyViT, int]:
    """Build an image encoder with early features; return it and the channels of those features."""
    if backbone != "vit_tiny":
        return build_vit(backbone, frame_size=frame_size, kind=ImageEncoderViT), VITS[backbone].channels
    sizes = {"embed_dims": WIDTHS, "depths": DEPTHS, "num_heads": HEADS, "window_sizes": WINDOWS}
    return TinyViT(frame_size, **sizes, drop_path_rate=0.0, layer_lr_decay=0.8), WIDTHS[2]


def _is_added(name: str) -> bool:
    """Whether a parameter is one that HQ-SAM adds to SAM."""
    return name.removeprefix("mask_decoder.").split(".")[0] in HQ_PARTS
