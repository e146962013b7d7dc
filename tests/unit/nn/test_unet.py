"""The U-Net and models.build_stage / load_network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rfmedsam2.errors import CheckpointError
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
