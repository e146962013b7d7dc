"""Preprocessed cases: compressed arrays in patch-sized chunks, sampled foreground locations, and a record.

CASE.b2nd (image, float32), CASE_label.b2nd (int8 or int16), CASE_foreground.npy (flat indices) and CASE.json, which is
written last: a case is finished when its record matches its files. The record names them, because the image of a case
whose id ends like another's file has another name (`_image_suffix`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2.errors import RecordError, StoreError
from rfmedsam2.geometry import Shape
from rfmedsam2.records.case import CaseGeometry, CaseRecord, ForegroundClass, SourceFile
from rfmedsam2.store.packed_arrays import Look, Ranges, as_written, looks_unchanged, packed, put, read_packed, verified
from rfmedsam2.system.atomic import PARTIAL, read_record, write_record, writing_to

IMAGE, LABEL, FOREGROUND, RECORD = ".b2nd", "_label.b2nd", "_foreground.npy", ".json"
OTHER_IMAGE = ".image.b2nd"
REBUILT = "Run rfmed_plan_and_preprocess again: it rebuilds damaged cases"

Location = tuple[int, int, np.ndarray]
"""(key, number of voxels in the case, sampled flat indices) of one class."""


@dataclass(frozen=True, kw_only=True)
class StoredCase:
    """A finished case; arrays are read on demand, one patch at a time.

    No file stays open between reads, so an instance may be pickled or inherited by a forked process. Before the first
    read from a file, and whenever its size or modification time has changed, the whole file is compared with its
    checksum; an unpickled instance does this again. So a case that is rebuilt while it is read is an error, and never
    a patch of the wrong place.
    """

    folder: Path
    record: CaseRecord

    @property
    def id(self) -> str:
        """Name of the case."""
        return self.record.id

    @property
    def shape(self) -> Shape:
        """Voxels along the planned axes."""
        return self.record.shape

    @property
    def channels(self) -> int:
        """Channels of the image."""
        return self.record.channels

    @property
    def properties(self) -> CaseGeometry:
        """How the case was cropped, transposed and resampled."""
        return self.record.geometry

    @cached_property
    def foreground(self) -> dict[int, np.ndarray]:
        """Key (see `ForegroundClass`) -> flat indices into (a, b, c), memory-mapped."""
        places = np.load(self._verified(FOREGROUND), mmap_mode="r", allow_pickle=False)
        stops = np.cumsum([entry.count for entry in self.record.foreground])
        return {
            entry.key: places[stop - entry.count : stop]
            for entry, stop in zip(self.record.foreground, stops.tolist(), strict=True)
        }

    def image_patch(self, box: Ranges) -> np.ndarray:
        """Read a patch of the image, (C, ...) float32, given by half-open ranges inside the volume."""
        suffix = OTHER_IMAGE if OTHER_IMAGE in self.record.files else IMAGE
        return self._read(suffix, (slice(None), *(slice(*limits) for limits in box)))

    def label_patch(self, box: Ranges) -> np.ndarray:
        """Read a patch of the label map, (...) int16, given by half-open ranges inside the volume."""
        return self._read(LABEL, tuple(slice(*limits) for limits in box)).astype(np.int16, copy=False)

    def image(self) -> np.ndarray:
        """Read the whole image, (C, a, b, c) float32."""
        return self.image_patch([(0, n) for n in self.shape])

    def label(self) -> np.ndarray:
        """Read the whole label map, (a, b, c) int16."""
        return self.label_patch([(0, n) for n in self.shape])

    def _read(self, suffix: str, ranges: tuple[slice, ...]) -> np.ndarray:
        path = self._verified(suffix)
        patch = read_packed(path, ranges, what="A preprocessed case", remedy=REBUILT)
        self._verified(suffix)  # once more: the file may have been replaced meanwhile
        return patch

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "record": self.record}

    @cached_property
    def _seen(self) -> dict[Path, Look]:
        """How the files looked that were already compared with their checksums."""
        return {}

    def _verified(self, suffix: str) -> Path:
        """Path of a file of this case, compared with its checksum unless it looks as it did then.

        Raises:
            StoreError: the file is missing or differs from what was written.
        """
        path = self.folder / (self.id + suffix)
        if not verified(path, self.record.files.get(suffix), self._seen):
            raise self._unusable(path)
        return path

    def _unusable(self, path: Path) -> StoreError:
        """The error about a file that is not what the record says."""
        try:
            rebuilt = read_record(self.folder / (self.id + RECORD), CaseRecord).files != self.record.files
        except RecordError:
            rebuilt = False
        if rebuilt:
            return StoreError(
                "A preprocessed case was rebuilt while it was being read",
                where=path,
                remedy="Run the same command again, but not while rfmed_plan_and_preprocess works on these cases",
            )
        return StoreError("A file of a preprocessed case is damaged or missing", where=path, remedy=REBUILT)


class CaseStore:
    """All preprocessed cases of one stage of a plan.

    Args:
        folder: folder of the cases; created when the first case is written.
        patch_size: patch size of the stage (2 or 3 entries), from which the chunk shape follows. Used for writing only.
    """

    def __init__(self, folder: Path, patch_size: Sequence[int] = (128, 128, 128)) -> None:
        self.folder = Path(folder)
        self._patch = (1, *patch_size) if len(patch_size) == 2 else tuple(patch_size)

    def ids(self) -> tuple[str, ...]:
        """Names of all cases with a record, sorted."""
        # partial files of a killed run have the same ending
        names = (path.name for path in self.folder.glob("*" + RECORD) if not path.name.startswith(PARTIAL))
        return tuple(sorted(name.removesuffix(RECORD) for name in names))

    def record(self, name: str) -> CaseRecord | None:
        """The record of a case; None if it is missing or damaged. Its files may be missing (`looks_complete`)."""
        try:
            record = self._record(name)
        except RecordError:
            return None
        return record if record.id == name else None

    def open(self, name: str) -> StoredCase:
        """Open a finished case.

        Raises:
            StoreError: the case does not exist, or its record is damaged.
        """
        try:
            record = self._record(name)
        except RecordError as error:
            raise StoreError(
                "A preprocessed case is missing or its record is damaged",
                where=self.folder / (name + RECORD),
                remedy="Run rfmed_plan_and_preprocess for this dataset and plan",
            ) from error
        return StoredCase(folder=self.folder, record=record)

    def looks_complete(self, name: str) -> bool:
        """Whether the case exists and its files look unchanged; fast.

        Sizes are always compared, contents only where a modification time has changed. Bits that changed on disk are
        noticed by `is_complete`, and when the case is read.
        """
        record = self.record(name)
        return record is not None and all(
            looks_unchanged(self.folder / (name + suffix), file) for suffix, file in record.files.items()
        )

    def has_any_file(self, name: str) -> bool:
        """Whether any file of this case exists."""
        return any((self.folder / (name + suffix)).exists() for suffix in _suffixes(name))

    def is_complete(self, name: str, source: str) -> bool:
        """Whether the case was made from this source; reads and compares all of its files (1 to 4 GB/s)."""
        record = self.record(name)
        return (
            record is not None
            and record.source == source
            and all(as_written(self.folder / (name + suffix), file) for suffix, file in record.files.items())
        )

    def note_sources(self, name: str, source: str, sources: Mapping[str, SourceFile]) -> None:
        """Keep new modification times of source files whose contents are the same, so that they are not read again.

        Raises:
            StoreError: the case does not exist, or its folder cannot be written.
        """
        record = self.open(name).record
        noted = record.model_copy(update={"source": source, "sources": dict(sources)}).sealed()
        if noted != record:
            write_record(self.folder / (name + RECORD), noted)

    def _record(self, name: str) -> CaseRecord:
        path = self.folder / (name + RECORD)
        record = read_record(path, CaseRecord)
        if not record.is_intact():
            raise RecordError("The record does not match its checksum", where=path)
        return record

    def remove(self, name: str) -> None:
        """Remove a case, its record first."""
        with writing_to(self.folder):
            for suffix in _suffixes(name):
                (self.folder / (name + suffix)).unlink(missing_ok=True)

    def write(
        self,
        name: str,
        image: np.ndarray,
        label: np.ndarray,
        *,
        geometry: CaseGeometry,
        foreground: Iterable[Location],
        source: str,
        sources: Mapping[str, SourceFile] | None = None,
    ) -> int:
        """Write a case; returns bytes written.

        Args:
            name: name of the case.
            image: (C, a, b, c) float32, contiguous.
            label: (a, b, c) int16, contiguous; -1 marks voxels outside (see `transforms.prepare`).
            geometry: crop, transposition and spacing, to map predictions back to the source grid.
            foreground: sampled locations of each class.
            source: digest of the source, which `is_complete` compares.
            sources: the source files by name.

        Raises:
            StoreError: full disk or unwritable folder. An earlier version of the case is then gone, and no partial
                file is left.
        """
        entries, image_suffix = tuple(foreground), _image_suffix(name)
        # the case counts as unfinished while its arrays change
        with writing_to(self.folder):
            (self.folder / (name + RECORD)).unlink(missing_ok=True)
        narrow = label.astype(np.int8) if label.max(initial=0) <= 127 else label
        places = np.concatenate([index for _, _, index in entries]) if entries else np.empty(0, np.int32)
        files = {
            image_suffix: put(self.folder / (name + image_suffix), packed(image, self._patch)),
            LABEL: put(self.folder / (name + LABEL), packed(narrow, self._patch)),
            FOREGROUND: put(self.folder / (name + FOREGROUND), _npy(places)),
        }
        record = CaseRecord(
            id=name,
            source=source,
            sources=None if sources is None else dict(sources),
            channels=image.shape[0],
            shape=(image.shape[1], image.shape[2], image.shape[3]),
            geometry=geometry,
            foreground=tuple(ForegroundClass(key=k, voxels=n, count=len(i)) for k, n, i in entries),
            files=files,
        )
        write_record(self.folder / (name + RECORD), record.sealed())
        return sum(file.size for file in files.values())


def _image_suffix(name: str) -> str:
    """Suffix of a new case's image: never one that makes it the label or image of another case.

    NAME + LABEL would else also be the image of a case NAME_label.
    """
    return OTHER_IMAGE if (name + IMAGE).endswith((LABEL, OTHER_IMAGE)) else IMAGE


def _suffixes(name: str) -> tuple[str, ...]:
    """Suffixes of a case's own files, its record first."""
    return RECORD, FOREGROUND, LABEL, _image_suffix(name)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
