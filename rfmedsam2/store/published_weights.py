"""Reading published weights (SAM 2, MobileSAM, LiteMedSAM ...) from .pt, .pth or .safetensors files.

Nothing in them can execute: PyTorch files are read with `weights_only=True`, which accepts plain tensors only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rfmedsam2.errors import CheckpointError, shortlist
from rfmedsam2.system.ordinary_files import require_ordinary

ENVELOPES = ("model", "state_dict", "model_state_dict")
"""Keys under which training programs store the weights beside other entries."""
TORCH_FILES = (b"PK\x03\x04", b"\x80\x02")
"""How files of torch.save begin, the newer and the older kind."""
REMEDY = "Download it again from where it was published"


def read_published(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a published file by name, onto the CPU.

    Weights inside an envelope ({"model": {...}} and the like) are unwrapped.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, not a file of weights, or holds more than tensors.
    """
    start = _first_bytes(path)
    if start[8:9] == b"{":
        content: object = _read_safetensors(path)
    elif start.startswith(TORCH_FILES):
        content = read_torch_file(path)
    else:
        raise _foreign(path, _disguise(start))
    content = _unwrapped(_unwrapped(content))
    if not isinstance(content, Mapping):
        raise _foreign(path, f"a {type(content).__name__}")
    weights = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not weights or len(weights) < len(content):
        others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
        raise _foreign(path, f"entries that are not tensors: {shortlist(others)}" if others else "no tensors")
    return weights


def _unwrapped(content: object) -> object:
    """The content of an envelope, or the content itself if there is none."""
    if not isinstance(content, Mapping):
        return content
    return next((content[name] for name in ENVELOPES if isinstance(content.get(name), Mapping)), content)


def _first_bytes(path: Path) -> bytes:
    try:
        require_ordinary(path)
        with path.open("rb") as stream:
            return stream.read(64)
    except FileNotFoundError:
        raise CheckpointError("The file of weights does not exist", where=path, remedy="Check the path") from None
    except IsADirectoryError:
        raise CheckpointError(
            "Expected a file of weights, found a folder", where=path, remedy="Name the file in it"
        ) from None
    except OSError as error:
        raise CheckpointError(f"The file of weights cannot be read ({error.strerror})", where=path) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The file of weights is damaged ({error})", where=path, remedy=REMEDY) from None


def read_torch_file(path: Path, *, allowed: Sequence[type] = ()) -> Any:
    """The content of a file of torch.save, onto the CPU.

    Args:
        path: the file.
        allowed: classes that it may construct besides tensors, by their names. The unpickler calls these, not what
            the file means, so they can be harmless ones of the same name.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, or would construct anything else.
    """
    if not _first_bytes(path).startswith(TORCH_FILES):
        raise _foreign(path, _disguise(_first_bytes(path)))
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a foreign file: its bytes decide which kind torch's loader raises
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _damaged(path, _reason(error)) from None
        raise CheckpointError(
            "This file holds more than tensors and could execute code, so it is not opened",
            where=path,
            expected="tensors only",
            found=refused[1],
            remedy="Ask its author for a file that holds only the weights",
        ) from None


def _reason(error: Exception) -> str:
    """The error's message; torch's long advice on `weights_only` is left out."""
    words = " ".join(str(error).split())
    return type(error).__name__ if not words or "weights_only" in words else words[:120]


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"The file of weights is damaged or incomplete ({reason})", where=path, remedy=REMEDY)


def _disguise(start: bytes) -> str:
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, the file itself was not downloaded"
    if start.lstrip().startswith(b"<"):
        return "an HTML or XML page, probably an error page of the download"
    if start.startswith(b"\x80"):
        return "a Python pickle that torch did not write"
    return "another kind of file"


def _foreign(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "This is not a file of weights",
        where=path,
        expected="tensors by name in a .pt, .pth or .safetensors file",
        found=found,
        remedy=REMEDY,
    )
