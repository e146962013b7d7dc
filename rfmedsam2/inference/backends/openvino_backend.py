"""OpenVINO on a CPU, in float32: networks are converted once, checked against torch on a tile, and kept.

Instance norms are split into sums along one axis after the other. OpenVINO's own adds up all voxels of a channel in one
float32 number, so that logits of a large tile were a hundred times as far from the exact ones as torch's.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softmax

from rfmedsam2.errors import ConversionError, MissingPackageError
from rfmedsam2.inference.backends.backend import BackendName, SourceNetwork, timed
from rfmedsam2.inference.backends.cache import NETWORK, ConversionCache, ConversionRecord, Kept
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.version import __version__

TOLERANCE = 1e-3
"""Largest difference to torch's probabilities on the tile that every new conversion is checked with."""
_TELEMETRY = "openvino_telemetry"
"""OpenVINO's package that reports its use to Google Analytics without having asked. It is not loaded."""
_MEANING = ("torch", "openvino", "dynamic-network-architectures", "monai", "timm")
"""Packages whose versions a conversion depends on."""
_OPERATION = re.compile(r"\b(?:aten|prim|torchvision|quantized)::\w+")
_FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""What tracing and conversion raise for networks that they do not understand, besides `_FAILURES`."""
_FAILURES = ("GeneralFailure", "InitializationFailure", "NotImplementedFailure")
_FAILURES += ("OpConversionFailure", "OpValidationFailure")
"""OpenVINO's own errors, which derive from Exception alone."""


@cache
def load_openvino() -> Any:
    """The package `openvino`, without its telemetry.

    Raises:
        MissingPackageError: it is not installed, or damaged.
    """
    loaded = _TELEMETRY in sys.modules
    if not loaded:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment] - Python's way to let an import fail
    try:
        return importlib.import_module("openvino")
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "openvino"
        raise MissingPackageError(
            "OpenVINO is not installed" if missing else f"OpenVINO cannot be loaded ({error})",
            remedy="Install it with: pip install 'rfmedsam2[openvino]'",
        ) from None
    finally:
        if not loaded:
            del sys.modules[_TELEMETRY]


class OpenVinoBackend:
    """OpenVINO.

    Args:
        conversions: where converted networks are kept.
        threads: number of threads; None: torch's.

    Raises:
        MissingPackageError: it is not installed.
    """

    name: BackendName = "openvino"

    def __init__(self, conversions: ConversionCache, *, threads: int | None = None) -> None:
        self._openvino = load_openvino()
        self._core = self._openvino.Core()
        self._cache = conversions
        self._threads = threads or torch.get_num_threads()
        self._machine = f"{self._core.get_property('CPU', 'FULL_DEVICE_NAME')}, {self._threads} threads"

    def prepare(self, source: SourceNetwork) -> OpenVinoNetwork:
        """Compile a network for this machine, from the cache or converted, checked and measured now."""
        made_from = _made_from(source)
        kept = self._cache.find(made_from)
        if kept is not None and kept.record.fault is not None:
            raise _cannot_convert(kept.record.fault)
        if kept is not None and (network := self._from_cache(kept, source)) is not None:
            return network
        try:
            return self._converted(source, made_from)
        except ConversionError as error:
            self._cache.store(ConversionRecord(made_from=made_from, seconds={}, fault=error.found))
            raise

    def _from_cache(self, kept: Kept, source: SourceNetwork) -> OpenVinoNetwork | None:
        """A network that is kept; None: it can no longer be read."""
        try:
            network = self._compiled(self._core.read_model(kept.folder / NETWORK))
        except RuntimeError:  # removed meanwhile by another run that needs the room
            return None
        if (seconds := kept.record.seconds.get(self._machine)) is not None:
            network.seconds = seconds
            return network
        network = _checked(source, lambda: network)
        self._cache.add_seconds(kept, self._machine, network.seconds)
        return network

    def _converted(self, source: SourceNetwork, made_from: dict[str, str]) -> OpenVinoNetwork:
        models: list[Any] = []

        def build() -> OpenVinoNetwork:
            models.append(_convert(source))
            return self._compiled(models[0])

        network = _checked(source, build)
        network.is_new = True
        record = ConversionRecord(made_from=made_from, seconds={self._machine: network.seconds})
        self._cache.store(record, partial(_save, self._openvino, models[0]))
        return network

    def _compiled(self, model: Any) -> OpenVinoNetwork:
        hints = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            # a process may be confined to cores that OpenVINO would not choose, and two would choose the same
            "ENABLE_CPU_PINNING": False,
            "ENABLE_HYPER_THREADING": True,
        }
        return OpenVinoNetwork(self._openvino, self._core.compile_model(model, "CPU", hints))


class OpenVinoNetwork:
    """A compiled network: (n, C, *patch) -> logits (n, K, *patch), float32, tile by tile.

    One tile at a time needs the least memory, is as fast as a batch, and gives a tile the same logits in any company.

    Attributes:
        seconds: of a tile on this machine, by backend.
        is_new: whether it was converted now.
    """

    def __init__(self, openvino: Any, compiled: Any) -> None:
        self._tensor = openvino.Tensor
        self._request = compiled.create_infer_request()
        self._outputs = tuple(compiled.output(0).shape)[1:]
        self._lock = Lock()
        self.seconds: dict[str, float] = {}
        self.is_new = False

    def __call__(self, tiles: Tensor) -> Tensor:
        """Logits of tiles on the CPU."""
        logits = torch.empty((len(tiles), *self._outputs))
        with self._lock:
            for tile, out in zip(tiles.split(1), logits.split(1), strict=True):
                # both are the caller's memory: OpenVINO reads and writes them in place
                self._request.set_input_tensor(self._tensor(tile.contiguous().numpy(), shared_memory=True))
                self._request.set_output_tensor(self._tensor(out.numpy(), shared_memory=True))
                self._request.infer()
        return logits


def _made_from(source: SourceNetwork) -> dict[str, str]:
    """All that a conversion depends on."""
    versions = {f"version of {name}": _version(name) for name in _MEANING}
    return {
        "weights": source.weights_sha256,
        "model": source.model.to_json(),
        "input_shape": " ".join(map(str, source.input_shape)),
        "precision": "fp32",
        "version of rfmedsam2": __version__,
        **versions,
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _checked(source: SourceNetwork, build: Any) -> OpenVinoNetwork:
    """A compiled network that agrees with torch's on a tile of noise, with the seconds of both.

    Raises:
        ConversionError: they differ.
    """
    tile = torch.randn((1, *source.input_shape), generator=torch.Generator().manual_seed(0))
    seconds, expected = timed(source.network, tile)  # first: its memory is free again when OpenVINO needs its own
    network: OpenVinoNetwork = build()
    network.seconds = {"torch": seconds}
    network.seconds["openvino"], found = timed(network, tile)
    if found.shape != expected.shape:
        raise _cannot_convert(f"logits of shape {tuple(found.shape)} instead of torch's {tuple(expected.shape)}")
    difference = float((softmax(found, 1) - softmax(expected, 1)).abs_().max())
    if not difference <= TOLERANCE:  # also NaN
        raise _cannot_convert(f"probabilities that differ from torch's by {difference:.2g}")
    return network


def _convert(source: SourceNetwork) -> Any:
    """The network as OpenVINO's model, for one tile.

    Raises:
        ConversionError: an operation is unknown.
    """
    decoders = importlib.import_module("openvino.frontend.pytorch.ts_decoder")
    frontends = importlib.import_module("openvino.frontend")
    faults = (*_FAULTS, *(getattr(frontends, name) for name in _FAILURES))
    frontend = frontends.FrontEndManager().load_by_framework("pytorch")
    example = torch.zeros((1, *_traced_shape(source)))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; tracing warns of shapes that are fixed here
            traced = torch.jit.trace(source.network, example, check_trace=False)
            decoder = decoders.TorchScriptPythonDecoder(traced, example_input=(example,))
            model = frontend.convert(frontend.load(decoder))
        model.reshape([1, *source.input_shape])
        _split_instance_norms(model)
    except faults as error:
        names = dict.fromkeys(_OPERATION.findall(str(error).partition("Failed operations")[2] or str(error)))
        known = f"the operation {', '.join(names)}" if names else " ".join(str(error).split())[:200]
        raise _cannot_convert(known or type(error).__name__) from error
    return model


def _traced_shape(source: SourceNetwork) -> tuple[int, ...]:
    """Shape of the tile that a network is traced with: for a U-Net a small one, as it works on any size."""
    channels, *patch = source.input_shape
    model = source.model
    # attention and the interpolation of logits of blocks depend on the size
    if not isinstance(model, UNetConfig) or model.attention or set(model.blocks) != {1}:
        return source.input_shape
    # two positions along each axis at the bottleneck, as an instance norm needs more than one in all
    return (channels, *(min(size, 2 * step) for size, step in zip(patch, model.total_stride, strict=True)))


def _split_instance_norms(model: Any) -> None:
    """Replace OpenVINO's instance norms in place; see the module."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MVN" and "instance_norm" in node.get_friendly_name():
            given = node.input_value(0)
            centered = _ops().subtract(given, _mean(given))
            variance = _mean(_ops().multiply(centered, centered).output(0))
            scale = _ops().sqrt(_ops().add(variance, np.float32(node.get_attributes()["eps"])))
            node.output(0).replace(_ops().divide(centered, scale).output(0))
    model.validate_nodes_and_infer_types()


def _mean(value: Any) -> Any:
    """Mean over all axes but the first two, kept as axes of length 1: the last axis first."""
    shape = value.get_shape()
    for axis in range(len(shape) - 1, 1, -1):
        # not reduce_mean: two of them in a row are made one, which adds up all voxels again
        total = _ops().reduce_sum(value, np.array([axis]), keep_dims=True)
        value = _ops().multiply(total, np.float32(1 / shape[axis])).output(0)
    return value


def _ops() -> Any:
    return importlib.import_module("openvino.opset13")


def _save(openvino: Any, model: Any, folder: Path) -> None:
    openvino.save_model(model, folder / NETWORK, compress_to_fp16=False)


def _cannot_convert(found: str) -> ConversionError:
    return ConversionError("OpenVINO cannot run this network", found=found, remedy="Predict with the backend torch")
