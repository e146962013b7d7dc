"""SAM2Refiner: SAM 2, frozen, with three learned modules around its mask decoder.

Localization Augment renews the image's embedding, Prompt Retargeting renews it again for every prompt, SAM 2's mask
decoder reads a mask from it, Mask Refinement makes that a mask of the frame's size ("Toward Fine-grained Interactive
Segmentation in Images and Videos", Yao et al. 2025). About 12 M parameters are learned on Hiera-L.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rfmedsam2.nn.sam import is_ambiguous
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented
from rfmedsam2.system.private_apis import private
from segment_anything_hq.nn.localization_augment import LocalizationAugment, grid_positions, stitched, sub_images
from segment_anything_hq.nn.mask_refinement import Levels, MaskFeatures, MaskRefinement, Views
from segment_anything_hq.nn.prompt_retargeting import PromptRetargeting
from segment_anything_hq.nn.sam2_base import Sam2Segmenter, prompt_embeddings

QUARTERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinerConfig:
    """Sizes of the learned modules; the paper gives their sum alone.

    Attributes:
        layers: of Localization Augment.
        reduction: of the embedding's channels, where there is attention.
        widening: hidden features over channels, of Localization Augment's MLPs.
        patch: positions a side of the patches of Prompt Retargeting.
        depth: residual blocks that Mask Refinement passes the embedding through.
    """

    layers: int = 4
    reduction: int = 2
    widening: int = 8
    patch: int = 9
    depth: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinedEmbedded(Embedded):
    """Embedded images as the refiner has them: `embedding` is renewed, `frames` and `early` are left out.

    Attributes:
        thin: (B, C/2, s, s) the embedding for Prompt Retargeting.
        levels: features of the encoder for Mask Refinement.
    """

    thin: Tensor
    levels: Levels

    def at(self, index: Tensor) -> RefinedEmbedded:
        """Rows of the images (P,) named, repeated where an image is named twice."""
        assert self.fine is not None
        assert self.middle is not None
        one, two, four, eight = (level[index] for level in self.levels)
        return RefinedEmbedded(
            embedding=self.embedding[index],
            fine=self.fine[index],
            middle=self.middle[index],
            thin=self.thin[index],
            levels=(one, two, four, eight),
        )


class SAM2Refiner(nn.Module):
    """SAM 2 with Localization Augment, Prompt Retargeting and Mask Refinement.

    Untrained it gives SAM 2's masks, interpolated to the frame's size. SAM 2 is frozen and stays in evaluation mode.

    Args:
        sam: the base, which is used and not copied.
        config: sizes of the learned modules.

    Attributes:
        prompts_at_once: more are masked one group after the other: a prompt takes some 100 MB at 1024 pixels.
    """

    prompts_at_once: int = 16

    def __init__(self, sam: Sam2Segmenter, config: RefinerConfig | None = None) -> None:
        super().__init__()
        config = config or RefinerConfig()
        self.sam = sam.requires_grad_(False).eval()
        self.config = config
        self.frame_size: int = sam.frame_size
        self.channels: int = sam.channels
        self.localization = LocalizationAugment(
            sam.channels, layers=config.layers, reduction=config.reduction, widening=config.widening
        )
        self.retargeting = PromptRetargeting(
            sam.channels, reduction=config.reduction, patch=config.patch, frame_size=sam.frame_size
        )
        self.refinement = MaskRefinement(sam.channels, depth=config.depth)

    def train(self, mode: bool = True) -> SAM2Refiner:
        """Switch what is trained alone: SAM 2 never drops paths."""
        super().train(mode)
        self.sam.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Frames (B, 3, S, S) of images (B, 3, h, w) of 0 to 255."""
        return self.sam.normalize(images)

    def encode(self, frames: Tensor) -> RefinedEmbedded:
        """Embed frames (B, 3, S, S): SAM 2's encoder sees 5 B of them."""
        return self.renewed(self.look(frames))

    @torch.no_grad()
    def look(self, frames: Tensor) -> Views:
        """The frozen part of `encode`, which may be kept: whole frames and quarters in one batch."""
        count = len(frames)
        seen = self.sam.encode(torch.cat([frames, sub_images(frames)]))
        assert seen.fine is not None
        assert seen.middle is not None
        whole, parts = zip(
            *(t.split([count, QUARTERS * count]) for t in (seen.embedding, seen.middle, seen.fine)), strict=True
        )
        local_embedding, local_middle, local_fine = (stitched(t) for t in parts)
        return Views(
            frames=frames,
            embedding=whole[0],
            middle=whole[1],
            fine=whole[2],
            local_embedding=local_embedding,
            local_middle=local_middle,
            local_fine=local_fine,
        )

    def renewed(self, views: Views) -> RefinedEmbedded:
        """The learned part of `encode`."""
        places, local_places = (self._places(t.shape[-1]) for t in (views.embedding, views.local_embedding))
        embedding = self.localization(views.embedding, views.local_embedding, places=places, local_places=local_places)
        return RefinedEmbedded(
            embedding=embedding,
            fine=views.fine,
            middle=views.middle,
            thin=self.retargeting.thinned(embedding),
            levels=self.refinement.hierarchy(views, embedding),
        )

    def segment(
        self,
        embedded: Embedded,
        prompted: PromptBatch,
        *,
        previous: Segmented | None = None,  # noqa: ARG002 - takes part only as prompted.masks
        conditioned: Tensor | None = None,
    ) -> Segmented:
        """Mask the prompted objects.

        Args:
            embedded: of `encode`.
            prompted: of P objects.
            previous: not used; give its logits as `prompted.masks`.
            conditioned: (P, C, s, s) in a video: what memory attention made of `embedded.embedding` (less SAM 2's
                no-memory embedding) for each object.

        Returns:
            `refined` (P, S, S), the decoder's own `logits`, and for SAM 2's memory in `extra`: `pointers` (P, C) and
            `object_scores` (P,).
        """
        assert isinstance(embedded, RefinedEmbedded), "embedded by another model"
        rows, made = [], []
        for group_rows, group in prompted.by_click_count():
            for part in torch.arange(len(group), device=group_rows.device).split(self.prompts_at_once):
                rows.append(group_rows[part])
                own = None if conditioned is None else conditioned[rows[-1]]
                made.append(self._segment(embedded, group.at(part), own))
        return _in_order(made, torch.cat(rows).argsort())

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the three modules."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def _segment(self, embedded: RefinedEmbedded, prompted: PromptBatch, conditioned: Tensor | None) -> Segmented:
        """Mask prompts with equally many points."""
        of = embedded.at(prompted.images)
        thin = of.thin if conditioned is None else self.retargeting.thinned(conditioned)
        embedding = self.retargeting(
            of.embedding if conditioned is None else conditioned,
            thin,
            prompted,
            places=self._places(thin.shape[-1]),
            encode=self._encoded,
        )
        features, decoded = self._decode(embedding, of, prompted)
        return Segmented(
            logits=decoded.logits,
            scores=decoded.scores,
            refined=self.refinement(features, of.levels),
            extra=decoded.extra,
        )

    def _decode(self, embedding: Tensor, of: RefinedEmbedded, prompted: PromptBatch) -> tuple[MaskFeatures, Segmented]:
        """SAM 2's `MaskDecoder.predict_masks` and `forward`, which keep the features that masks are read from."""
        decoder = self.sam.base.sam_mask_decoder
        sparse, dense, positions = prompt_embeddings(self.sam.base, prompted)
        unprompted = sparse.shape[1] == 0 and prompted.masks is None
        if unprompted:
            # a frame of a video without a prompt: two empty points, as the official video predictor has it
            sparse = self.sam.base.sam_prompt_encoder.not_a_point_embed.weight.expand(len(prompted), 2, -1)
        own = [decoder.iou_token.weight, decoder.mask_tokens.weight]
        if decoder.pred_obj_scores:
            own.insert(0, decoder.obj_score_token.weight)
        tokens = torch.cat([torch.cat(own).expand(len(prompted), -1, -1), sparse], 1)
        tokens, image = decoder.transformer(embedding + dense, positions.expand(len(prompted), -1, -1, -1), tokens)
        image = image.transpose(1, 2).unflatten(2, embedding.shape[2:])
        first, norm, activate, second, activate_again = decoder.output_upscaling
        upscaled = activate(norm(first(image) + of.middle))
        upscaled = activate_again(second(upscaled) + of.fine)

        at = int(decoder.pred_obj_scores)
        mask_tokens = tokens[:, at + 1 : at + 1 + decoder.num_mask_tokens]
        readers = [mlp(mask_tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        masks = torch.einsum("pkc,pchw->pkhw", torch.stack(readers, 1), upscaled)
        quality = decoder.iou_prediction_head(tokens[:, at])
        tracked = unprompted and private(self.sam.base, "_use_multimask", package="sam2")(False, None)
        ambiguous = tracked or (self.sam.best_of_three and is_ambiguous(prompted))
        if ambiguous:
            masks, quality = masks[:, 1:], quality[:, 1:]
        elif decoder.dynamic_multimask_via_stability:
            masks, quality = decoder._dynamic_multimask_via_stability(masks, quality)
        else:
            masks, quality = masks[:, :1], quality[:, :1]
        row, best = torch.arange(len(masks), device=masks.device), quality.argmax(1)
        logits = masks[row, best].float()
        pointer_token = mask_tokens[row, best + 1] if ambiguous else mask_tokens[:, 0]
        extra = {"pointers": self.sam.base.obj_ptr_proj(pointer_token)}
        if decoder.pred_obj_scores:
            extra["object_scores"] = decoder.pred_obj_score_head(tokens[:, 0])[:, 0].float()
        segmented = Segmented(logits=logits, scores=quality[row, best].float(), extra=extra)
        return MaskFeatures(image=image, upscaled=upscaled, logits=logits), segmented

    def _places(self, side: int) -> Tensor:
        """(side * side, C) positions of a map over the frame, encoded as the prompt encoder does."""
        device = self.sam.base.no_mem_embed.device
        return self._encoded(grid_positions(side, self.frame_size, device))

    @torch.no_grad()
    def _encoded(self, places: Tensor) -> Tensor:
        """(..., 2) XY in pixels -> (..., C), at full precision: half of it misplaces a point by pixels."""
        layer = self.sam.base.sam_prompt_encoder.pe_layer
        with torch.autocast(places.device.type, enabled=False):
            flat = layer.forward_with_coords(places.reshape(1, -1, 2), (self.frame_size, self.frame_size))
        return flat.reshape(*places.shape[:-1], -1)


def _in_order(parts: list[Segmented], order: Tensor) -> Segmented:
    """Rows of all parts, one after the other, in this order."""

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    return Segmented(
        logits=joined([part.logits for part in parts]),
        scores=joined([part.scores for part in parts]),
        refined=joined([part.final for part in parts]),
        extra={name: joined([part.extra[name] for part in parts]) for name in parts[0].extra},
    )
