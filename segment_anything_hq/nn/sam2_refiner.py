"""SAM2Refiner: a frozen SAM 2 with three learned modules around its mask decoder.

Localization Augment updates the image's embedding, Prompt Retargeting updates it again for every prompt, SAM 2's mask
decoder predicts a mask from it, and Mask Refinement brings the mask to frame resolution ("Toward Fine-grained
Interactive Segmentation in Images and Videos", Yao et al. 2025). With Hiera-L, about 12 M parameters are learned.
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
    """Sizes of the learned modules; the paper reports only their total parameter count.

    Attributes:
        layers: number of layers of Localization Augment.
        reduction: factor by which attention reduces the embedding's channels.
        widening: hidden features of Localization Augment's MLPs, divided by the channels.
        patch: side of Prompt Retargeting's patches, in positions.
        depth: number of residual blocks of Mask Refinement on the embedding.
    """

    layers: int = 4
    reduction: int = 2
    widening: int = 8
    patch: int = 9
    depth: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinedEmbedded(Embedded):
    """The refiner's embedded images: `embedding` is updated; `frames` and `early` are None.

    Attributes:
        thin: (B, C/2, s, s) reduced embedding for Prompt Retargeting.
        levels: encoder features for Mask Refinement.
    """

    thin: Tensor
    levels: Levels

    def at(self, index: Tensor) -> RefinedEmbedded:
        """Select images by index (P,), with repetition."""
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

    Untrained, it returns SAM 2's masks interpolated to frame resolution. SAM 2 is frozen and stays in evaluation mode.

    Args:
        sam: the base model; not copied.
        config: sizes of the learned modules.

    Attributes:
        prompts_at_once: prompts per chunk, which limits memory: a prompt takes about 100 MB at 1024 pixels.
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
        """Set the mode of the learned modules; SAM 2 stays in evaluation mode."""
        super().train(mode)
        self.sam.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Frames (B, 3, S, S) of images (B, 3, h, w) with values 0 to 255."""
        return self.sam.normalize(images)

    def encode(self, frames: Tensor) -> RefinedEmbedded:
        """Embed frames (B, 3, S, S); SAM 2's encoder runs on 5 B images, the frames and their quarters."""
        return self.renewed(self.look(frames))

    @torch.no_grad()
    def look(self, frames: Tensor) -> Views:
        """Run the frozen part of `encode` on frames and quarters in one batch; its result may be cached."""
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
        """Run the learned part of `encode`."""
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
            previous: not used; pass its logits as `prompted.masks`.
            conditioned: in a video, (P, C, s, s): output of memory attention for each object, computed from
                `embedded.embedding` without SAM 2's no-memory embedding.

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
        """Parameters of the three learned modules, with their names."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def _segment(self, embedded: RefinedEmbedded, prompted: PromptBatch, conditioned: Tensor | None) -> Segmented:
        """Segment prompts with the same number of points."""
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
        """SAM 2's `MaskDecoder.predict_masks` and `forward`, returning the features of the masks as well."""
        decoder = self.sam.base.sam_mask_decoder
        sparse, dense, positions = prompt_embeddings(self.sam.base, prompted)
        unprompted = sparse.shape[1] == 0 and prompted.masks is None
        if unprompted:
            # a video frame without a prompt: two padding points, as in the official video predictor
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
        """(side * side, C) positions of a map over the frame, encoded as by the prompt encoder."""
        device = self.sam.base.no_mem_embed.device
        return self._encoded(grid_positions(side, self.frame_size, device))

    @torch.no_grad()
    def _encoded(self, places: Tensor) -> Tensor:
        """(..., 2) XY in pixels -> (..., C), in float32: half precision displaces points by pixels."""
        layer = self.sam.base.sam_prompt_encoder.pe_layer
        with torch.autocast(places.device.type, enabled=False):
            flat = layer.forward_with_coords(places.reshape(1, -1, 2), (self.frame_size, self.frame_size))
        return flat.reshape(*places.shape[:-1], -1)


def _in_order(parts: list[Segmented], order: Tensor) -> Segmented:
    """Concatenate the rows of all parts and reorder them."""

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    return Segmented(
        logits=joined([part.logits for part in parts]),
        scores=joined([part.scores for part in parts]),
        refined=joined([part.final for part in parts]),
        extra={name: joined([part.extra[name] for part in parts]) for name in parts[0].extra},
    )
