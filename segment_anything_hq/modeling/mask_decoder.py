"""SAM's mask decoder from `segment_anything`, with the call signature of HQ-SAM's."""

from __future__ import annotations

from segment_anything.modeling.mask_decoder import MLP, LayerNorm2d
from segment_anything.modeling.mask_decoder import MaskDecoder as SamMaskDecoder
from torch import Tensor

__all__ = ["MLP", "LayerNorm2d", "MaskDecoder"]


class MaskDecoder(SamMaskDecoder):
    """SAM's own mask decoder; it accepts and ignores HQ-SAM's two additional arguments."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        hq_token_only: bool,  # noqa: ARG002
        interm_embeddings: list[Tensor] | Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """See `segment_anything.modeling.MaskDecoder`."""
        return super().forward(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output
        )
