"""Checkpoint files: weights and their record and, to resume training, optimizer and RNG state.

One safetensors file each: tensors "model/NAME", "optimizer/...", "random/..."; metadata "record" (a TrainedRecord),
"state" (plain JSON) and digests of both. Nothing is unpickled; digests are checked when reading.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, overload

import torch
from safetensors import SafetensorError, safe_open

from rfmedsam2.errors import CheckpointError
from rfmedsam2.records.checkpoint import CheckpointRecord, TrainedRecord
from rfmedsam2.store.checkpoint_header import CheckpointHeader, RecordT, parse_header, read_header, record_sha256
from rfmedsam2.system.atomic import atomic, writing_to

MODEL = "model/"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Safetensors' dtype names, in the order of the bytes in the file, so that every tensor starts aligned."""


def write_checkpoint(
    path: Path, record: RecordT, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> RecordT:
    """Write a checkpoint atomically; it is on disk (fsync) when this returns.

    Tensors may be on any device, share memory or be strided; they are copied to the CPU one at a time.

    Args:
        path: the file, .safetensors.
        record: the record; `weights_sha256` is filled in here.
        tensors: tensors by name with group, such as "model/encoder.weight".
        state: training state; any value that JSON can hold.

    Returns:
        The record as written.

    Raises:
        CheckpointError: a tensor's dtype is not supported by the format.
        StoreError: the folder cannot be written, the disk is full.
    """
    weights = {name.removeprefix(MODEL): t for name, t in tensors.items() if name.startswith(MODEL)}
    record = record.model_copy(update={"weights_sha256": weights_sha256(weights)})
    record_text, state_text = json.dumps(record.model_dump(mode="json")), json.dumps(dict(state))
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "record": record_text,
            "record_sha256": record_sha256(record_text),
            "state": state_text,
            "rest_sha256": _rest_sha256(state_text, tensors),
        }
    }
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, writing_to(path), temporary.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            stream.write(_bytes(tensors[name]))
    return record


@overload
def read_weights(path: Path) -> tuple[CheckpointRecord, dict[str, torch.Tensor]]: ...
@overload
def read_weights(path: Path, kind: type[RecordT]) -> tuple[RecordT, dict[str, torch.Tensor]]: ...
def read_weights(
    path: Path, kind: type[TrainedRecord] = CheckpointRecord
) -> tuple[TrainedRecord, dict[str, torch.Tensor]]:
    """Read the record and the model's tensors by their state-dict names, onto the CPU; nothing else is read.

    Both are of the same step, also where a training replaces the file meanwhile.

    Raises:
        CheckpointError: as in `read_header`, and if the weights do not match the record's digest.
    """
    with _opened(path, kind) as file:
        return file.header.record, file.weights()


@overload
def read_all(path: Path) -> tuple[CheckpointRecord, dict[str, torch.Tensor], dict[str, Any]]: ...
@overload
def read_all(path: Path, kind: type[RecordT]) -> tuple[RecordT, dict[str, torch.Tensor], dict[str, Any]]: ...
def read_all(
    path: Path, kind: type[TrainedRecord] = CheckpointRecord
) -> tuple[TrainedRecord, dict[str, torch.Tensor], dict[str, Any]]:
    """Read the record, all tensors (names with their group) and the state; all digests are checked.

    Raises:
        CheckpointError: as in `read_weights`, and if optimizer or RNG state do not match their digest.
    """
    with _opened(path, kind) as file:
        header = file.header
        tensors = {MODEL + name: tensor for name, tensor in file.weights().items()}
        tensors |= {name: file.tensors.get_tensor(name) for name in header.tensors if not name.startswith(MODEL)}
    if _rest_sha256(json.dumps(header.state), tensors) != header.rest_sha256:
        raise _changed(path, "training state")
    return header.record, tensors, header.state


def weights_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes: the identity of a model, independent of its device."""
    return _sha256("", state_dict)


@dataclass(frozen=True)
class _OpenedCheckpoint(Generic[RecordT]):
    """Header and tensors of one opened file: `tensors` stays on it when another takes its place."""

    path: Path
    header: CheckpointHeader[RecordT]
    tensors: Any

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors by their state-dict names, checked."""
        names = [name for name in self.header.tensors if name.startswith(MODEL)]
        weights = {name.removeprefix(MODEL): self.tensors.get_tensor(name) for name in names}
        if weights_sha256(weights) != self.header.record.weights_sha256:
            raise _changed(self.path, "weights")
        return weights


@contextmanager
def _opened(path: Path, kind: type[RecordT]) -> Iterator[_OpenedCheckpoint[RecordT]]:
    read_header(path, kind)  # says what a file is that is not a checkpoint
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            header = parse_header(tensors.metadata(), tuple(tensors.keys()), kind, where=path)
            yield _OpenedCheckpoint(path, header, tensors)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The checkpoint's tensors cannot be read ({error})", where=path) from None


def _changed(path: Path, part: str) -> CheckpointError:
    return CheckpointError(
        f"The {part} in this checkpoint did not match the stored digest: the file was damaged or modified",
        where=path,
        remedy="Copy it again, or use another checkpoint of the same folder",
    )


def _rest_sha256(state_text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return _sha256(state_text, {name: t for name, t in tensors.items() if not name.startswith(MODEL)})


def _sha256(prefix: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(prefix.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, _dtype(name, tensor), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _dtype(name: str, tensor: object) -> str:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        found = f"{tensor.dtype} {tensor.layout}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CheckpointError(
            "A checkpoint cannot hold this value",
            where=name,
            expected="a dense tensor of a plain number type",
            found=found,
        )
    return DTYPES[tensor.dtype]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order; a view if it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
