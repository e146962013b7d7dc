"""Which device a name means: for training and predicting alike."""

from __future__ import annotations

import torch

from rfmedsam2.errors import UsageError


def choose_device(wanted: str, *, local_rank: int = 0) -> torch.device:
    """Turn a name into a device; auto takes CUDA, else MPS, else the CPU.

    Args:
        wanted: auto, cpu, cuda, cuda:N or mps.
        local_rank: of a process on this machine: each gets its own card unless one is named.

    Raises:
        UsageError: this is no device, or not one of this machine.
    """
    if wanted == "auto":
        mps = torch.backends.mps.is_available()
        wanted = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError("No such device", where=wanted, expected="auto, cpu, cuda, cuda:N or mps")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
    if (device.type == "cuda" and (device.index or 0) >= cards) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise UsageError(
            "This device is not here",
            where=device,
            found=f"{cards} CUDA card(s)",
            remedy="Choose --device cpu, or start no more processes than there are cards",
        )
    return device
