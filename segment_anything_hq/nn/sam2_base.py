"""SAM 2 on images as a segmenter: tiny, small, base+ and large, with prompts of several images in one batch.

The modules are the `sam2` package's (`rfmedsam2.nn.sam2.build.build_base`), run as its image predictor runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from rfmedsam2.choices import Backbone
from rfmedsam2.nn.loading import LoadReport
from rfmedsam2.nn.sam import Trained, is_ambiguous
from rfmedsam2.nn.sam2.build import Base, build_base
from rfmedsam2.nn.sam2.weights import load_sam2
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented, normalized

Sam2Backbone = Literal["hiera_t", "hiera_s", "hiera_b+", "hiera_l", "hiera_nano"]
SIZES: dict[Sam2Backbone, Backbone] = {
    "hiera_t": "sam2_tiny",
    "hiera_s": "sam2_small",
    "hiera_b+": "sam2_base_plus",
    "hiera_l": "sam2_large",
    "hiera_nano": "nano",
}
"""Backbone names as in the published files; nano is for tests."""
PUBLISHED_SIZE = 1024
BOX_LABELS = (2, 3)
"""Point labels of a box's corners, which SAM 2 encodes as points."""


class Sam2Segmenter(nn.Module):
    """SAM 2 on batches of frames and prompts.

    Args:
        backbone: size of SAM 2.
        frame_size: S, a multiple of 32.
        best_of_three: see `rfmedsam2.nn.sam.SamSegmenter`.
        trained: "decoder": train the mask decoder except for the convolutions that `encode` uses, so that cached
            embeddings stay valid; "none": train nothing.

    Attributes:
        base: the official modules with published parameter names, including the memory modules for videos.

    Raises:
        PlanError: the frame size is not a multiple of 32.
    """

    def __init__(
        self,
        backbone: Sam2Backbone,
        *,
        frame_size: int = PUBLISHED_SIZE,
        best_of_three: bool = False,
        trained: Trained = "none",
    ) -> None:
        super().__init__()
        self.backbone: Sam2Backbone = backbone
        self.frame_size = frame_size
        self.best_of_three = best_of_three
        self.trained: Trained = trained
        self.base: Base = build_base(SIZES[backbone], frame_size=frame_size)
        self.channels: int = self.base.hidden_dim
        fall_back_when_unstable(self.base)
        self.requires_grad_(False)
        decoder = self.base.sam_mask_decoder
        decoder.requires_grad_(trained == "decoder")
        for convolution in (decoder.conv_s0, decoder.conv_s1):  # part of `encode`: cached embeddings stay valid
            convolution.requires_grad_(False)

    def normalize(self, images: Tensor) -> Tensor:
        """Frames (B, 3, S, S) of images (B, 3, h, w) with values 0 to 255."""
        return normalized(images, self.frame_size)

    def encode(self, frames: Tensor) -> Embedded:
        """Embed frames (B, 3, S, S); `early` is the stride-4 level before the decoder's convolution."""
        fine, middle, embedding = self.base.image_encoder(frames)["backbone_fpn"]
        decoder = self.base.sam_mask_decoder
        return Embedded(
            embedding=embedding + self.base.no_mem_embed.reshape(1, -1, 1, 1),
            fine=decoder.conv_s0(fine),
            middle=decoder.conv_s1(middle),
            early=fine,
            frames=frames,
        )

    def segment(self, embedded: Embedded, prompted: PromptBatch, *, previous: Segmented | None = None) -> Segmented:  # noqa: ARG002
        """Segment the prompted objects; a previous mask is used only if given as `prompted.masks`."""
        masks = embedded.embedding.new_empty(len(prompted), *(2 * [self.frame_size // 4]), dtype=torch.float32)
        scores = masks.new_empty(len(prompted))
        for rows, group in prompted.by_click_count():
            logits, quality = self._decoded(embedded, group)
            masks = masks.index_copy(0, rows, logits.float())
            scores = scores.index_copy(0, rows, quality.float())
        return Segmented(logits=masks, scores=scores)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require gradients, with their names: those of the mask decoder, or none."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def _decoded(self, embedded: Embedded, prompted: PromptBatch) -> tuple[Tensor, Tensor]:
        """Masks (p, 4s, 4s) and scores (p,) for prompts with the same number of points."""
        sparse, dense, positions = prompt_embeddings(self.base, prompted)
        masks, quality, _, _ = self.base.sam_mask_decoder(
            image_embeddings=embedded.embedding[prompted.images],
            image_pe=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=self.best_of_three and is_ambiguous(prompted),
            repeat_image=False,
            high_res_features=finer_levels(embedded, prompted.images),
        )
        best = quality.argmax(1)
        row = torch.arange(len(masks), device=masks.device)
        return masks[row, best], quality[row, best]


def finer_levels(embedded: Embedded, images: Tensor) -> list[Tensor]:
    """Levels of strides 4 and 8 for the decoder, one row per prompt, or a single row if there is one image."""
    assert embedded.fine is not None
    assert embedded.middle is not None
    levels = [embedded.fine, embedded.middle]
    return levels if len(embedded.fine) == 1 else [level[images] for level in levels]


def prompt_embeddings(base: Base, prompted: PromptBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse (p, n, C) and dense (p, C, s, s) prompt embeddings, and dense positions (1, C, s, s).

    All prompts have the same number of points. A box is encoded as two points before the others, as in the official
    predictor. Computed in float32: half precision displaces points by up to two pixels of 1024.
    """
    points, labels = prompted.points, prompted.point_labels
    if prompted.boxes is not None:
        corners = prompted.boxes.reshape(-1, 2, 2)
        kinds = torch.tensor(BOX_LABELS, device=corners.device).expand(len(corners), -1)
        points = corners if points is None else torch.cat([corners, points.to(corners.dtype)], 1)
        labels = kinds if labels is None else torch.cat([kinds, labels.to(kinds.dtype)], 1)
    encoder = base.sam_prompt_encoder
    with torch.autocast(prompted.images.device.type, enabled=False):
        sparse, dense = encoder(
            points=None if points is None or labels is None else (points.float(), labels),
            boxes=None,
            masks=None if prompted.masks is None else prompted.masks[:, None].float(),
        )
        positions = encoder.get_dense_pe()
    return sparse.expand(len(prompted), -1, -1), dense.expand(len(prompted), -1, -1, -1), positions


def build_sam2(
    weights: Mapping[str, Tensor],
    *,
    backbone: Sam2Backbone,
    where: object,
    frame_size: int = PUBLISHED_SIZE,
    trained: Trained = "none",
) -> Sam2Segmenter:
    """Build SAM 2 with published weights (sam2.1_hiera_*, sam2_hiera_*), in evaluation mode.

    Raises:
        CheckpointError: the weights are of another model or size, or incomplete.
    """
    sam = Sam2Segmenter(backbone, frame_size=frame_size, trained=trained)
    load_weights(sam, weights, where=where)
    return sam.eval()


def load_weights(sam: Sam2Segmenter, weights: Mapping[str, Tensor], *, where: object) -> LoadReport:
    """Load published weights into a SAM 2 of the same size; see `rfmedsam2.nn.sam2.weights.load_sam2`."""
    return load_sam2(sam.base, weights, where=where)


def fall_back_when_unstable(base: Base) -> None:
    """Use the best of three masks when the single one is unstable, as the published image predictor does."""
    decoder = base.sam_mask_decoder
    decoder.dynamic_multimask_via_stability = True
    decoder.dynamic_multimask_stability_delta = 0.05
    decoder.dynamic_multimask_stability_thresh = 0.98
