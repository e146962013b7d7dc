"""Interface of backends: a trained network becomes a function of tiles. torch's is the network itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from rfmedsam2.inference.sliding_window import Network
from rfmedsam2.records.model import ModelConfig

BackendName = Literal["torch", "openvino"]

_RUNS, _SECONDS = 3, 1.0
"""A tile is timed this often at most, and not again once the runs took so long together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceNetwork:
    """A trained network, and what a backend must know of it.

    Attributes:
        network: in evaluation mode, on a CPU.
        model: its record.
        input_shape: (C, *patch) of one tile.
        weights_sha256: digest of its weights, as its checkpoint has it.
    """

    network: nn.Module
    model: ModelConfig
    input_shape: tuple[int, ...]
    weights_sha256: str


class Backend(Protocol):
    """Turns networks into functions of tiles."""

    name: BackendName

    def prepare(self, source: SourceNetwork) -> Network:
        """A function (n, C, *patch) -> logits (n, K, *patch), float32, which several threads may call.

        Raises:
            ConversionError: the backend cannot run this network; names the operation.
        """
        ...


class TorchBackend:
    """torch: the network as it is."""

    name: BackendName = "torch"

    def prepare(self, source: SourceNetwork) -> Network:
        """The network."""
        return source.network


@torch.inference_mode()
def timed(network: Network, tile: Tensor) -> tuple[float, Tensor]:
    """Seconds that a network takes for a tile (1, C, *patch), the fastest of a few runs; and its logits."""
    seconds: list[float] = []
    while True:
        started = time.perf_counter()
        logits = network(tile)
        seconds.append(time.perf_counter() - started)
        if len(seconds) == _RUNS or sum(seconds) > _SECONDS:
            return min(seconds), logits
