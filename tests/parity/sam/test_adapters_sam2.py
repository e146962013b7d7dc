"""Adapted SAM 2 against the official one: equal bit for bit before training, other after, and itself again without."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_base import SAM2Base
from torch import nn
from torch.utils.checkpoint import checkpoint

from rfmedsam2.nn.adapters import Adapter, ChannelAdapter, CNNAdapter, DWConvAdapter
from rfmedsam2.nn.sam2.adapted import adapters_of, inject, remove
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.unet import UNet
from rfmedsam2.records.model import AdapterConfig
from rfmedsam2.records.plan import Plan

SIZE, CHANNELS, MEMORY = 64, 64, 16
SIDE = SIZE // 16
PLANS = Path(__file__).parents[3] / "plans"


def official(*, hiera: dict, channels: int, memory: int, size: int, layers: int, mlp: int) -> SAM2Base:
    """SAM 2.1 of the official classes with the official flags, dropout off."""
    trunk = Hiera(**hiera)
    sine = partial(PositionEmbeddingSine, normalize=True, warmup_cache=False)
    neck = FpnNeck(
        position_encoding=sine(channels),
        d_model=channels,
        backbone_channel_list=trunk.channel_list,
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    attention = partial(RoPEAttention, embedding_dim=channels, num_heads=1, feat_sizes=(size // 16, size // 16))
    layer = MemoryAttentionLayer(
        activation="relu",
        self_attention=attention(),
        cross_attention=attention(rope_k_repeat=True, kv_in_dim=memory),
        d_model=channels,
        dim_feedforward=mlp,
        dropout=0.0,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
    )
    return SAM2Base(
        image_encoder=ImageEncoder(trunk, neck, scalp=1),
        memory_attention=MemoryAttention(channels, True, layer, layers),
        memory_encoder=MemoryEncoder(
            memory,
            MaskDownSampler(channels, kernel_size=3, stride=2, padding=1),
            Fuser(CXBlock(channels), 2),
            sine(memory),
            in_dim=channels,
        ),
        image_size=size,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        use_obj_ptrs_in_encoder=True,
        proj_tpos_enc_in_obj_ptrs=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        iou_prediction_use_sigmoid=True,
        use_mlp_for_obj_ptr_proj=True,
        no_obj_embed_spatial=True,
    )


@pytest.fixture
def base() -> SAM2Base:
    torch.manual_seed(0)
    hiera = {"embed_dim": 16, "num_heads": 1, "stages": (1, 2, 3, 1), "global_att_blocks": (4,)}
    hiera |= {"window_spec": (8, 4, 4, 2), "window_pos_embed_bkg_spatial_size": (7, 7)}
    built = official(hiera=hiera, channels=CHANNELS, memory=MEMORY, size=SIZE, layers=2, mlp=96).eval()
    for parameter in built.parameters():  # biases and layer scales of zero would hide a missing term
        parameter.data += 0.05 * torch.randn_like(parameter)
    return built


def image_encoder(base: SAM2Base) -> list[torch.Tensor]:
    out = base.forward_image(torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    return [out["vision_features"], *out["backbone_fpn"], *out["vision_pos_enc"]]


def mask_decoder(base: SAM2Base) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    box = torch.tensor([[[3.0, 5.0], [40.0, 50.0]]]).expand(2, -1, -1)
    fine = torch.randn(2, CHANNELS // 8, SIDE * 4, SIDE * 4, generator=g)
    middle = torch.randn(2, CHANNELS // 4, SIDE * 2, SIDE * 2, generator=g)
    outputs = base._forward_sam_heads(
        torch.randn(2, CHANNELS, SIDE, SIDE, generator=g),
        point_inputs={"point_coords": box, "point_labels": torch.tensor([[2, 3]]).expand(2, -1)},
        high_res_features=[fine, middle],
    )
    return list(outputs)


def memory_encoder(base: SAM2Base) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    features = torch.randn(2, CHANNELS, SIDE, SIDE, generator=g)
    out = base.memory_encoder(features, torch.randn(2, 1, SIZE, SIZE, generator=g))
    return [out["vision_features"], *out["vision_pos_enc"]]


def memory_attention(base: SAM2Base) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    tokens, pointers = SIDE**2, 4
    current = torch.randn(tokens, 2, CHANNELS, generator=g)
    memory = torch.randn(2 * tokens + pointers, 2, MEMORY, generator=g)
    out = base.memory_attention(
        curr=[current],
        curr_pos=[torch.randn(current.shape, generator=g)],
        memory=memory,
        memory_pos=torch.randn(memory.shape, generator=g),
        num_obj_ptr_tokens=pointers,
    )
    return [out]


PARTS = {f.__name__: f for f in (image_encoder, mask_decoder, memory_encoder, memory_attention)}
CONFIGS = {
    "dwconv": AdapterConfig(),
    "plain": AdapterConfig(blocks="plain"),
    "blocks_only": AdapterConfig(convolutions="none"),
    "convolutions_only": AdapterConfig(blocks="none"),
    "frozen_encoder": AdapterConfig(encoder=False),
}


def perturb(base: SAM2Base) -> None:
    torch.manual_seed(5)
    for adapter in adapters_of(base).values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@torch.no_grad()
def test_untrained_adapters_change_no_bit(base, part, config):
    before = part(base)
    inject(base, config)
    assert all(torch.equal(a, b) for a, b in zip(before, part(base), strict=True))


@pytest.mark.parametrize("kind", ["dwconv", "plain"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@torch.no_grad()
def test_trained_adapters_change_every_part(base, part, kind):
    before = part(base)[0]
    inject(base, CONFIGS[kind])
    perturb(base)
    assert not torch.allclose(before, part(base)[0], atol=1e-3)


@torch.no_grad()
def test_removing_gives_back_the_official_modules(base):
    modules, keys = dict(base.named_modules()), list(base.state_dict())
    before = [part(base)[0] for part in PARTS.values()]
    inject(base, AdapterConfig())
    perturb(base)
    remove(base)
    assert list(base.state_dict()) == keys
    assert dict(base.named_modules()) == modules
    assert adapters_of(base) == {}
    assert all(torch.equal(a, part(base)[0]) for a, part in zip(before, PARTS.values(), strict=True))


def test_adapters_are_listed_by_readable_names_at_the_papers_sites(base):
    inject(base, AdapterConfig())
    kinds = {name: type(adapter) for name, adapter in adapters_of(base).items()}
    assert len(kinds) == 7 * 2 + 3 + 2 * 4 + 2 + 2 + 2 * 3
    expected = {
        "image_encoder.trunk.blocks.6.after_attention": DWConvAdapter,
        "image_encoder.neck.levels.stride_16": CNNAdapter,
        "sam_mask_decoder.transformer.layers.1.after_token_to_image": Adapter,
        "sam_mask_decoder.transformer.layers.1.after_image_to_token": DWConvAdapter,
        "sam_mask_decoder.output_upscaling.3.adapter": CNNAdapter,
        "memory_encoder.mask_downsampler.adapter": CNNAdapter,
        "memory_attention.layers.0.after_cross": DWConvAdapter,
    }
    assert expected.items() <= kinds.items()
    assert not any("stride_32" in name for name in kinds)


@pytest.mark.parametrize(
    ("config", "absent"),
    [
        (AdapterConfig(blocks="none", convolutions="none"), ""),
        (AdapterConfig(encoder=False), "image_encoder"),
        (AdapterConfig(convolutions="none"), "memory_encoder"),
        (AdapterConfig(blocks="none"), "memory_attention"),
    ],
)
def test_what_the_record_leaves_out_gets_none(base, config, absent):
    inject(base, config)
    assert not any(name.startswith(absent) for name in adapters_of(base))


def test_the_plain_variant_has_no_depthwise_blocks(base):
    inject(base, AdapterConfig(blocks="plain", convolutions="none"))
    assert {type(adapter) for adapter in adapters_of(base).values()} == {Adapter}


def test_adapters_are_put_in_once(base):
    inject(base, AdapterConfig())
    with pytest.raises(ValueError, match="already"):
        inject(base, AdapterConfig())


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_all_adapters_learn_through_checkpointing_while_sam2_is_frozen(base, autocast):
    base.requires_grad_(False)
    inject(base, AdapterConfig())
    perturb(base)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        parts = [checkpoint(part, base, use_reentrant=False) for part in PARTS.values()]
    sum(t.float().square().mean() for outputs in parts for t in outputs if t.requires_grad).backward()
    learned = {name for name, p in base.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learned == {f"{a}.{name}" for a, m in adapters_of(base).items() for name, _ in m.named_parameters()}


@pytest.fixture(params=["mobile_sam", "lite_medsam"])
def light(request) -> SAM2Base:
    torch.manual_seed(0)
    built = build_base(request.param, frame_size=SIZE).eval()
    for parameter in built.parameters():  # the decoder's projections of the finer levels start at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    return built


@torch.no_grad()
def test_a_tiny_vit_encoder_is_adapted_from_its_own_outputs_and_given_back(light):
    before, keys = image_encoder(light), list(light.state_dict())
    inject(light, AdapterConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, image_encoder(light), strict=True))
    perturb(light)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(before[:4], image_encoder(light)[:4], strict=True))
    remove(light)
    assert list(light.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(before, image_encoder(light), strict=True))


def test_all_adapters_of_a_tiny_vit_encoder_learn(light):
    light.requires_grad_(False)
    inject(light, AdapterConfig())
    perturb(light)
    outputs = checkpoint(image_encoder, light, use_reentrant=False)
    sum(t.square().mean() for t in outputs if t.requires_grad).backward()
    adapters = {n: a for n, a in adapters_of(light).items() if n.startswith("image_encoder")}
    assert len(adapters) == 10 * 2 + 1 + 3
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for a in adapters.values() for p in a.parameters())
    assert light.image_encoder.neck.d_model == 256


def test_nothing_goes_into_a_tiny_vit_encoder_that_stays_frozen(light):
    inject(light, AdapterConfig(encoder=False))
    assert not any(name.startswith("image_encoder") for name in adapters_of(light))


def test_table_8_parameters_of_sam2_large_adapters_and_unet():
    with torch.device("meta"):
        base = build_base("sam2_large", frame_size=256)
        sam2 = parameters(base)
        inject(base, AdapterConfig())
        channel_adapter = ChannelAdapter(1, AdapterConfig().channel_hidden)
        plan = Plan.model_validate_json((PLANS / "btcv_unet.json").read_text())
        unet = UNet(plan.stages["3d_fullres"].model, channels=1, outputs=14)
    adapters = sum(parameters(adapter) for adapter in adapters_of(base).values())
    assert parameters(base) == sam2 + adapters
    assert round(sam2 / 1e6, 1) == 224.4
    assert adapters + parameters(channel_adapter) == pytest.approx(19e6, rel=0.05)  # 18.87 M
    assert round(parameters(unet) / 1e6) in (45, 46)  # 44.96 M


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
