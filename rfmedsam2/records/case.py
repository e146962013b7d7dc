"""What a preprocessed case says about itself."""

from __future__ import annotations

import zlib
from typing import Literal

from rfmedsam2.records.base import Record, VersionedRecord

ThreeInts = tuple[int, int, int]
ThreeFloats = tuple[float, float, float]
Range = tuple[int, int]


class CaseGeometry(Record):
    """From the file's grid to the prepared arrays; enough to put a prediction back."""

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
    """One file of a case, as it was when written."""

    size: int
    crc32: int
    modified_ns: int


class ForegroundClass(Record):
    """Sampled locations of one class, region or of all annotated voxels."""

    key: int
    """Label value; with regions 1, 2, ... in declared order; -1: any annotated voxel (only with an ignore label)."""
    voxels: int
    """How many voxels it has in this case."""
    count: int
    """How many locations were kept."""


class CaseRecord(VersionedRecord):
    """The file CASE.json: written last, so that a case with a record is a finished case."""

    format: Literal[1] = 1
    id: str
    source: str
    """Digest of the source files and of everything in the plan that shapes the arrays."""
    channels: int
    shape: ThreeInts
    geometry: CaseGeometry
    foreground: tuple[ForegroundClass, ...]
    files: dict[str, StoredFile]
    """Suffix -> file."""
    crc32: int | None = None
    """Of all the other fields, see `sealed`; None: written before there was one."""

    def sealed(self) -> CaseRecord:
        """Give the record with its checksum."""
        return self.model_copy(update={"crc32": self._checksum()})

    def is_intact(self) -> bool:
        """Tell whether the fields are those that were sealed."""
        return self.crc32 is None or self.crc32 == self._checksum()

    def _checksum(self) -> int:
        return zlib.crc32(self.model_copy(update={"crc32": None}).model_dump_json().encode())
