"""The global RNGs (torch, its device, numpy, Python): capture as tensors, restore, seed, preserve."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


def capture(device: torch.device = CPU) -> dict[str, Tensor]:
    """The state of all RNGs as CPU tensors: torch, numpy, python and, if `device` has its own, device."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - augmentation uses the global RNG
    _, keys, position, has_gauss, gauss = numpy_state
    _, words, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "python": torch.tensor(words),
        "gauss": torch.tensor([gauss, math.nan if python_gauss is None else python_gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["device"] = torch.mps.get_rng_state()
    return state


def restore(state: dict[str, Tensor], device: torch.device = CPU) -> None:
    """Restore all RNGs to a captured state."""
    torch.set_rng_state(state["torch"])
    *keys, position, has_gauss = state["numpy"].tolist()
    gauss, python_gauss = state["gauss"].tolist()
    numpy_state = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss)
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(python_gauss) else python_gauss))
    if device.type == "cuda" and "device" in state:
        torch.cuda.set_rng_state(state["device"], device)
    elif device.type == "mps" and "device" in state:
        torch.mps.set_rng_state(state["device"])


@contextmanager
def preserved(device: torch.device = CPU) -> Iterator[None]:
    """Restore all RNGs after the `with` block."""
    state = capture(device)
    try:
        yield
    finally:
        restore(state, device)


def seed_all(*seed: int, device: torch.device = CPU) -> None:
    """Seed all RNGs from a tuple of integers; different tuples give independent streams."""
    words = np.random.SeedSequence([number & (2**64 - 1) for number in seed]).generate_state(6)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])  # noqa: NPY002
    torch_seed = int(words[4]) << 31 | int(words[5]) >> 1
    torch.default_generator.manual_seed(torch_seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(torch_seed)
    elif device.type == "mps":
        torch.mps.manual_seed(torch_seed)
