"""Model archives: a zip of checkpoints and records with a manifest, checked before and while it is unpacked.

Nothing in an archive is trusted: member names must match a strict pattern, sizes and hashes must be the manifest's, and
a rejected archive leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rfmedsam2.errors import CheckpointError, RecordError, RfMedSamError, shortlist
from rfmedsam2.records.archive import ArchivedFile, Manifest
from rfmedsam2.system.atomic import atomic, writing_to
from rfmedsam2.system.file_names import is_file_name

MANIFEST = "manifest.json"
MEMBER = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9_.-]{0,99}/){0,2}[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.(?:safetensors|json)")
"""Names of members: relative, at most two folders deep, plain characters, .safetensors or .json."""
NNUNET_MEMBER = re.compile(
    r"(?:.*/)?(?:(?:plans|dataset|dataset_fingerprint)\.json|fold_(?:[0-9]{1,4}|all)/checkpoint_(?:final|best)\.pth)"
)
"""What is unpacked of an archive of nnU-Net's; its other files are left in it."""
MAX_MEMBERS = 200
MAX_BYTES = 64 << 30
"""Limit for all members together, unpacked; far above any model, far below a zip bomb."""
MAX_JSON_BYTES = 64 << 20
MAX_RATIO = 100
"""Largest compression ratio of a member beyond its first MiB: weights reach 1.1, a zip bomb 1000."""
_DATE = (1980, 1, 1, 0, 0, 0)
_BLOCK = 1 << 20
_BROKEN = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,
    # offsets in damaged directories point before the file's beginning, or past its end
    OSError,
    ValueError,
    OverflowError,
)


def describe(files: Mapping[str, Path]) -> tuple[ArchivedFile, ...]:
    """Name, size and SHA-256 of files, sorted by member name."""
    described = []
    for name in sorted(files):
        with files[name].open("rb") as stream:
            digest, size = _sha256(stream)
        described.append(ArchivedFile(name=name, bytes=size, sha256=digest))
    return tuple(described)


def write_archive(path: Path, manifest: Manifest, files: Mapping[str, Path]) -> None:
    """Write an archive atomically; equal files and manifest give equal bytes.

    Args:
        path: the zip file to write.
        manifest: names every member of `files` (see `describe`).
        files: member name -> file.

    Raises:
        CheckpointError: a member name that `unpack_archive` would reject.
        StoreError: the folder cannot be written, the disk is full.
    """
    for name in files:
        _checked_name(name, where=path)
    with atomic(path) as temporary, writing_to(path), zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(_entry(MANIFEST), manifest.to_json() + "\n")
        for name in sorted(files):
            # weights hardly compress: stored, which saves time on both sides
            with files[name].open("rb") as source, archive.open(_entry(name), "w", force_zip64=True) as target:
                while block := source.read(_BLOCK):
                    target.write(block)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of an archive and check names and sizes of all members against it; no weights are read.

    Raises:
        CheckpointError: not a zip, truncated, not a model archive, unsafe names, sizes that disagree.
    """
    with _opened(path) as archive:
        return _manifest(path, archive)


def unpack_archive(path: Path, folder: Path) -> Manifest:
    """Unpack into an empty folder, verifying every hash; the caller removes the folder after an error.

    Raises:
        CheckpointError: as in `read_manifest`, and if the bytes of a member do not match the manifest.
        StoreError: the folder cannot be written, the disk is full.
    """
    with _opened(path) as archive:
        manifest = _manifest(path, archive)
        for file in manifest.files:
            target = folder / file.name
            with writing_to(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                digest, size = _copy(archive, file, target)
            if (digest, size) != (file.sha256, file.bytes):
                raise CheckpointError(
                    "A file in the archive does not match the manifest",
                    where=f"{path}: {file.name}",
                    expected=f"{file.bytes} bytes with SHA-256 {file.sha256[:16]}...",
                    found=f"{size} bytes with {digest[:16]}...",
                    remedy="The archive was damaged or modified: download or export it again",
                )
    return manifest


def is_our_archive(path: Path) -> bool:
    """Whether a zip file has a manifest of `write_archive`.

    Raises:
        CheckpointError: it does not exist, or is not a zip file.
    """
    with _opened(path) as archive:
        return MANIFEST in archive.namelist()


def unpack_nnunet_archive(path: Path, folder: Path) -> None:
    """Unpack the models of an archive by nnUNetv2_export_model_to_zip into an empty folder: plans and checkpoints.

    Raises:
        CheckpointError: not a zip, truncated, without a model of nnU-Net, unsafe names or sizes.
        StoreError: the folder cannot be written, the disk is full.
    """
    with _opened(path) as archive:
        members = [member for member in archive.infolist() if NNUNET_MEMBER.fullmatch(member.filename)]
        if not any(member.filename.endswith(".pth") for member in members):
            raise CheckpointError(
                "This zip file holds no trained model",
                where=path,
                expected=f"{MANIFEST}, or plans.json and fold_0/checkpoint_final.pth of nnU-Net",
                found=shortlist(archive.namelist()) or "an empty zip",
                remedy="Archives are made with rfmed_export_model, or with nnUNetv2_export_model_to_zip",
            )
        if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > MAX_BYTES:
            raise _too_large(path, members)
        _require_different_names(path, members)
        for member in members:
            parts = member.filename.split("/")
            if not all(is_file_name(part) for part in parts):
                raise CheckpointError(
                    "The archive holds a file whose name is not allowed", where=path, found=repr(member.filename)
                )
            _checked_kind(member, where=path)
            target = folder.joinpath(*parts)
            with writing_to(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("xb") as out:
                    shutil.copyfileobj(source, out, _BLOCK)


def _too_large(path: Path, members: Sequence[zipfile.ZipInfo]) -> CheckpointError:
    return CheckpointError(
        "The archive is too large to be a model",
        where=path,
        expected=f"at most {MAX_MEMBERS} files and {MAX_BYTES >> 30} GiB",
        found=f"{len(members)} files and {sum(member.file_size for member in members) / 2**30:.1f} GiB",
    )


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except RfMedSamError:
        raise
    except FileNotFoundError:
        raise CheckpointError("The archive does not exist", where=path) from None
    except IsADirectoryError:
        raise CheckpointError("Expected an archive, found a folder", where=path) from None
    except _BROKEN as error:
        raise CheckpointError(
            f"The archive is truncated or not a zip file ({error})", where=path, remedy="Copy or export it again"
        ) from None


def _manifest(path: Path, archive: zipfile.ZipFile) -> Manifest:
    """Read the manifest and make every check that does not need unpacking."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if MANIFEST not in names:
        raise CheckpointError(
            "This zip file is not a model archive",
            where=path,
            expected=f"a member {MANIFEST}",
            found=shortlist(names) or "an empty zip",
            remedy="Archives are made with rfmed_export_model",
        )
    if len(members) > MAX_MEMBERS or sum(m.file_size for m in members) > MAX_BYTES:
        raise _too_large(path, members)
    for member in members:
        _checked_member(member, where=path)
    _require_different_names(path, members)
    try:
        manifest = Manifest.from_json(archive.read(MANIFEST), where=f"{path}: {MANIFEST}")
    except RecordError as error:
        raise CheckpointError(str(error)) from None
    listed = {file.name: file.bytes for file in manifest.files}
    found = {member.filename: member.file_size for member in members if member.filename != MANIFEST}
    if listed != found or len(listed) != len(manifest.files):
        differing = sorted(set(listed.items()) ^ set(found.items()))
        raise CheckpointError(
            "The archive does not hold what its manifest lists",
            where=path,
            found=", ".join(dict.fromkeys(name for name, _ in differing)),
            remedy="The archive was damaged or modified: download or export it again",
        )
    return manifest


def _checked_member(member: zipfile.ZipInfo, *, where: Path) -> None:
    _checked_name(member.filename, where=where)
    _checked_kind(member, where=where)


def _require_different_names(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    counts = Counter(member.filename.lower() for member in members)
    for name in (name for name, count in counts.items() if count > 1):
        raise CheckpointError("The archive holds two files of the same name", where=path, found=name)


def _checked_kind(member: zipfile.ZipInfo, *, where: Path) -> None:
    """Check that a member is a plain file of a plausible size."""
    mode = member.external_attr >> 16
    if mode & 0o170000 not in (0, 0o100000):
        raise CheckpointError(
            "The archive holds something other than a regular file", where=where, found=member.filename
        )
    if member.flag_bits & 0x1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(
            "The archive is encrypted or uses an unknown compression", where=where, found=member.filename
        )
    if member.file_size > MAX_RATIO * member.compress_size + (1 << 20):
        raise CheckpointError(
            "The archive holds a file with too high a compression ratio to be weights",
            where=where,
            expected=f"at most {MAX_RATIO} to 1",
            found=f"{member.filename}: {member.file_size} bytes compressed to {member.compress_size}",
            remedy="Do not trust this archive; ask its source for one made with rfmed_export_model",
        )
    if member.filename.endswith(".json") and member.file_size > MAX_JSON_BYTES:
        raise CheckpointError("The archive holds a JSON file that is too large", where=where, found=member.filename)


def _checked_name(name: str, *, where: Path) -> None:
    if not MEMBER.fullmatch(name) or ".." in name:
        raise CheckpointError(
            "The archive holds a file that is not allowed in a model archive",
            where=where,
            expected="relative names of .safetensors and .json files, such as fold_0/checkpoint_final.safetensors",
            found=repr(name),
            remedy="Do not trust this archive; ask its source for one made with rfmed_export_model",
        )


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=_DATE)
    entry.create_system = 3
    entry.external_attr = 0o100644 << 16
    return entry


def _copy(archive: zipfile.ZipFile, file: ArchivedFile, target: Path) -> tuple[str, int]:
    """Unpack one member, writing at most one byte more than the manifest says."""
    digest, size = hashlib.sha256(), 0
    with archive.open(file.name) as source, target.open("xb") as out:
        while size <= file.bytes and (block := source.read(min(_BLOCK, file.bytes - size + 1))):
            digest.update(block)
            size += len(block)
            out.write(block)
    return digest.hexdigest(), size


def _sha256(stream: IO[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while block := stream.read(_BLOCK):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size
