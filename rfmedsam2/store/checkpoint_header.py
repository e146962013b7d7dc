"""Reading the header of a checkpoint file without torch: record, training state and digests.

A checkpoint is one safetensors file (8 bytes of header length, a JSON header, tensor bytes). Nothing in it can
execute. Its metadata hold the record, the training state, and digests of the record and of everything but the weights.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rfmedsam2.errors import CheckpointError, RecordError
from rfmedsam2.records.base import OtherKindError
from rfmedsam2.records.checkpoint import CheckpointRecord, TrainedRecord
from rfmedsam2.system.json_text import JsonError, parse_json
from rfmedsam2.system.ordinary_files import require_ordinary

RecordT = TypeVar("RecordT", bound=TrainedRecord)

FINAL, BEST, LATEST = (f"checkpoint_{name}.safetensors" for name in ("final", "best", "latest"))
CHECKPOINTS = (FINAL, BEST, LATEST)
"""File names of a fold's checkpoints, in order of preference."""
NNUNET_FINAL, NNUNET_BEST, NNUNET_LATEST = (f"checkpoint_{name}.pth" for name in ("final", "best", "latest"))
NNUNET_CHECKPOINTS = (NNUNET_FINAL, NNUNET_BEST, NNUNET_LATEST)
"""The same of nnU-Net."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""
METADATA = {"format", "record", "record_sha256", "state", "rest_sha256"}
REMEDY = (
    "Use a checkpoint (.safetensors) that rfmed_train or samhq_train wrote, or import a model archive with "
    "rfmed_import_model"
)
DISGUISES = (
    (
        b"PK\x03\x04",
        "a zip archive, as torch.save writes (.pth, .pt): such files can execute code and are never opened",
    ),
    (b"\x80", "a Python pickle: such files can execute code and are never opened"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a git-lfs pointer, the file itself was not downloaded"),
    (b"<", "an HTML or XML page, probably an error page of the download"),
)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a training in a folder goes on from; None if none was written."""
    return next((path for name in (LATEST, FINAL) if (path := folder / name).is_file()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointHeader(Generic[RecordT]):
    """The checkpoint's header, which precedes the tensor bytes."""

    record: RecordT
    state: dict[str, Any]
    rest_sha256: str
    """Digest of the state and of every tensor that is not a weight."""
    tensors: tuple[str, ...]
    """Tensor names with their group: model/..., optimizer/..., random/..."""


def read_header(path: Path, kind: type[RecordT]) -> CheckpointHeader[RecordT]:
    """Read and check the header and that the file's length matches it; tensor bytes are not read.

    Args:
        path: the checkpoint.
        kind: class of its record, by what was trained.

    Raises:
        CheckpointError: the file is missing, truncated, not one of ours (also a renamed pickle or zip), or of an
            unknown format.
    """
    header = _json_header(path)
    return parse_header(header.pop("__metadata__", None), tuple(header), kind, where=path)


def parse_header(
    metadata: object, tensors: tuple[str, ...], kind: type[RecordT], *, where: Path
) -> CheckpointHeader[RecordT]:
    """Check the metadata of a checkpoint that is open already.

    Args:
        metadata: the safetensors metadata, text by name.
        tensors: names of the tensors.
        kind: class of its record.
        where: the file, for messages.

    Raises:
        CheckpointError: it is not one of ours, damaged, or of an unknown format.
    """
    wanted = ("record", "state", "rest_sha256")
    if not isinstance(metadata, dict) or not all(isinstance(metadata.get(k), str) for k in wanted):
        raise CheckpointError(
            "This safetensors file is not a checkpoint of this package",
            where=where,
            expected="a header with record and state",
            found=f"{len(tensors)} tensors without record and state",
            remedy=REMEDY,
        )
    # files written by the first version have no digest of the record
    digest = metadata.get("record_sha256", None)
    if not metadata.keys() <= METADATA or (digest is not None and digest != record_sha256(metadata["record"])):
        raise CheckpointError(
            "The record in this checkpoint does not match its digest: the file was damaged or modified",
            where=where,
            remedy="Copy it again, or use another checkpoint of the same folder",
        )
    try:
        record = kind.from_json(metadata["record"], where=where)
        state = parse_json(metadata["state"])
    except OtherKindError as error:
        raise CheckpointError(
            f"This is not a checkpoint of {kind.trained_by}",
            where=where,
            expected=f"{error.expected} in its plan",
            found=error.found,
            remedy=f"Give one that {kind.trained_by} wrote",
        ) from None
    except RecordError as error:
        raise CheckpointError(f"The checkpoint's record cannot be used ({error})", where=where) from None
    except JsonError as error:
        raise CheckpointError(f"The checkpoint's training state is damaged ({error})", where=where) from None
    if not isinstance(state, dict):
        raise CheckpointError("The checkpoint's training state is damaged", where=where, found=type(state).__name__)
    return CheckpointHeader(record=record, state=state, rest_sha256=metadata["rest_sha256"], tensors=tensors)


def record_sha256(text: str) -> str:
    """Digest of a record's text in the header."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_record_of(path: Path) -> CheckpointRecord:
    """Read the record of a volume model's checkpoint from its header (milliseconds, no torch).

    Raises:
        CheckpointError: as in `read_header`.
    """
    return read_header(path, CheckpointRecord).record


def _json_header(path: Path) -> dict[str, Any]:
    """Read the JSON header; checks the prefix, the JSON and the file's length."""
    try:
        size = require_ordinary(path).st_size
        with path.open("rb") as stream:
            start = stream.read(32)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 9 else -1
            plausible = start[8:9] == b"{" and 2 <= length <= MAX_HEADER_BYTES
            if not plausible:
                raise _not_safetensors(path, start, size)
            if 8 + length > size:
                raise _truncated(path, f"at least {8 + length} bytes", size)
            stream.seek(8)
            text = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(
            "The checkpoint does not exist", where=path, remedy="Train first, or check the path"
        ) from None
    except OSError as error:
        raise CheckpointError(f"The checkpoint cannot be read ({error.strerror})", where=path) from error
    try:
        header = parse_json(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max([int(end) for end in ends], default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            "The header of this checkpoint is damaged", where=path, found=type(error).__name__, remedy=REMEDY
        ) from None
    if size != expected:
        raise _truncated(path, f"{expected} bytes", size)
    return header


def _truncated(path: Path, expected: str, size: int) -> CheckpointError:
    return CheckpointError(
        "The checkpoint is truncated or was modified",
        where=path,
        expected=expected,
        found=f"{size} bytes",
        remedy="Copy it again, or use another checkpoint of the same folder",
    )


def _not_safetensors(path: Path, start: bytes, size: int) -> CheckpointError:
    found = next((what for prefix, what in DISGUISES if start.startswith(prefix)), f"{size} bytes of something else")
    if size == 0:
        found = "an empty file"
    return CheckpointError(
        "This is not a checkpoint", where=path, expected="a safetensors file", found=found, remedy=REMEDY
    )
