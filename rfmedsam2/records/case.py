"""What a preprocessed case says about itself."""

from __future__ import annotations

from typing import Literal

from rfmedsam2.records.base import Record

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


class CaseRecord(Record):
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
