"""The U-Net and models.build_stage / load_network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rfmedsam2.errors import CheckpointError, PlanError
from rfmedsam2.losses import deep_supervision_losses
from rfmedsam2.models import build_stage, load_network
from rfmedsam2.nn.attention import TransformerBlock, sine_positions
from rfmedsam2.nn.unet import UNet, load_nnunet_weights
from rfmedsam2.pipeline.planning.plan import plan
from rfmedsam2.pipeline.planning.topology import FeatureWidths, topology_of
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.checkpoints import write_checkpoint

PATCH = (16, 16, 16)


def small(block: str = "plain") -> UNetConfig:
    return FeatureWidths(block=block, base=4, maximum=8).network(topology_of((1, 1, 1), PATCH))


def small_plan() -> Plan:
    dataset = SimpleNamespace(
        name="Dataset001_A",
        json=DatasetJson.parse(
            {"channel_names": {"0": "CT", "1": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
        ),
    )
    case = CaseFingerprint(
        id="a", shape_zyx=PATCH, shape_after_crop_zyx=PATCH, spacing_zyx_mm=(1, 1, 1), voxels_by_label={1: 9}
    )
    flat = IntensityStatistics(mean=0, median=0, std=1, min=-1, max=1, percentile_00_5=-1, percentile_99_5=1)
    fingerprint = Fingerprint(
        dataset="Dataset001_A",
        digest="d",
        cases=(case,),
        intensities=(flat, flat),
        median_relative_size_after_crop=1,
    )
    return plan(dataset, fingerprint, preset="cpu")


def checkpoint_of(tmp_path, network: torch.nn.Module, plan: Plan, stage: str = "3d_fullres"):
    record = CheckpointRecord(
        plan=plan,
        stage="3d_fullres",
        fold="0",
        step=1,
        weights_sha256="",
        code_version="0",
        torch_version="2",
        created="now",
    ).model_copy(update={"stage": stage})
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, record, {f"model/{n}": t for n, t in network.state_dict().items()}, {})
    return path


@pytest.mark.parametrize("block", ["plain", "residual"])
def test_every_tensor_is_named_once(block):
    network = UNet(small(block), channels=1, outputs=2)
    state = network.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    assert set(state) == {name for name, _ in network.named_parameters()}


def test_deep_supervision_gives_one_output_per_level_highest_first():
    network = UNet(small(), channels=1, outputs=3, deep_supervision=True)
    x = torch.zeros(1, 1, *PATCH)
    assert [tuple(o.shape) for o in network(x)] == [(1, 3, 16, 16, 16), (1, 3, 8, 8, 8)]
    assert network.eval()(x).shape == (1, 3, 16, 16, 16)
    assert len(network.train()(x)) == 2
    assert UNet(small(), channels=1, outputs=3)(x).shape == (1, 3, 16, 16, 16)


def test_gradients_reach_every_parameter_under_deep_supervision():
    network = UNet(small(), channels=1, outputs=3, deep_supervision=True)
    sum(o.square().mean() for o in network(torch.randn(1, 1, *PATCH))).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_weights_of_another_network_are_refused():
    with pytest.raises(CheckpointError, match="another network"):
        load_nnunet_weights(UNet(small(), channels=1, outputs=2), UNet(small(), channels=1, outputs=3).state_dict())


def test_a_checkpoint_becomes_the_network_it_was_written_from(tmp_path):
    plan = small_plan()
    network = build_stage(plan, plan.stages["3d_fullres"]).eval()
    record, loaded = load_network(checkpoint_of(tmp_path, network, plan), device="cpu")
    assert record.plan == plan
    assert not loaded.training
    x = torch.randn(1, 2, *PATCH)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))


def test_weights_that_do_not_fit_the_plan_are_refused(tmp_path):
    plan = small_plan()
    with pytest.raises(CheckpointError, match="do not match"):
        load_network(checkpoint_of(tmp_path, UNet(small(), channels=1, outputs=5), plan), device="cpu")


def test_a_stage_that_the_plan_has_not_is_named(tmp_path):
    plan = small_plan()
    network = build_stage(plan, plan.stages["3d_fullres"])
    with pytest.raises(CheckpointError, match="3d_nothing"):
        load_network(checkpoint_of(tmp_path, network, plan, "3d_nothing"), device="cpu")


def with_attention(patch: tuple[int, ...]) -> UNetConfig:
    return (
        FeatureWidths(base=4, maximum=8)
        .network(topology_of((1,) * len(patch), patch))
        .model_copy(update={"attention": True})
    )


@pytest.mark.parametrize("patch", [(32, 32), PATCH], ids=["2d", "3d"])
def test_attention_at_the_bottleneck_starts_as_the_same_network(patch):
    config = with_attention(patch)
    plain = UNet(config.model_copy(update={"attention": False}), channels=1, outputs=2)
    attending = UNet(config, channels=1, outputs=2)
    added = attending.load_state_dict(plain.state_dict(), strict=False)
    assert not added.unexpected_keys
    assert added.missing_keys
    assert all(name.startswith("bottleneck.") for name in added.missing_keys)
    x = torch.randn(2, 1, *patch)
    assert torch.equal(attending(x), plain(x))


@pytest.mark.parametrize("patch", [(32, 32), PATCH], ids=["2d", "3d"])
def test_attention_at_the_bottleneck_learns(patch):
    network = UNet(with_attention(patch), channels=1, outputs=2, deep_supervision=True)
    nn.init.normal_(network.bottleneck.attention.out_proj.weight)
    nn.init.normal_(network.bottleneck.narrow.weight)
    sum(o.square().mean() for o in network(torch.randn(2, 1, *patch))).backward()
    assert all(p.grad is not None for p in network.parameters())
    # the bias of keys adds the same to every attention logit and learns nothing
    learned = {n for n, p in network.bottleneck.named_parameters() if p.grad.abs().sum() > 0}
    assert learned == {n for n, _ in network.bottleneck.named_parameters()}


def test_attention_tells_positions_apart():
    torch.manual_seed(0)
    block = TransformerBlock(12)
    nn.init.normal_(block.attention.out_proj.weight)
    x = torch.randn(1, 12, 2, 3, 4)
    shuffled = x.flatten(2)[:, :, torch.randperm(24)].view_as(x)
    assert block(x).shape == x.shape
    # the set of positions is the same; without their encoding so would the sum of what comes out be
    assert not torch.allclose(block(x).sum((2, 3, 4)), block(shuffled).sum((2, 3, 4)), atol=1e-3)


@pytest.mark.parametrize(("size", "channels"), [((5,), 8), ((4, 6), 16), ((2, 3, 4), 20), ((3, 3), 3)])
def test_sine_positions_are_distinct_and_bounded(size, channels):
    encoded = sine_positions(size, channels)
    assert encoded.shape == (torch.Size(size).numel(), channels)
    assert encoded.abs().max() <= 1
    assert channels < 4 or torch.cdist(encoded, encoded).fill_diagonal_(1).min() > 1e-2


def test_sine_positions_count_along_their_own_axis():
    encoded = sine_positions((3, 5), 8).view(3, 5, 8)
    assert torch.equal(encoded[:, 0, :4], encoded[:, 4, :4])
    assert torch.equal(encoded[0, :, 4:], encoded[2, :, 4:])
    torch.testing.assert_close(encoded[2, 3, [0, 4]], torch.tensor([2.0, 3.0]).sin())


def test_the_papers_network_has_45_million_parameters():
    config = FeatureWidths().network(topology_of((3.0, 0.76, 0.76), (32, 256, 256)))
    assert config.features == (32, 64, 128, 256, 320, 320, 320)
    with torch.device("meta"):
        network = UNet(config, channels=1, outputs=14)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 45.0


def averaged(x: torch.Tensor, blocks: tuple[int, ...]) -> torch.Tensor:
    """Means of blocks, written out by slices."""
    for axis, block in enumerate(blocks, start=2):
        parts = [x.index_select(axis, torch.arange(i, x.shape[axis], block)) for i in range(block)]
        x = sum(parts) / block
    return x


def interpolated(x: torch.Tensor, blocks: tuple[int, ...]) -> torch.Tensor:
    """Linear along each axis between the centers of the blocks, constant beyond the outermost, written out."""
    for axis, block in enumerate(blocks, start=2):
        n = x.shape[axis]
        place = ((torch.arange(n * block) + 0.5) / block - 0.5).clamp(0, n - 1)
        low = place.floor().long().clamp(max=max(n - 2, 0))
        share = (place - low).view([-1 if i == axis else 1 for i in range(x.ndim)])
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, (low + 1).clamp(max=n - 1)) * share
    return x


COARSE = [((16, 32), (1, 2)), ((32, 32), (2, 2)), ((32, 32, 32), (2, 2, 2)), ((16, 48, 32), (1, 3, 2))]


def coarse(patch: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[UNetConfig, UNetConfig]:
    """The same network on means of blocks of the patch, and on every voxel of a patch as small as these."""
    small_patch = tuple(n // block for n, block in zip(patch, blocks, strict=True))
    config = FeatureWidths(base=4, maximum=8).network(topology_of((1,) * len(patch), small_patch))
    return UNetConfig.parse(config.model_dump() | {"input_stride": blocks}), config


@pytest.mark.parametrize(("patch", "blocks"), COARSE)
@pytest.mark.parametrize("deep", [True, False])
def test_a_coarse_network_averages_its_input_and_interpolates_its_logits(patch, blocks, deep):
    config, inner = coarse(patch, blocks)
    around = UNet(config, channels=2, outputs=3, deep_supervision=deep)
    alone = UNet(inner, channels=2, outputs=3, deep_supervision=deep)
    alone.load_state_dict(around.state_dict())  # the same tensors by the same names
    x = torch.randn(2, 2, *patch)
    found, wanted = around(x), alone(averaged(x, blocks))
    found, wanted = (given if deep else [given] for given in (found, wanted))
    assert found[0].shape == (2, 3, *patch)
    torch.testing.assert_close(found[0], interpolated(wanted[0], blocks), atol=1e-5, rtol=1e-5)
    assert len(found) == len(wanted) == (len(config.decoder_blocks) if deep else 1)
    for own, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [(32, 32), PATCH], ids=["2d", "3d"])
def test_blocks_of_one_voxel_change_no_bit(patch):
    plain = FeatureWidths(base=4, maximum=8).network(topology_of((1,) * len(patch), patch))
    ones = plain.model_copy(update={"input_stride": (1,) * len(patch)})
    networks = [UNet(config, channels=1, outputs=2) for config in (plain, ones)]
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.randn(1, 1, *patch)
    assert torch.equal(networks[0](x), networks[1](x))
    assert torch.equal(networks[0](x), networks[0].decoder(networks[0].encoder(x)))


def test_an_input_that_does_not_divide_into_blocks_is_refused():
    config, _ = coarse((32, 32, 32), (2, 2, 2))
    network = UNet(config, channels=1, outputs=2)
    with pytest.raises(PlanError, match=r"(?s)multiple of 2 x 2 x 2 voxels.*32 x 33 x 32"):
        network(torch.zeros(1, 1, 32, 33, 32))


def test_losses_of_a_coarse_network_are_those_of_labels_at_each_level():
    config, _ = coarse((32, 32, 32), (2, 2, 2))
    network = UNet(config, channels=1, outputs=2, deep_supervision=True)
    levels = network(torch.randn(1, 1, 32, 32, 32))
    assert [tuple(level.shape[2:]) for level in levels] == [(32,) * 3, (8,) * 3]
    target = torch.zeros(1, 32, 32, 32, dtype=torch.int16)
    target[:, 8:24, 8:24, 8:24] = 1
    seen = []

    def loss(logits, labels):
        seen.append((tuple(logits.shape[2:]), float(labels.float().mean())))
        return {"sum": logits.square().mean()}

    deep_supervision_losses(levels, target, loss, lowest=True)["sum"].backward()
    assert seen == [((32,) * 3, 0.125), ((8,) * 3, 0.125)]
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)], ids=["voxels", "blocks"])
def test_the_head_makes_the_logits_of_the_features(stride):
    config, _ = coarse((32, 32, 32), stride)
    network = UNet(config, channels=1, outputs=5).eval()
    x = torch.randn(2, 1, 32, 32, 32)
    features = network.features(x)
    assert features.shape == (2, config.features[0], 32, 32, 32)
    torch.testing.assert_close(network.head(features), network(x), atol=1e-5, rtol=1e-5)
