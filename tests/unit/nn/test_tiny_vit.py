"""TinyViT as SAM 2's image encoder."""

from __future__ import annotations

import pytest
import torch
from support.small_rfmedsam2 import config, network

from rfmedsam2.choices import Backbone
from rfmedsam2.errors import PlanError, RecordError
from rfmedsam2.nn.sam2.tiny_vit import Scaling, build_tiny_vit_encoder, scaled
from rfmedsam2.records.model import RFMedSam2Config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "scaling", "seen"),
    [(64, "none", 64), (96, "none", 96), (64, "unit", 64), (96, "unit", 96), (128, "unit", 128)],
)
def test_three_levels_of_256_channels(size: int, scaling: Scaling, seen: int) -> None:
    encoder = build_tiny_vit_encoder(size, scaling).eval()
    assert encoder.seen(size) == seen
    with torch.no_grad():
        out = encoder(torch.rand(1, 3, size, size))
    shapes = [(1, 256, size // stride, size // stride) for stride in (4, 8, 16)]
    assert [tuple(level.shape) for level in out["backbone_fpn"]] == shapes
    assert [tuple(position.shape) for position in out["vision_pos_enc"]] == shapes
    assert out["vision_features"] is out["backbone_fpn"][-1]
    assert encoder.neck.d_model == 256


def test_lite_medsams_published_size_is_a_quarter_of_the_frames() -> None:
    encoder = build_tiny_vit_encoder(1024, "unit")
    assert [encoder.seen(side) for side in (64, 256, 512, 1024)] == [256] * 4
    assert encoder.patch_embed.seq[0][0].stride == (1, 1)


@pytest.mark.parametrize(("side", "seen"), [(40, 64), (64, 64), (100, 100), (256, 256), (300, 256)])
def test_lite_medsam_sees_the_pixels_that_frames_have(side: int, seen: int) -> None:
    encoder = build_tiny_vit_encoder(256, "unit").eval()
    assert encoder.seen(side) == seen
    if side >= 256:  # seconds each: the test below runs one of this size
        return
    with torch.no_grad():
        assert encoder(torch.rand(1, 3, side, side))["vision_features"].shape == (1, 256, 16, 16)


def test_frames_of_the_input_size_are_taken_as_they_are() -> None:
    encoder = build_tiny_vit_encoder(320, "unit").eval()
    frames = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        out = encoder(frames)
        expected = encoder.neck(encoder.stages(scaled(frames, "unit"))[2])
    assert out["vision_features"].shape == (1, 256, 20, 20)
    assert torch.equal(out["vision_features"], torch.nn.functional.adaptive_avg_pool2d(expected, 20))


def test_frames_do_not_depend_on_their_neighbors_while_training() -> None:
    encoder = build_tiny_vit_encoder(64).train()
    frames = torch.rand(3, 3, 64, 64)
    together = encoder(frames)["vision_features"]
    alone = encoder(frames[1:2])["vision_features"]
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    encoder = build_tiny_vit_encoder(64).train()
    with torch.no_grad():  # bottlenecks begin as their shortcut, so that their inner layers learn from step two on
        for block in encoder.layers[0].blocks:
            block.conv3[1].weight.fill_(1)
    sum(level.square().mean() for level in encoder(torch.rand(1, 3, 64, 64))["backbone_fpn"]).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in encoder.parameters())


def test_built_without_memory_and_filled_gives_the_same() -> None:
    encoder = build_tiny_vit_encoder(64).eval()
    with torch.device("meta"):
        other = build_tiny_vit_encoder(64).eval()
    other.load_state_dict(encoder.state_dict(), assign=True)
    frames = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(frames)["vision_features"], other(frames)["vision_features"])


def test_unit_scaling_is_per_frame_and_safe_on_flat_frames() -> None:
    frames = torch.stack([torch.linspace(-300, 500, 3 * 64).view(3, 8, 8), torch.full((3, 8, 8), 7.0)])
    unit = scaled(frames, "unit")
    assert unit[0].min() == 0
    assert unit[0].max() == 1
    assert unit[1].abs().max() == 0
    assert scaled(frames, "none") is frames


@pytest.mark.parametrize("size", [32, 80])
def test_sizes_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(PlanError, match="multiple of 32"):
        build_tiny_vit_encoder(size)


@pytest.mark.parametrize(("backbone", "own"), [("mobile_sam", 96), ("lite_medsam", 64)])
def test_the_encoder_can_be_shown_another_size_than_the_decoder(backbone: Backbone, own: int) -> None:
    torch.manual_seed(0)
    frames = torch.randn(2, 1, 32, 32)
    plain, shown = (
        network(backbone=backbone, frame_size=64, encoder_size=size, freeze_backbone=True).eval()
        for size in (None, own)
    )
    shown.load_state_dict(plain.state_dict())
    sizes: list[torch.Size] = []
    shown.sam.base.image_encoder.patch_embed.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape))
    with torch.no_grad():
        before, after = plain.encode(frames), shown.encode(frames)
        alone = shown.encode(frames[1:])
    assert {tuple(size[-2:]) for size in sizes} == {(own, own)}
    for name in ("embedding", "middle", "fine"):
        one, two = getattr(before, name), getattr(after, name)
        assert one.shape == two.shape
        torch.testing.assert_close(two[1:], getattr(alone, name), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before.embedding, after.embedding, atol=1e-3)


@pytest.mark.parametrize(
    ("backbone", "size"), [("nano", 64), ("sam2_tiny", 64), ("mobile_sam", 32), ("lite_medsam", 72)]
)
def test_sizes_that_the_encoder_cannot_be_shown_are_refused(backbone: Backbone, size: int) -> None:
    with pytest.raises(RecordError, match="encoder_size"):
        RFMedSam2Config.parse(config(backbone=backbone, frame_size=64).model_dump(mode="json") | {"encoder_size": size})
