"""Choosing the torch device for training and prediction."""

from __future__ import annotations

import torch

from rfmedsam2.errors import UsageError


def choose_device(wanted: str | torch.device, *, local_rank: int = 0) -> torch.device:
    """Turn a name into a device; auto takes CUDA, else MPS, else the CPU.

    Args:
        wanted: auto, cpu, cuda, cuda:N or mps.
        local_rank: rank of this process on this machine; selects the GPU unless `wanted` names one.

    Raises:
        UsageError: `wanted` is not a device, or the device does not exist on this machine.
    """
    if wanted == "auto":
        mps = torch.backends.mps.is_available()
        wanted = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError("Unknown device", where=wanted, expected="auto, cpu, cuda, cuda:N or mps")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
    if (device.type == "cuda" and (device.index or 0) >= gpus) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise UsageError(
            "The device is not available",
            where=device,
            found=f"{gpus} CUDA GPU(s)",
            remedy="Choose the device cpu, or "
            + ("start at most one process per GPU" if gpus else "install the torch that fits your GPU"),
        )
    return device
