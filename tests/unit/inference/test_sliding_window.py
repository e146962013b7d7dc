"""What sliding-window prediction promises beyond equality with nnU-Net."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from rfmedsam2.errors import PlanError, RfMedSamError
from rfmedsam2.inference.accumulator import EMPTY_LOGIT, SharedHead
from rfmedsam2.inference.sliding_window import (
    Execution,
    _Ensemble,
    _flips,
    gaussian_weights,
    predict_logits,
    predict_slabs,
    tile_starts,
)
from rfmedsam2.nn.unet import UNet
from rfmedsam2.pipeline.planning.topology import FeatureWidths, topology_of
from rfmedsam2.records.plan import Inference


class Recorder(nn.Module):
    """Gives its input and minus its input as two logits; notes the shapes it saw."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape))
        return torch.cat([x, -x], dim=1) * self.factor


def settings(**changes) -> dict:
    return {
        "patch_size": (8, 8, 8),
        "inference": Inference(mirror=False),
        "mirror_axes": (0, 1, 2),
        "device": "cpu",
        "outputs": 2,
    } | changes


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8)])
@pytest.mark.parametrize("shape", [(30, 20, 9), (3, 20, 9), (17, 5, 4)])
def test_slabs_cover_every_plane_once_in_order(shape, patch) -> None:
    axes = tuple(range(len(patch)))
    slabs = list(predict_slabs([Recorder()], noise(1, *shape), **settings(patch_size=patch, mirror_axes=axes)))
    assert slabs[0].start == 0
    for before, after in itertools.pairwise(slabs):
        assert after.start == before.start + before.logits.shape[1]
    assert slabs[-1].start + slabs[-1].logits.shape[1] == shape[0]


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8)])
def test_a_pointwise_network_gives_back_its_input(patch) -> None:
    image = noise(1, 19, 21, 6)
    logits = predict_logits(
        [Recorder()],
        image,
        **settings(patch_size=patch, mirror_axes=(0, 1), inference=Inference(step_size=0.3, tile_batch=4)),
    )
    np.testing.assert_allclose(logits[0].numpy(), image[0], atol=2e-6)
    np.testing.assert_allclose(logits[1].numpy(), -image[0], atol=2e-6)


def test_no_slab_is_deeper_than_a_patch() -> None:
    slabs = predict_slabs([Recorder()], noise(1, 100, 8, 8), **settings())
    assert max(slab.logits.shape[1] for slab in slabs) <= 8


def test_a_slab_is_given_before_later_tiles_are_run() -> None:
    net = Recorder()
    slabs = predict_slabs([net], noise(1, 40, 8, 8), **settings())
    next(slabs)
    assert len(net.seen) == 1


def test_networks_are_averaged() -> None:
    image = noise(1, 10, 10, 10)
    logits = predict_logits([Recorder(1.0), Recorder(3.0)], image, **settings())
    np.testing.assert_allclose(logits[0].numpy(), 2 * image[0], atol=5e-6)


def test_tiles_are_batched() -> None:
    net = Recorder()
    predict_logits([net], noise(1, 8, 16, 16), **settings(inference=Inference(mirror=False, tile_batch=4)))
    assert [shape[0] for shape in net.seen] == [4, 4, 1]


def test_empty_tiles_are_skipped_and_become_background() -> None:
    image = np.full((1, 24, 8, 8), -2.0, np.float32)
    image[:, :8] = noise(1, 8, 8, 8)
    net = Recorder()
    logits = predict_logits(
        [net], image, **settings(inference=Inference(mirror=False, step_size=1), execution=Execution(skip_empty=True))
    )
    assert len(net.seen) == 1
    np.testing.assert_allclose(logits[0, :8].numpy(), image[0, :8], atol=2e-6)
    assert (logits[0, 8:] == EMPTY_LOGIT).all()
    assert (logits[1:, 8:] == -EMPTY_LOGIT).all()


def test_where_all_tiles_are_skipped_there_is_no_region() -> None:
    image = np.full((1, 8, 8, 8), -2.0, np.float32)
    logits = predict_logits([Recorder()], image, **settings(regions=True, execution=Execution(skip_empty=True)))
    assert (logits == -EMPTY_LOGIT).all()


def test_nothing_is_skipped_unless_asked() -> None:
    net = Recorder()
    predict_logits([net], np.zeros((1, 8, 8, 8), np.float32), **settings())
    assert len(net.seen) == 1


def test_the_image_is_not_changed() -> None:
    image = noise(1, 10, 10, 10)
    before = image.copy()
    predict_logits([Recorder()], image, **settings(inference=Inference(mirror=True)))
    np.testing.assert_array_equal(image, before)


def test_values_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(RfMedSamError, match="not finite"):
        predict_logits([Recorder(float("nan"))], noise(1, 8, 8, 8), **settings())


@pytest.mark.parametrize("tile_batch", [1, 2])
def test_progress_counts_every_tile_once_it_was_predicted(tile_batch) -> None:
    network, seen, totals = Recorder(), [], []

    def track(items, description, total):
        totals.append((description, total))
        for item in items:
            yield item
            seen.append(len(network.seen))

    settings_ = settings(inference=Inference(tile_batch=tile_batch, mirror=False), execution=Execution(track=track))
    predict_logits([network], noise(1, 16, 12, 8), **settings_)
    assert totals == [("tiles", 6)]
    assert len(seen) == 6
    assert seen[-1] == len(network.seen) == 6 // tile_batch
    assert seen[0] == (1 if tile_batch == 1 else 0)


@pytest.mark.parametrize("axes", [(3,), (-1,), (0, 0)])
def test_wrong_mirror_axes_are_an_error(axes) -> None:
    with pytest.raises(PlanError, match="Mirror axes"):
        predict_logits([Recorder()], noise(1, 8, 8, 8), **settings(mirror_axes=axes))


def test_tile_starts_refuses_a_step_of_zero() -> None:
    with pytest.raises(PlanError, match="step size"):
        tile_starts((8,), (8,), 0)


def test_gaussian_is_positive_and_peaks_at_the_center() -> None:
    weights = gaussian_weights((9, 8, 1))
    assert weights.min() > 0
    assert weights[4, 4, 0] == weights.max() == 1


@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_cpu_computes_in_bf16_only_where_it_is_asked_for(precision, expected) -> None:
    torch.manual_seed(0)
    net, seen = nn.Conv3d(1, 2, 3, padding=1), set()
    net.register_forward_hook(lambda *given: seen.add(given[2].dtype))
    image = noise(1, 20, 21, 22)
    exact = predict_logits([net], image, **settings())
    seen.clear()
    found = predict_logits([net], image, **settings(execution=Execution(precision=precision)))
    assert seen == {expected}
    assert float((found - exact).abs().max()) < 0.05
    assert torch.equal(found, exact) is (expected == torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives() -> None:
    torch.manual_seed(0)
    net = nn.Conv3d(1, 2, 3, padding=1)
    image = noise(1, 20, 21, 22)
    inference = Inference(tile_batch=2)
    cpu = predict_logits([net], image, **settings(inference=inference))
    exact = Execution(precision="fp32")
    cuda = predict_logits([net.cuda()], image, **settings(inference=inference, device="cuda", execution=exact))
    assert (cpu - cuda.cpu()).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_ends_halves_the_batch() -> None:
    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 3:
                raise torch.OutOfMemoryError
            return torch.cat([x, -x], dim=1)

    image = noise(1, 16, 16, 16)
    inference = Inference(tile_batch=4)
    logits = predict_logits([Greedy()], image, **settings(inference=inference, device="cuda"))
    np.testing.assert_allclose(logits[0].cpu().numpy(), image[0], atol=1e-5)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 40])
def test_how_much_runs_at_once_changes_nothing(limit) -> None:
    torch.manual_seed(0)
    net = nn.Conv3d(1, 2, 3, padding=1)
    tiles = torch.from_numpy(noise(3, 1, 4, 5, 6))
    flips = _flips((0, 2))
    whole = _Ensemble([net, net], flips=flips, device=torch.device("cpu"), precision="fp32")
    parts = _Ensemble([net, net], flips=flips, device=torch.device("cpu"), precision="fp32")
    parts.limit = limit
    torch.testing.assert_close(parts(tiles), whole(tiles), atol=1e-6, rtol=0)


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    class Greedy(Recorder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 3:
                raise torch.OutOfMemoryError
            return super().forward(x)

    net = Greedy()
    ensemble = _Ensemble([net], flips=_flips((0, 1, 2)), device=torch.device("cpu"), precision="fp32")
    ensemble.limit = 1 << 30
    tiles = torch.from_numpy(noise(4, 1, 4, 5, 6))
    np.testing.assert_allclose(ensemble(tiles)[:, 0].numpy(), tiles[:, 0], atol=1e-6)
    assert {shape[0] for shape in net.seen} <= {1, 2}


def test_a_tile_that_never_fits_is_an_error() -> None:
    class Full(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError

    with pytest.raises(RfMedSamError, match="too little memory"):
        predict_logits([Full()], noise(1, 8, 8, 8), **settings())


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8)])
def test_recycled_slabs_say_the_same_one_after_another(patch) -> None:
    how = {"patch_size": patch, "mirror_axes": tuple(range(len(patch)))}
    image = noise(1, 45, 12, 9)
    expected = predict_logits([Recorder()], image, **settings(**how))
    slabs = predict_slabs([Recorder()], image, **settings(**how, execution=Execution(recycle=True)))
    places, start = set(), 0
    for slab in slabs:
        places.add(slab.logits.data_ptr())
        stop = start + slab.logits.shape[1]
        assert torch.equal(slab.logits, expected[:, start:stop])
        start = stop
    assert start == 45
    assert len(places) < 45 // 8


def unets(count: int, patch: tuple[int, ...], outputs: int) -> list[UNet]:
    """U-Nets of four features."""
    config = FeatureWidths(base=4, maximum=8).network(topology_of((1,) * len(patch), patch))
    torch.manual_seed(0)
    return [UNet(config, channels=1, outputs=outputs).eval() for _ in range(count)]


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize(("count", "patch", "mirror"), [(1, (8, 8, 8), True), (2, (8, 8, 8), False), (2, (8, 8), True)])
def test_sums_of_fewer_features_give_the_logits_of_many_classes(count, patch, mirror, regions) -> None:
    networks = unets(count, patch, outputs=9)
    image = noise(1, 21, 12, 9)
    image[:, 10:] = 0
    how = settings(
        patch_size=patch,
        mirror_axes=tuple(range(len(patch))),
        inference=Inference(mirror=mirror),
        outputs=9,
        regions=regions,
        execution=Execution(skip_empty=True),
    )
    with torch.inference_mode():
        # functions have no head that could be told from the rest
        expected = predict_logits([lambda x, network=network: network(x) for network in networks], image, **how)
        found = predict_logits(networks, image, **how)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected[1, 19:] == -EMPTY_LOGIT).all()


def test_features_are_summed_where_they_are_fewer_than_the_outputs() -> None:
    networks = unets(3, (8, 8, 8), outputs=9)
    heads = [SharedHead.of(networks[:count], 9) for count in (1, 2, 3)]
    assert [head if head is None else tuple(head.weight.shape) for head in heads] == [(9, 4), (9, 8), None]
    assert SharedHead.of(unets(1, (8, 8, 8), outputs=4), 4) is None
    assert SharedHead.of([networks[0], Recorder()], 9) is None
