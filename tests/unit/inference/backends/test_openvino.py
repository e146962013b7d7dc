"""OpenVINO beside torch: equal logits for every kind of network, the cache, faults, threads; no report of its use."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.fresh_interpreters import run_each
from torch import nn

from rfmedsam2.errors import ConversionError
from rfmedsam2.inference.backends import openvino_backend as module
from rfmedsam2.inference.backends.backend import SourceNetwork
from rfmedsam2.inference.backends.cache import ConversionCache
from rfmedsam2.inference.backends.openvino_backend import OpenVinoBackend
from rfmedsam2.nn.library_networks import build_library_network
from rfmedsam2.nn.unet import UNet
from rfmedsam2.records.model import SegResNetConfig, UNetConfig

pytest.importorskip("openvino")


def unet(**changes: Any) -> SourceNetwork:
    flat = changes.pop("flat", False)
    one, two, kernel = ((1, 1), (2, 2), (3, 3)) if flat else ((1, 1, 1), (1, 2, 2), (3, 3, 3))
    config = UNetConfig(
        **{
            "features": (4, 8),
            "kernel_sizes": (kernel, kernel),
            "strides": (one, two),
            "encoder_blocks": (2, 1),
            "decoder_blocks": (1,),
            **changes,
        }
    )
    torch.manual_seed(3)
    network = UNet(config, channels=2, outputs=3).eval()
    for module_ in network.modules():  # as if trained: fresh batch norms change nothing
        if isinstance(module_, nn.BatchNorm3d):
            assert module_.running_mean is not None
            module_.running_mean.normal_()
    patch = (24, 16) if flat else (6, 16, 24)
    return SourceNetwork(network=network, model=config, input_shape=(2, *patch), weights_sha256="0" * 64)


def segresnet() -> SourceNetwork:
    pytest.importorskip("monai")
    config = SegResNetConfig(features=8, encoder_blocks=(1, 1))
    torch.manual_seed(3)
    network = build_library_network(config, channels=2, outputs=3, patch_size=(8, 16, 16)).eval()
    return SourceNetwork(network=network, model=config, input_shape=(2, 8, 16, 16), weights_sha256="0" * 64)


NETWORKS = {
    "plain": unet,
    "residual": lambda: unet(block="residual"),
    "batch norm": lambda: unet(norm="batch"),
    "2d": lambda: unet(flat=True),
    "blocks of voxels": lambda: unet(input_stride=(1, 2, 2)),
    "attention": lambda: unet(attention=True),
    "segresnet": segresnet,
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_logits_are_torchs_converted_and_from_the_cache(kind, tmp_path) -> None:
    source = NETWORKS[kind]()
    tiles = torch.randn(3, *source.input_shape)
    with torch.inference_mode():
        expected = source.network(tiles.clone())
    first = OpenVinoBackend(ConversionCache(tmp_path)).prepare(source)
    again = OpenVinoBackend(ConversionCache(tmp_path)).prepare(source)
    assert (first.is_new, again.is_new) == (True, False)
    assert first.seconds == again.seconds
    for network in (first, again):
        found = network(tiles)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 2e-5
    # a tile has the same logits in any company
    assert torch.equal(first(tiles[1:2]), first(tiles)[1:2])


def test_instance_norms_of_large_tiles_are_as_exact_as_torchs(tmp_path) -> None:
    """OpenVINO's own instance norm in blocks of channels is off by 1e-4 here."""
    source = unet(features=(8, 8))
    source = SourceNetwork(
        network=source.network, model=source.model, input_shape=(2, 32, 128, 128), weights_sha256="0" * 64
    )
    tile = torch.rand(1, *source.input_shape) * 3
    with torch.inference_mode():
        expected = source.network(tile.clone())
    found = OpenVinoBackend(ConversionCache(tmp_path)).prepare(source)(tile)
    assert float((found - expected).abs().max()) < 2e-5


def test_another_network_is_not_found_in_the_cache(tmp_path) -> None:
    backend = OpenVinoBackend(ConversionCache(tmp_path))
    source = unet()
    backend.prepare(source)
    other = SourceNetwork(
        network=source.network, model=source.model, input_shape=source.input_shape, weights_sha256="1" * 64
    )
    assert backend.prepare(other).is_new
    wider = SourceNetwork(
        network=source.network, model=source.model, input_shape=(2, 6, 16, 32), weights_sha256="0" * 64
    )
    assert backend.prepare(wider).is_new


class Strange(nn.Module):
    """Has an operation that OpenVINO does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Drifting(nn.Module):
    """Gives other logits at every call, as one does whose conversion lost something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.cat([x, x * self.calls], 1)


@pytest.mark.parametrize(("network", "words"), [(Strange(), "aten::special_bessel_j0"), (Drifting(), "differ")])
def test_a_network_that_cannot_run_is_named_and_remembered(tmp_path, network, words, monkeypatch) -> None:
    source = SourceNetwork(network=network, model=unet().model, input_shape=(1, 6, 16, 24), weights_sha256="2" * 64)
    for attempt in range(2):
        backend = OpenVinoBackend(ConversionCache(tmp_path))
        if attempt:
            monkeypatch.setattr(module, "_convert", lambda _: pytest.fail("converted once more"))
        with pytest.raises(ConversionError, match=words):
            backend.prepare(source)


def test_threads_share_a_network(tmp_path) -> None:
    source = unet()
    network = OpenVinoBackend(ConversionCache(tmp_path)).prepare(source)
    tiles = [torch.randn(1, *source.input_shape) for _ in range(8)]
    expected = [network(tile) for tile in tiles]
    found: list[Any] = [None] * len(tiles)

    def work(number: int) -> None:
        found[number] = network(tiles[number])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(tiles))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_its_use_is_not_reported(tmp_path) -> None:
    """OpenVINO's package openvino_telemetry sends events to Google when openvino is imported, without having asked."""
    package = tmp_path / "openvino_telemetry"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('telemetry was loaded')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from rfmedsam2.inference.backends.openvino_backend import load_openvino\n"
        "answer = load_openvino().__name__"
    )
    answer, modules = run_each({"load": code})["load"]
    assert answer == "openvino"
    assert "openvino_telemetry" not in modules


def test_predicting_by_torch_does_not_load_it() -> None:
    code = "import rfmedsam2.pipeline.prediction.predict"
    _, modules = run_each({"predict": code})["predict"]
    assert "openvino" not in modules
