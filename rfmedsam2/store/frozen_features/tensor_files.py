"""Files of tensors that can be made again: safetensors with a digest, and with a note of what they were made from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rfmedsam2.errors import CheckpointError
from rfmedsam2.store.checkpoints import weights_sha256
from rfmedsam2.system.atomic import atomic, writing_to

ANOTHER = "belongs to another frame or network"
DAMAGED = "is damaged (its digest does not match)"


class UnusableTensorsError(Exception):
    """A file that must be made again; the text says why, after the file's name."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors atomically, with what they were made from.

    Raises:
        StoreError: the folder cannot be written or the disk is full.
    """
    content = save(dict(tensors), {"format": "pt", **about, "sha256": weights_sha256(tensors)})
    with atomic(path) as temporary, writing_to(path):
        temporary.write_bytes(content)


def read_tensors(path: Path, about: Mapping[str, str], names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file that was made from `about`; their names must be `names`, if these are given.

    Raises:
        FileNotFoundError: there is no file.
        UnusableTensorsError: it was made from something else, or is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            metadata = stream.metadata() or {}
            if names is not None and set(stream.keys()) != set(names):
                raise UnusableTensorsError(ANOTHER)
            if any(metadata.get(key) != value for key, value in about.items()):
                raise UnusableTensorsError(ANOTHER)
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
        if weights_sha256(tensors) != metadata.get("sha256"):
            raise UnusableTensorsError(DAMAGED)
    except FileNotFoundError:
        raise
    except (SafetensorError, CheckpointError, OSError) as error:
        raise UnusableTensorsError(f"cannot be read ({error})") from error
    return tensors


def made_from(path: Path) -> dict[str, str]:
    """What a file says that it was made from; empty if there is none, or it cannot be read."""
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            return stream.metadata() or {}
    except (SafetensorError, OSError):
        return {}
