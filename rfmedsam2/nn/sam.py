"""SAM for single pictures: MobileSAM, LiteMedSAM and the official ViT-B, L and H, told apart by their weights.

Prompt encoder, mask decoder and ViT are the `segment_anything` package's, TinyViT is ours (`sam2/tiny_vit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from rfmedsam2.errors import CheckpointError
from rfmedsam2.nn.sam2.tiny_vit import TinyVitEncoder

CHANNELS = 256
SIDE = 64
"""Positions a side of the embedding, of every kind."""
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_DEVIATION = (58.395, 57.12, 57.375)
TINY_STEM = "image_encoder.patch_embed.seq.0.c.weight"
VIT_POSITIONS = "image_encoder.pos_embed"

SamName = Literal["MobileSAM", "LiteMedSAM", "SAM ViT-B", "SAM ViT-L", "SAM ViT-H"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vit:
    """Sizes of an official image encoder."""

    name: SamName
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


VITS = {
    768: Vit(name="SAM ViT-B", depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    1024: Vit(name="SAM ViT-L", depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    1280: Vit(name="SAM ViT-H", depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
}
"""By channels: segment_anything/build_sam.py."""


class Sam(nn.Module):
    """A SAM on one picture at a time.

    Attributes:
        name: whose it is.
        frame_size: pixels of the longer side of the picture that the encoder sees, and the frame of its prompts.
    """

    def __init__(self, name: SamName, encoder: nn.Module, *, frame_size: int) -> None:
        super().__init__()
        self.name: SamName = name
        self.frame_size = frame_size
        self.image_encoder = encoder
        self.prompt_encoder = PromptEncoder(
            embed_dim=CHANNELS,
            image_embedding_size=(SIDE, SIDE),
            input_image_size=(frame_size, frame_size),
            mask_in_chans=16,
        )
        self.mask_decoder = MaskDecoder(
            transformer_dim=CHANNELS,
            transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, mlp_dim=2048, num_heads=8),
        )

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a picture of this size in the frame: the longer side fills it, the rest is padded."""
        scale = self.frame_size / max(size)
        height, width = (int(side * scale + 0.5) for side in size)
        return height, width

    def encode(self, picture: Tensor) -> Tensor:
        """Embedding (1, 256, 64, 64) of a picture (3, H, W) of 0 to 255, scaled as the weights were trained."""
        height, width = self.resized((picture.shape[1], picture.shape[2]))
        x = F.interpolate(picture[None], (height, width), mode="bilinear", align_corners=False, antialias=True)
        if self.name == "LiteMedSAM":
            x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-8)
        else:
            mean, deviation = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
            x = (x - mean) / deviation
        embedding = self.image_encoder(F.pad(x, (0, self.frame_size - width, 0, self.frame_size - height)))
        return embedding["vision_features"] if isinstance(embedding, dict) else embedding

    def decode(self, embedding: Tensor, points: Tensor, *, box: bool, size: tuple[int, int]) -> Tensor:
        """Mask logits of n prompts.

        A box asks for the single mask, a point for the best of three by predicted IoU, as SAM's authors advise.

        Args:
            embedding: (1, 256, 64, 64).
            points: in pixels of the frame: (n, 2, 2), the two corners of a box, or (n, 1, 2), a point of the object.
            box: which of the two.
            size: (H, W) of the picture.

        Returns:
            (n, H, W).
        """
        sparse, dense = (
            self.prompt_encoder(points=None, boxes=points.flatten(1), masks=None)
            if box
            else self.prompt_encoder(points=(points, points.new_ones(points.shape[:2])), boxes=None, masks=None)
        )
        masks, quality = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=not box,
        )
        best = masks[torch.arange(len(masks), device=masks.device), quality.argmax(1)][:, None].float()
        height, width = self.resized(size)
        framed = F.interpolate(best, (self.frame_size, self.frame_size), mode="bilinear", align_corners=False)
        return F.interpolate(framed[..., :height, :width], size, mode="bilinear", align_corners=False)[:, 0]


def build_sam(weights: Mapping[str, Tensor], *, where: object) -> Sam:
    """The SAM that these weights are of, loaded, in evaluation mode.

    Args:
        weights: by the published names (`store.published_weights.read_published`).
        where: what error messages name.

    Raises:
        CheckpointError: weights of no SAM that is known, or that lack something.
    """
    name = sam_name(weights)
    if name is None:
        raise CheckpointError(
            "These are weights of no SAM that is known",
            where=where,
            expected="mobile_sam.pt, lite_medsam.pth, sam_vit_b, sam_vit_l or sam_vit_h",
            found=f"{len(weights)} tensors ({', '.join(list(weights)[:3])} ...)",
            remedy="Give files of SAM 2 with --sam2" if any("trunk" in key for key in weights) else None,
        )
    sam = _untrained(name, weights)
    wanted = sam.state_dict()
    lacking = [key for key in wanted if key not in weights and "laterals" not in key]
    wrong = [key for key in wanted if key in weights and wanted[key].shape != weights[key].shape]
    if lacking or wrong:
        raise CheckpointError(
            f"These weights do not fit {name}",
            where=where,
            found=f"{len(lacking)} missing, {len(wrong)} of another shape ({', '.join([*lacking, *wrong][:5])} ...)",
            remedy="Take the published file",
        )
    sam.load_state_dict({key: weights[key] for key in wanted if key in weights}, strict=False)
    return sam.eval()


def sam_name(weights: Mapping[str, Tensor]) -> SamName | None:
    """Whose weights these are, by the image encoder's first tensors; None: no SAM's."""
    if TINY_STEM in weights:
        return "MobileSAM" if weights[TINY_STEM].shape[-1] == 3 else "LiteMedSAM"
    positions = weights.get(VIT_POSITIONS)
    vit = None if positions is None else VITS.get(positions.shape[-1])
    return None if vit is None else vit.name


def _untrained(name: SamName, weights: Mapping[str, Tensor]) -> Sam:
    if name == "MobileSAM":
        return Sam(name, TinyVitEncoder(frame_size=1024), frame_size=1024)
    if name == "LiteMedSAM":
        # the encoder counts a pixel of LiteMedSAM's as 4 x 4 of the frame
        return Sam(name, TinyVitEncoder(frame_size=1024, strided=False), frame_size=256)
    channels = weights[VIT_POSITIONS].shape[-1]
    vit = VITS[channels]
    encoder = ImageEncoderViT(
        depth=vit.depth,
        embed_dim=channels,
        img_size=1024,
        norm_layer=cast(type[nn.Module], partial(nn.LayerNorm, eps=1e-6)),
        num_heads=vit.heads,
        global_attn_indexes=vit.global_blocks,
        use_rel_pos=True,
        window_size=14,
        out_chans=CHANNELS,
    )
    return Sam(name, encoder, frame_size=1024)
