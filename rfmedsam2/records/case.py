"""Records of preprocessed cases and of what is stored beside them: geometry, locations, files and checksums."""

from __future__ import annotations

import hashlib
import zlib
from typing import Literal

from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.system.file_names import FileEnding, Name

ThreeInts = tuple[int, int, int]
ThreeFloats = tuple[float, float, float]
Range = tuple[int, int]


class CaseGeometry(Record):
    """How the arrays follow from the file's grid; enough to map a prediction back."""

    shape_zyx: ThreeInts
    spacing_zyx_mm: ThreeFloats
    origin_xyz_mm: ThreeFloats
    direction: tuple[ThreeFloats, ThreeFloats, ThreeFloats]
    box_zyx: tuple[Range, Range, Range]
    transpose_forward: ThreeInts
    shape_cropped: ThreeInts
    shape_planned: ThreeInts
    spacing_source: ThreeFloats
    spacing_planned: ThreeFloats


class StoredFile(Record):
    """Size and checksum of one file of a case when it was written."""

    size: int
    crc32: int
    modified_ns: int


class SourceFile(Record):
    """Size and digest of a source file when it was read.

    Not a CRC-32: that of a PNG or of an uncompressed gzip file, which hold their own, is the same for any contents.
    """

    size: int
    sha256: str
    modified_ns: int


class ForegroundClass(Record):
    """Sampled locations of one class, one region, or all annotated voxels."""

    key: int
    """Label value; with regions 1, 2, ... in declared order; -1: any annotated voxel (only with an ignore label)."""
    voxels: int
    """Number of its voxels in this case."""
    count: int
    """Number of sampled locations."""


class CaseRecord(VersionedRecord):
    """The file CASE.json: written last, so that a case with a record is a finished case."""

    format: Literal[1] = 1
    id: Name
    source: str
    """Digest of the source files and of everything in the plan that shapes the arrays."""
    sources: dict[str, SourceFile] | None = None
    """Name -> source file that the case was made from; None in files written before it was introduced, whose `source`
    covers modification times instead of contents."""
    channels: int
    shape: ThreeInts
    geometry: CaseGeometry
    foreground: tuple[ForegroundClass, ...]
    files: dict[FileEnding, StoredFile]
    """Suffix -> file."""
    crc32: int | None = None
    """Checksum of all other fields, see `sealed`; None in files written before it was introduced."""

    def sealed(self) -> CaseRecord:
        """The record with its checksum filled in."""
        return self.model_copy(update={"crc32": self._checksum()})

    def is_intact(self) -> bool:
        """Whether the fields match the checksum."""
        return self.crc32 is None or self.crc32 == self._checksum()

    @property
    def contents(self) -> str:
        """Identity of the stored arrays, whenever and by whomever they were written."""
        files = [(file.size, file.crc32) for file in self.files.values()]
        return hashlib.sha256(repr((self.shape, files)).encode()).hexdigest()[:16]

    def _checksum(self) -> int:
        # fields that came later count where they are filled in, so that earlier records keep their checksum
        absent = {"sources"} if self.sources is None else None
        return zlib.crc32(self.model_copy(update={"crc32": None}).model_dump_json(exclude=absent).encode())


class Step0Record(VersionedRecord):
    """Fixed logits of Step 0 for one case, and what they were made from; written after the logits."""

    format: Literal[1] = 1
    id: Name
    case: str
    """Identity of the preprocessed case (`CaseRecord.contents`)."""
    weights: str
    """SHA-256 of the U-Net's weights (`weights_sha256` of its checkpoint)."""
    settings: str
    """Digest of the patch and the sliding window that they were predicted with."""
    channels: int
    shape: ThreeInts
    file: StoredFile

    @property
    def made_from(self) -> tuple[str, str, str]:
        """Case, weights and settings."""
        return self.case, self.weights, self.settings


class ViewsRecord(VersionedRecord):
    """What the cached features of a fold's augmented views were made from."""

    format: Literal[1] = 1
    settings: dict[str, str]
    """By name: weights of the encoder, sizes, augmentation, Step 0."""
