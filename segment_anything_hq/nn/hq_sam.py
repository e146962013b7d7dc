"""HQ-SAM as a `Segmenter` of the trainer, and published weights of HQ-SAM and SAM into it.

Source: HQ-SAM paper, section 3.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from rfmedsam2.errors import CheckpointError
from rfmedsam2.nn.sam2.weights import LoadReport
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented, normalized
from segment_anything_hq.modeling.mask_decoder_hq import HQ_PARTS, Decoded, MaskDecoderHQ, hq_parameters
from segment_anything_hq.modeling.sam import Sam
from segment_anything_hq.modeling.tiny_vit_sam import CLASSIFIER
from segment_anything_hq.nn.sam_base import fitted_positions

ENCODERS = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", "tiny": "TinyViT"}
logger = logging.getLogger(__name__)


class HqSam(Sam):
    """HQ-SAM as a `Segmenter`: only what HQ-SAM adds to SAM is trained (HQ-SAM paper, section 3.4).

    Attributes:
        frame_size: S.
        channels: of the embedding.
        hq_token_only: give the HQ token's mask alone and not the sum with SAM's.
    """

    mask_decoder: MaskDecoderHQ  # pyright: ignore[reportIncompatibleVariableOverride]
    hq_token_only = False

    @property
    def frame_size(self) -> int:
        """S, pixels a side."""
        return self.image_encoder.img_size

    @property
    def channels(self) -> int:
        """Of the embedding."""
        return self.mask_decoder.transformer_dim

    def normalize(self, images: Tensor) -> Tensor:
        """See `Segmenter`."""
        return normalized(images, self.frame_size)

    def encode(self, frames: Tensor) -> Embedded:
        """Embed frames (B, 3, S, S), without gradients: `early` is (B, C, s, s), for TinyViT too."""
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
        """Mask prompted objects; "sam" and "hq" of `extra` are the two tokens' logits (P, 4s, 4s)."""
        parts = [(rows, self._decoded(embedded, group)) for rows, group in prompted.by_click_count()]
        order = torch.cat([rows for rows, _ in parts]).argsort()
        sam, hq, scores = (
            torch.cat([getattr(decoded, name) for _, decoded in parts])[order] for name in ("sam", "hq", "scores")
        )
        logits = hq if self.hq_token_only else sam + hq
        return Segmented(logits=logits, scores=scores, extra={"sam": sam, "hq": hq})

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What HQ-SAM adds to SAM."""
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
    """What stands for a mask prompt where there is none, (1, d, s, s)."""
    return encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(-1, -1, *encoder.image_embedding_size)


def freeze_sam(sam: Sam) -> None:
    """Leave gradients to what HQ-SAM adds to SAM."""
    for name, parameter in sam.named_parameters():
        parameter.requires_grad_(name.removeprefix("mask_decoder.").split(".")[0] in HQ_PARTS)


def load_sam(sam: Sam, weights: Mapping[str, Tensor], *, where: object) -> LoadReport:
    """Copy published weights of HQ-SAM, SAM or MobileSAM; of the latter two what HQ-SAM adds stays new.

    For frames of another size than 1024 a ViT's tables of positions are interpolated.

    Args:
        sam: of the weights' backbone.
        weights: by the published names (`store.published_weights.read_published`).
        where: what error messages name.

    Returns:
        what was loaded; `missing` names what is new.

    Raises:
        CheckpointError: weights of another backbone, or that lack something of SAM or a part of what HQ-SAM adds.
    """
    wanted = sam.state_dict()
    weights = {n: fitted_positions(n, t, wanted[n].shape) if n in wanted else t for n, t in weights.items()}
    expected, found = (_backbone(names) for names in (wanted, weights))
    if expected != found:
        raise CheckpointError(
            "These weights are of another backbone",
            where=where,
            expected=f"weights of SAM with {expected}",
            found=found if found.startswith("no SAM") else f"weights of SAM with {found}",
            remedy="Take the model of the weights' backbone from sam_model_registry",
        )
    added = [name for name in wanted if name.removeprefix("mask_decoder.").split(".")[0] in HQ_PARTS]
    missing = [name for name in wanted if name not in weights]
    wrong = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    lacking = missing if set(missing) != set(added) else []
    if lacking or wrong:
        raise CheckpointError(
            "These weights do not fit HQ-SAM",
            where=where,
            found=f"{len(lacking)} missing, {len(wrong)} of another shape ({', '.join([*lacking, *wrong][:5])} ...)",
            remedy="Take a published file of HQ-SAM, SAM or MobileSAM",
        )
    sam.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)
    sam.load_report = LoadReport(
        loaded=tuple(name for name in wanted if name in weights),
        missing=tuple(missing),
        unexpected=tuple(name for name in weights if name not in wanted),
    )
    strange = [n for n in sam.load_report.unexpected if not n.removeprefix("image_encoder.").startswith(CLASSIFIER)]
    if strange:
        logger.warning("%s has %d tensors that HQ-SAM has no place for: %s", where, len(strange), strange[:5])
    return sam.load_report


def _backbone(weights: Mapping[str, Tensor]) -> str:
    """Name the image encoder by its first tensors."""
    if "image_encoder.patch_embed.seq.0.c.weight" in weights:
        return ENCODERS["tiny"]
    stem = weights.get("image_encoder.patch_embed.proj.weight")
    if stem is None:
        return f"no SAM's ({len(weights)} tensors: {', '.join(list(weights)[:3])} ...)"
    return ENCODERS.get(len(stem), f"a ViT of {len(stem)} channels")
