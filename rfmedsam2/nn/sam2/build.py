"""Building SAM 2 from the official modules of the `sam2` package, without its configuration files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.transformer import RoPEAttention, TwoWayTransformer
from sam2.modeling.sam2_base import SAM2Base
from torch import nn
from torch.overrides import TorchFunctionMode

from rfmedsam2.choices import Backbone
from rfmedsam2.errors import PlanError
from rfmedsam2.nn.sam2.positions import SinePositions
from rfmedsam2.nn.sam2.sizes import HieraSizes, Sizes, sizes_of
from rfmedsam2.nn.sam2.tiny_vit import build_tiny_vit_encoder
from rfmedsam2.records.model import LARGEST_FRAME

STRIDE = 16
"""Stride of the image embedding in pixels."""
SAM_DECODER_WIDTH = 2048
"""Hidden width of the mask decoder's MLPs as built by SAM2Base."""


class Base(SAM2Base):
    """SAM2Base with the attributes that determine how it is used.

    Attributes:
        residual_memory: whether the output of memory attention is added to the embedding (it starts at zero).
        padding_point: whether an empty point follows the box prompt (SAM 2 was trained with one, SAM without).
        resizes_frames: whether the image encoder accepts frames of any size.
    """

    residual_memory: bool = False
    padding_point: bool = True
    resizes_frames: bool = False


def build_base(
    backbone: Backbone,
    *,
    frame_size: int,
    fitted_windows: bool = False,
    object_scores: bool = True,
    encoder_size: int | None = None,
    memory_layers: int | None = None,
    memory_width: int | None = None,
) -> Base:
    """Build SAM 2 with freshly initialized weights.

    For the four official sizes, names and shapes of parameters are those of the official SAM 2.1 models. There is no
    dropout; in the official models only memory attention has it.

    Args:
        backbone: the backbone.
        frame_size: side length of the frames in pixels, a multiple of 32.
        fitted_windows: see `RFMedSam2Config.fitted_windows`.
        object_scores: for backbones with SAM's decoder: add SAM 2's token and head that predict whether the object is
            present. Without them it is exactly SAM's decoder; SAM 2's own decoder always has them.
        encoder_size: see `RFMedSam2Config.encoder_size`.
        memory_layers: layers of memory attention; None: the backbone's.
        memory_width: hidden width of their MLPs; None: the backbone's.

    Raises:
        PlanError: the frame size is not a multiple of 32, or too small for the backbone.
    """
    if not 32 <= frame_size <= LARGEST_FRAME or frame_size % 32:
        expected = f"a multiple of 32 pixels, at most {LARGEST_FRAME}"
        raise PlanError("Invalid frame size for SAM 2", expected=expected, found=frame_size)
    sizes = sizes_of(backbone, fitted_windows=fitted_windows, memory_layers=memory_layers, memory_width=memory_width)
    with _TablesOnCpu():
        base = Base(
            image_encoder=_image_encoder(sizes, frame_size, encoder_size),
            memory_attention=_memory_attention(sizes, frame_size // STRIDE),
            memory_encoder=_memory_encoder(sizes),
            **_flags(frame_size, sizes, object_scores=object_scores or not sizes.from_sam),
        )
        if sizes.decoder_width != SAM_DECODER_WIDTH:
            base.sam_mask_decoder = _mask_decoder(sizes)
    base.residual_memory = sizes.residual_memory
    base.padding_point = not sizes.from_sam
    base.resizes_frames = sizes.scaling == "unit"
    _start_at_zero(base, sizes)
    return base


def _flags(frame_size: int, sizes: Sizes, *, object_scores: bool) -> dict[str, Any]:
    """Settings of SAM2Base as in the official SAM 2.1 configurations."""
    return {
        "num_maskmem": 7,
        "image_size": frame_size,
        "sigmoid_scale_for_mem_enc": 20.0,
        "sigmoid_bias_for_mem_enc": -10.0,
        "use_mask_input_as_output_without_sam": True,
        "directly_add_no_mem_embed": True,
        "no_obj_embed_spatial": object_scores,
        "use_high_res_features_in_sam": True,
        "multimask_output_in_sam": True,
        "iou_prediction_use_sigmoid": not sizes.from_sam,
        "use_obj_ptrs_in_encoder": True,
        "add_tpos_enc_to_obj_ptrs": True,
        "proj_tpos_enc_in_obj_ptrs": True,
        "use_signed_tpos_enc_to_obj_ptrs": True,
        "only_obj_ptrs_in_the_past_for_eval": True,
        "pred_obj_scores": object_scores,
        "pred_obj_scores_mlp": object_scores,
        "fixed_no_obj_ptr": object_scores,
        "multimask_output_for_tracking": True,
        "use_multimask_token_for_obj_ptr": True,
        "multimask_min_pt_num": 0,
        "multimask_max_pt_num": 1,
        "use_mlp_for_obj_ptr_proj": True,
    }


def _image_encoder(sizes: Sizes, frame_size: int, encoder_size: int | None) -> nn.Module:
    if sizes.hiera is None:
        return build_tiny_vit_encoder(frame_size, scaling=sizes.scaling, seen_size=encoder_size)
    trunk = _hiera(sizes.hiera)
    neck = FpnNeck(
        position_encoding=SinePositions(sizes.channels),
        d_model=sizes.channels,
        backbone_channel_list=sizes.hiera.pyramid,
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return ImageEncoder(trunk=trunk, neck=neck, scalp=1)


def _hiera(sizes: HieraSizes) -> Hiera:
    return Hiera(
        embed_dim=sizes.channels,
        num_heads=sizes.heads,
        stages=sizes.stages,
        global_att_blocks=sizes.global_blocks,
        window_pos_embed_bkg_spatial_size=(sizes.background, sizes.background),
        window_spec=sizes.windows,
    )


def _memory_attention(sizes: Sizes, side: int) -> MemoryAttention:
    table = [side, side]
    common = {"embedding_dim": sizes.channels, "num_heads": 1, "downsample_rate": 1, "feat_sizes": table}
    layer = MemoryAttentionLayer(
        activation="relu",
        cross_attention=RoPEAttention(**common, rope_k_repeat=True, kv_in_dim=sizes.memory_channels),
        d_model=sizes.channels,
        dim_feedforward=sizes.memory_width,
        dropout=0.0,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=RoPEAttention(**common),
    )
    return MemoryAttention(d_model=sizes.channels, pos_enc_at_input=True, layer=layer, num_layers=sizes.memory_layers)


def _memory_encoder(sizes: Sizes) -> MemoryEncoder:
    return MemoryEncoder(
        out_dim=sizes.memory_channels,
        mask_downsampler=MaskDownSampler(embed_dim=sizes.channels, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(CXBlock(dim=sizes.channels, kernel_size=7, padding=3), num_layers=2),
        position_encoding=SinePositions(sizes.memory_channels),
        in_dim=sizes.channels,
    )


def _mask_decoder(sizes: Sizes) -> MaskDecoder:
    """Build SAM 2's mask decoder with other widths than SAM2Base does."""
    transformer = TwoWayTransformer(depth=2, embedding_dim=sizes.channels, num_heads=8, mlp_dim=sizes.decoder_width)
    return MaskDecoder(
        transformer_dim=sizes.channels,
        transformer=transformer,
        iou_head_hidden_dim=sizes.quality_width,
        use_high_res_features=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
    )


def _start_at_zero(base: Base, sizes: Sizes) -> None:
    """Zero-initialize parts without pre-trained weights, so that they do not change the pre-trained parts at first."""
    started: list[nn.Module] = []
    if sizes.residual_memory:
        started.append(base.memory_attention.norm)
        nn.init.zeros_(base.no_mem_embed)
    if sizes.from_sam:
        started += [base.sam_mask_decoder.conv_s0, base.sam_mask_decoder.conv_s1]
    for module in started:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


class _TablesOnCpu(TorchFunctionMode):
    """Creates numbers that official constructors compute with (rotary tables, drop rates) on the CPU, not on "meta"."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.linspace):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)
