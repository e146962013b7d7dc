"""SAM 2 built from figures: every size, built without memory too, and what its starting values leave as it is."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.errors import PlanError
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import ObjectPrompts

pytestmark = pytest.mark.slow

BOXES = torch.tensor([[2.0, 3.0, 20.0, 30.0], [5.0, 5.0, 31.0, 31.0]])
LIGHT = ("mobile_sam", "lite_medsam")


def built(backbone="nano", frame_size=64, **options) -> Sam2:
    torch.manual_seed(0)
    return Sam2(build_base(backbone, frame_size=frame_size), **options).eval()


def all_steps(sam: Sam2) -> list[torch.Tensor]:
    frames = torch.randn(2, 3, sam.frame_size, sam.frame_size, generator=torch.Generator().manual_seed(1))
    features = sam.encode(frames)
    first = sam.decode(features, ObjectPrompts(boxes=BOXES))
    second = sam.decode(
        features, ObjectPrompts(boxes=BOXES, masks=first.masks.clamp(-20, 20)), embedding=features.embedding
    )
    maps = sam.encode_memory(features.embedding, first.masks, first.scores)
    return [first.masks, first.pointers, first.quality, second.masks, maps, sam.position(), sam.image_position()]


@pytest.mark.parametrize("frame_size", [32, 64, 96, 160])
@torch.no_grad()
def test_nano_takes_frames_of_every_multiple_of_32(frame_size):
    sam = built(frame_size=frame_size)
    masks, pointers, quality, again, maps, position, image_position = all_steps(sam)
    side = frame_size // 16
    assert sam.side == side
    assert masks.shape == again.shape == (2, 4 * side, 4 * side)
    assert pointers.shape == (2, sam.channels)
    assert quality.shape == (2,)
    assert maps.shape == (2, sam.memory_channels, side, side)
    assert position.shape == maps.shape[1:]
    assert image_position.shape == (sam.channels, side, side)


@pytest.mark.parametrize("frame_size", [0, 16, 240])
def test_other_frame_sizes_are_refused(frame_size):
    with pytest.raises(PlanError, match="a multiple of 32"):
        build_base("nano", frame_size=frame_size)


def test_nano_is_small():
    assert sum(p.numel() for p in build_base("nano", frame_size=64).parameters()) < 2e6


@pytest.mark.parametrize("frame_size", [512, 1024])
def test_large_frames_change_no_parameter(frame_size):
    with torch.device("meta"):
        shapes = [
            {name: p.shape for name, p in build_base("sam2_base_plus", frame_size=size).named_parameters()}
            for size in (256, frame_size)
        ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("fitted", [False, True])
def test_windows_are_the_published_ones_unless_fitted(fitted):
    with torch.device("meta"):
        base = build_base("sam2_tiny", frame_size=256, fitted_windows=fitted)
    sizes = [block.window_size for block in base.image_encoder.trunk.blocks]
    assert sizes == ([8, 8, 4, 4, 16, 0, 16, 0, 16, 0, 16, 8] if fitted else [8, 8, 4, 4, 14, 0, 14, 0, 14, 0, 14, 7])


@pytest.mark.parametrize("backbone", ["nano", "mobile_sam"])
@torch.no_grad()
def test_built_without_memory_and_given_weights_it_is_the_same(backbone):
    real = built(backbone, object_scores=True)
    expected = all_steps(real)
    with torch.device("meta"):
        empty = Sam2(build_base(backbone, frame_size=64), object_scores=True)
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(real.state_dict(), assign=True)
    for ours, theirs in zip(all_steps(empty.eval()), expected, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_rotary_tables_survive_building_without_memory():
    with torch.device("meta"):
        base = build_base("nano", frame_size=64)
    assert {layer.self_attn.freqs_cis.device.type for layer in base.memory_attention.layers} == {"cpu"}
    assert torch.equal(
        base.memory_attention.layers[0].self_attn.freqs_cis,
        build_base("nano", frame_size=64).memory_attention.layers[0].self_attn.freqs_cis,
    )


def test_every_step_can_be_trained_after_inference_mode():
    sam = built(object_scores=True).train()
    with torch.inference_mode():
        all_steps(sam)
    sum(result.square().sum() for result in all_steps(sam)).backward()
    assert sam.base.image_encoder.trunk.patch_embed.proj.weight.grad.abs().sum() > 0
    assert sam.base.memory_encoder.out_proj.weight.grad.abs().sum() > 0


def test_results_of_a_cell_do_not_depend_on_the_others():
    sam = built()
    frames = torch.randn(3, 3, 64, 64)
    masks = torch.randn(3, 16, 16)
    boxes = torch.tensor([[1.0, 1.0, 9.0, 9.0], [4.0, 8.0, 60.0, 50.0], [0.0, 0.0, 63.0, 63.0]])
    with torch.no_grad():
        features = sam.encode(frames)
        together = sam.decode(features, ObjectPrompts(boxes=boxes, masks=masks))
        alone = sam.decode(features.at(torch.tensor([1])), ObjectPrompts(boxes=boxes[1:2], masks=masks[1:2]))
    torch.testing.assert_close(together.masks[1:2], alone.masks, rtol=0, atol=1e-5)


@torch.no_grad()
def test_object_scores_empty_absent_cells_only_where_asked():
    sam = built(object_scores=True)
    head = sam.base.sam_mask_decoder.pred_obj_score_head.layers[-1]
    head.weight.zero_()
    head.bias.fill_(-1.0)
    features = sam.encode(torch.randn(2, 3, 64, 64))
    empty = sam.decode(features, ObjectPrompts(boxes=BOXES))
    assert (empty.masks == -1024).all()
    assert torch.equal(empty.pointers, sam.base.no_obj_ptr.expand(2, -1))
    masks = torch.randn(2, 16, 16)
    absent = sam.encode_memory(features.embedding, masks, empty.scores)
    present = sam.encode_memory(features.embedding, masks, -empty.scores)
    embedding = sam.base.no_obj_embed_spatial[..., None, None].expand_as(absent)
    torch.testing.assert_close(absent - present, embedding, rtol=0, atol=1e-5)

    sam.object_scores = False
    kept = sam.decode(features, ObjectPrompts(boxes=BOXES))
    assert torch.equal(kept.scores, empty.scores)
    assert (kept.masks != -1024).all()
    assert torch.equal(sam.encode_memory(features.embedding, masks, kept.scores), present)


@torch.no_grad()
def test_tokens_take_the_place_of_the_boxes_embeddings():
    sam = built()
    features = sam.encode(torch.randn(2, 3, 64, 64))
    corners = sam.base.sam_prompt_encoder(points=None, boxes=BOXES, masks=None)[0]
    by_tokens = sam.decode(features, ObjectPrompts(tokens=corners))
    assert torch.equal(by_tokens.masks, sam.decode(features, ObjectPrompts(boxes=BOXES)).masks)
    assert not torch.equal(by_tokens.masks, sam.decode(features, ObjectPrompts(tokens=corners + 1)).masks)


@torch.no_grad()
def test_boxes_keep_their_place_at_half_precision():
    sam = built()
    features = sam.encode(torch.randn(2, 3, 64, 64))
    sparse = sam._prompt_embeddings(ObjectPrompts(boxes=BOXES), 2)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sam._prompt_embeddings(ObjectPrompts(boxes=BOXES), 2)[0], sparse)
        decoded = sam.decode(features, ObjectPrompts(boxes=BOXES))
        memory = sam.encode_memory(features.embedding, decoded.masks, decoded.scores)
    assert decoded.masks.isfinite().all()
    assert memory.isfinite().all()


@pytest.mark.parametrize("backbone", ["nano", *LIGHT])
def test_new_memory_attention_starts_at_zero_and_can_learn(backbone):
    base = build_base(backbone, frame_size=64)
    assert Sam2(base).residual_memory
    attention = base.memory_attention
    tokens, memory = torch.randn(16, 1, base.hidden_dim), torch.randn(32, 1, base.mem_dim)
    result = attention(curr=tokens, memory=memory, curr_pos=tokens, memory_pos=memory)
    assert (result == 0).all()
    (result - 1).square().sum().backward()
    assert attention.norm.weight.grad.abs().sum() > 0


def test_published_sizes_do_not_add_memory_to_the_embedding():
    with torch.device("meta"):
        assert not Sam2(build_base("sam2_small", frame_size=256)).residual_memory


@torch.no_grad()
def test_sams_decoder_starts_as_sams_own():
    modeling = pytest.importorskip("segment_anything.modeling")
    torch.manual_seed(3)
    prompt_encoder = modeling.PromptEncoder(
        embed_dim=256, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=16
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = modeling.MaskDecoder(
        num_multimask_outputs=3,
        transformer=transformer,
        transformer_dim=256,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    base = build_base("mobile_sam", frame_size=64, object_scores=False)
    base.sam_prompt_encoder.load_state_dict(prompt_encoder.state_dict())
    ours = base.sam_mask_decoder
    renamed = {
        name.replace("mlp.lin1", "mlp.layers.0").replace("mlp.lin2", "mlp.layers.1"): tensor
        for name, tensor in decoder.state_dict().items()
    }
    missing = ours.load_state_dict(renamed, strict=False).missing_keys
    assert sorted(missing) == ["conv_s0.bias", "conv_s0.weight", "conv_s1.bias", "conv_s1.weight"]

    sam = Sam2(base).eval()
    features = sam.encode(torch.randn(2, 3, 64, 64))
    masks = torch.randn(2, 16, 16)
    decoded = sam.decode(features, ObjectPrompts(boxes=BOXES, masks=masks))
    for obj in range(2):
        sparse, dense = prompt_encoder(points=None, boxes=BOXES[obj : obj + 1], masks=masks[obj : obj + 1, None])
        theirs, quality = decoder(
            image_embeddings=features.embedding[obj : obj + 1],
            image_pe=prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        torch.testing.assert_close(decoded.masks[obj], theirs[0, 0], rtol=0, atol=1e-4)
        torch.testing.assert_close(decoded.quality[obj], quality[0, 0], rtol=0, atol=1e-4)
