"""The choice of a backend: as the user asks, or the faster one on this machine. All networks are prepared here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rfmedsam2.arguments import option
from rfmedsam2.choices import Backend as Wanted
from rfmedsam2.errors import ConversionError, MissingPackageError, RfMedSamError, UsageError
from rfmedsam2.inference.backends.backend import BackendName, SourceNetwork, TorchBackend
from rfmedsam2.inference.backends.cache import cache_at
from rfmedsam2.inference.backends.openvino_backend import OpenVinoBackend, load_openvino
from rfmedsam2.inference.sliding_window import Network, Precision
from rfmedsam2.records.model import LibraryConfig, UNetConfig

LEAST_GAIN = 1.1
"""How much faster than torch a backend must be for `auto` to take it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Networks that are ready to predict.

    Attributes:
        networks: (n, C, *patch) -> logits (n, K, *patch) each.
        backend: what runs them.
        note: why, where it was found out now; None: it was known, or asked for.
    """

    networks: tuple[Network, ...]
    backend: BackendName
    note: str | None = None


def run_networks(
    sources: Sequence[SourceNetwork],
    *,
    wanted: Wanted = "auto",
    precision: Precision = "auto",
    device: torch.device,
    cache: Path | None = None,
) -> Running:
    """Prepare the networks of one model, all by the same backend.

    Args:
        sources: the folds.
        wanted: a backend. auto: OpenVINO where it is installed, can run these networks and has been `LEAST_GAIN` times
            as fast as torch on a tile of the first; else torch.
        precision: of the networks.
        device: device of the networks.
        cache: folder of converted networks; None: ~/.cache/rfmedsam2.

    Raises:
        UsageError: OpenVINO is asked for, and cannot run this kind of network, on this device or in this precision.
        MissingPackageError: it is asked for, and not installed.
        ConversionError: it is asked for, and cannot run this network.
    """
    by_torch = Running(networks=tuple(TorchBackend().prepare(source) for source in sources), backend="torch")
    if wanted == "torch":
        return by_torch
    if (unsuited := _unsuited(sources, precision, device)) is not None:
        if wanted == "openvino":
            raise unsuited
        return by_torch
    backend = OpenVinoBackend(cache_at(cache))
    try:
        first = backend.prepare(sources[0])
        note = None
        if wanted == "auto":
            gain = first.seconds["torch"] / first.seconds["openvino"]
            figures = f"{first.seconds['openvino']:.3g} s for a tile, torch {first.seconds['torch']:.3g} s"
            if gain < LEAST_GAIN:
                return Running(
                    networks=by_torch.networks,
                    backend="torch",
                    note=f"Backend: torch, since OpenVINO is not faster here ({figures})" if first.is_new else None,
                )
            note = f"Backend: OpenVINO, {gain:.2g} times as fast as torch here ({figures})" if first.is_new else None
        networks = (first, *map(backend.prepare, sources[1:]))
    except ConversionError as error:
        if wanted == "openvino":
            raise
        return Running(
            networks=by_torch.networks, backend="torch", note=f"Backend: torch, since OpenVINO cannot run {error.found}"
        )
    return Running(networks=networks, backend="openvino", note=note)


def _unsuited(sources: Sequence[SourceNetwork], precision: Precision, device: torch.device) -> RfMedSamError | None:
    """Why OpenVINO is not asked to run these networks; None: it is."""
    torch_instead = option("backend", "torch")
    if device.type != "cpu":
        remedy = f"Predict with {option('device', 'cpu')}, or with {torch_instead}"
        return UsageError("OpenVINO runs networks on a CPU alone", found=f"the device {device}", remedy=remedy)
    if precision in ("bf16", "fp16"):
        remedy = f"Predict with {option('precision', 'fp32')}, or with {torch_instead}"
        return UsageError("OpenVINO runs networks in fp32 alone", found=f"precision {precision}", remedy=remedy)
    model = sources[0].model
    if not isinstance(model, UNetConfig | LibraryConfig):
        expected = "a U-Net, or a network of a library"
        remedy = f"Predict with {torch_instead}"
        return UsageError("OpenVINO cannot run models of this kind", expected=expected, found=model.kind, remedy=remedy)
    try:
        load_openvino()
    except MissingPackageError as error:
        return error
    return None
