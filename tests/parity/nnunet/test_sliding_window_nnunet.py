"""Sliding-window prediction against the installed nnunetv2 (2.8): same tiles, same weights, same logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rfmedsam2.inference.sliding_window import gaussian_weights, predict_logits, tile_starts
from rfmedsam2.records.plan import Inference

nnunet = pytest.importorskip("nnunetv2.inference.predict_from_raw_data")
tiles = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")


def network(dimensions: int, *, seed: int) -> nn.Module:
    """Two convolutions whose output depends on where in the tile a voxel lies (zero padding) and on direction."""
    torch.manual_seed(seed)
    conv = nn.Conv3d if dimensions == 3 else nn.Conv2d
    return nn.Sequential(conv(2, 4, 3, padding=1), nn.Tanh(), conv(4, 3, 3, padding=1)).eval()


def theirs(
    net: nn.Module, image: torch.Tensor, patch: tuple[int, ...], step: float, axes: tuple[int, ...] | None
) -> torch.Tensor:
    predictor = nnunet.nnUNetPredictor(
        tile_step_size=step, use_mirroring=axes is not None, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.network = net
    predictor.allowed_mirroring_axes = axes
    predictor.configuration_manager = SimpleNamespace(patch_size=patch)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=3)
    return predictor.predict_sliding_window_return_logits(image)


@pytest.fixture
def in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net sums in half precision; let it sum in float32, so that the comparison can be strict."""
    gaussian = tiles.compute_gaussian
    monkeypatch.setattr(torch, "half", torch.float32)
    monkeypatch.setattr(nnunet, "compute_gaussian", lambda *a, **k: gaussian(*a, **{**k, "dtype": torch.float32}))


CASES = [
    ((20, 30, 26), (8, 16, 12), 0.5, (0, 1, 2)),
    ((20, 30, 26), (8, 16, 12), 0.5, None),
    ((21, 17, 12), (8, 16, 12), 0.8, (1, 2)),
    ((9, 16, 25), (8, 8, 8), 0.3, (0,)),
    ((5, 30, 7), (8, 16, 12), 0.5, (0, 1, 2)),
    ((3, 4, 5), (8, 16, 12), 1.0, None),
    ((11, 30, 26), (16, 12), 0.5, (0, 1)),
    ((1, 9, 26), (16, 12), 0.7, None),
]


@pytest.mark.parametrize(("shape", "patch", "step", "axes"), CASES)
@pytest.mark.usefixtures("in_single_precision")
def test_logits_equal_nnunet(shape, patch, step, axes) -> None:
    net = network(len(patch), seed=1)
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    expected = theirs(net, image, patch, step, axes)
    inference = Inference(step_size=step, mirror=axes is not None, tile_batch=3)
    ours = predict_logits(
        [net], image, patch_size=patch, inference=inference, mirror_axes=axes or (), device="cpu", outputs=3
    )
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-5


def test_logits_are_within_half_precision_of_unchanged_nnunet_inside() -> None:
    # at the volume's corners the weights of nnU-Net underflow in half precision: there its logits are rounded to 0
    net = network(3, seed=1)
    image = torch.randn(2, 20, 30, 26, generator=torch.Generator().manual_seed(2))
    expected = theirs(net, image, (8, 16, 12), 0.5, (0, 1, 2)).float()
    ours = predict_logits(
        [net],
        image,
        patch_size=(8, 16, 12),
        inference=Inference(step_size=0.5),
        mirror_axes=(0, 1, 2),
        device="cpu",
        outputs=3,
    )
    inside = (slice(None), slice(3, -3), slice(5, -5), slice(5, -5))
    assert (ours - expected)[inside].abs().max() < 5e-3 * expected.abs().max()


@pytest.mark.parametrize("patch", [(8, 16, 12), (7, 9, 5), (40, 56, 48), (64, 64), (3, 3, 3), (1, 8, 8)])
def test_gaussian_equals_nnunet(patch) -> None:
    expected = tiles.compute_gaussian(patch, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(gaussian_weights(patch), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [0.1, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("image", "patch"), [((110, 64), (64, 64)), ((511, 33, 47), (192, 32, 40)), ((40,), (7,))])
def test_tile_starts_equal_nnunet(image, patch, step) -> None:
    assert tile_starts(image, patch, step) == tiles.compute_steps_for_sliding_window(image, patch, step)
