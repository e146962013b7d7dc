"""Fixed logits of Step 0 for preprocessed cases: CASE.b2nd (float16) and CASE.json, which is written last.

A class map has one channel per foreground class, relative to a background of 0 (or one per region), in the voxels of
the preprocessed case. A cascade's labels of the first stage are stored in the same way, as one channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2.errors import RecordError, StoreError
from rfmedsam2.geometry import Shape
from rfmedsam2.records.case import CaseRecord, Step0Record
from rfmedsam2.store.packed_arrays import Look, Ranges, looks_unchanged, packed, put, read_packed, verified
from rfmedsam2.system.atomic import read_record, write_record, writing_to

ARRAY, RECORD = ".b2nd", ".json"
REMEDY = "Remove the file if it is there, and run the same rfmed_train command again, which writes it again"
LOGITS, FIRST_STAGE = "logits of Step 0", "labels of the first stage"
"""What files may hold, for messages."""
LOGIT_BYTES = 2
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class StoredLogits:
    """Logits of one case, read one patch at a time; before the first read they are compared with their checksum."""

    folder: Path
    record: Step0Record
    what: str = LOGITS

    @property
    def shape(self) -> Shape:
        """Voxels along the planned axes."""
        return self.record.shape

    def patch(self, box: Ranges) -> np.ndarray:
        """Read a patch, (K, ...) float32, given by half-open ranges inside the volume.

        Raises:
            StoreError: the file is missing, damaged, or has been replaced.
        """
        path = self.folder / (self.record.id + ARRAY)
        if not verified(path, self.record.file, self._seen):
            raise StoreError(f"Stored {self.what} are damaged or missing", where=path, remedy=REMEDY)
        ranges = (slice(None), *(slice(*limits) for limits in box))
        return read_packed(path, ranges, what=f"A file with {self.what}", remedy=REMEDY).astype(np.float32)

    @cached_property
    def _seen(self) -> dict[Path, Look]:
        """How the file looked when it was compared with its checksum."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "record": self.record, "what": self.what}


class LogitsStore:
    """Fixed logits of the cases of one fold.

    Args:
        folder: their folder; created when the first ones are written.
        patch_size: three entries, from which the chunk shape follows. Used for writing only.
        what: what they are, for messages.
    """

    def __init__(self, folder: Path, patch_size: Sequence[int] = (32, 128, 128), *, what: str = LOGITS) -> None:
        self.folder, self._patch, self._what = Path(folder), tuple(patch_size), what

    def is_current(self, name: str, case: CaseRecord, *, weights: str, settings: str) -> bool:
        """Whether the logits of a case exist, look unchanged, and were made from these weights and settings."""
        try:
            record = read_record(self.folder / (name + RECORD), Step0Record)
        except RecordError:
            return False
        wanted = (case.contents, weights, settings)
        return record.made_from == wanted and looks_unchanged(self.folder / (name + ARRAY), record.file)

    def open(self, name: str) -> StoredLogits:
        """Open the logits of a case.

        Raises:
            StoreError: they do not exist, or their record is damaged.
        """
        path = self.folder / (name + RECORD)
        try:
            record = read_record(path, Step0Record)
        except RecordError as error:
            raise StoreError(f"Stored {self._what} are missing or damaged", where=path, remedy=REMEDY) from error
        return StoredLogits(folder=self.folder, record=record, what=self._what)

    def write(self, name: str, class_map: np.ndarray, case: CaseRecord, *, weights: str, settings: str) -> None:
        """Write the class map (K, a, b, c) of a case, rounded to float16.

        Raises:
            StoreError: full disk or unwritable folder; an earlier version is then gone, and no partial file is left.
        """
        half = np.ascontiguousarray(class_map.clip(-LARGEST, LARGEST), dtype=np.float16)
        with writing_to(self.folder):
            (self.folder / (name + RECORD)).unlink(missing_ok=True)
        record = Step0Record(
            id=name,
            case=case.contents,
            weights=weights,
            settings=settings,
            channels=len(half),
            shape=case.shape,
            file=put(self.folder / (name + ARRAY), packed(half, self._patch)),
        )
        write_record(self.folder / (name + RECORD), record)
