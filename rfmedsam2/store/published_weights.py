"""Files of published weights (SAM 2, MobileSAM, LiteMedSAM ...): PyTorch's .pt and .pth, or safetensors.

Nothing in them can execute: a PyTorch file is read by torch's loader for plain tensors, which refuses all else.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rfmedsam2.errors import CheckpointError

ENVELOPES = ("model", "state_dict", "model_state_dict")
"""Names under which training programs put the weights beside other things."""
REMEDY = "Download it again from where it was published"


def read_published(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a published file by name, to the CPU.

    Weights that lie in an envelope ({"model": {...}} and the like) are taken out of it.

    Raises:
        CheckpointError: missing, unreadable, damaged, not a file of weights, or one that holds more than tensors.
    """
    start = _first_bytes(path)
    if start[8:9] == b"{":
        content: object = _read_safetensors(path)
    elif start.startswith((b"PK\x03\x04", b"\x80")):
        content = _read_torch(path)
    else:
        raise _foreign(path, _disguise(start))
    while isinstance(content, Mapping):
        inner = next((content[name] for name in ENVELOPES if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise _foreign(path, f"a {type(content).__name__}")
    weights = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not weights or len(weights) < len(content):
        others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
        raise _foreign(path, f"entries that are none: {', '.join(others[:5])}" if others else "no tensors at all")
    return weights


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(64)
    except FileNotFoundError:
        raise CheckpointError("There is no such file of weights", where=path, remedy="Check the path") from None
    except IsADirectoryError:
        raise CheckpointError("A folder cannot be read as weights", where=path, remedy="Name the file in it") from None
    except OSError as error:
        raise CheckpointError(f"The file of weights cannot be read ({error.strerror})", where=path) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The file of weights is damaged ({error})", where=path, remedy=REMEDY) from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Weights only" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                "This file holds more than tensors, which could execute code: it is not opened",
                where=path,
                found=_refused(error),
                remedy="Ask its author for a file of the weights alone, or save torch.load(...)['model'] where you"
                " trust it",
            ) from None
        raise _damaged(path, error) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None


def _refused(error: Exception) -> str | None:
    """Give the name of what torch refused to load, from its message."""
    words = [word.strip("'`,.\"") for word in str(error).split()]
    return next((following for word, following in zip(words, words[1:], strict=False) if word == "GLOBAL"), None)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return CheckpointError(f"The file of weights is damaged or incomplete ({reason})", where=path, remedy=REMEDY)


def _disguise(start: bytes) -> str:
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer: the file itself was not downloaded"
    if start.lstrip().startswith(b"<"):
        return "an HTML or XML page: probably an error page of the download"
    return "another kind of file"


def _foreign(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "This is not a file of weights",
        where=path,
        expected="tensors by name in a .pt, .pth or .safetensors file",
        found=found,
        remedy=REMEDY,
    )
