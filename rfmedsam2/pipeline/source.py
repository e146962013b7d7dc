"""Reading training cases once: what one step decodes is kept for the next while memory allows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from rfmedsam2.errors import DatasetError, GeometryError, ImageError
from rfmedsam2.geometry import Volume
from rfmedsam2.store.image_header import disagreement
from rfmedsam2.store.images import read_channels, read_label
from rfmedsam2.store.orientation import reoriented
from rfmedsam2.store.raw import Case, RawDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A training case in memory: image (C, Z, Y, X) as read, label (Z, Y, X) unsigned, one grid."""

    volume: Volume
    label: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.volume.array.nbytes + self.label.nbytes


class CaseSource:
    """Decodes the training cases of a dataset; may be used from several threads.

    Args:
        dataset: whose cases.
        budget_bytes: how much may be kept in memory between two steps; 0: nothing.
    """

    def __init__(self, dataset: RawDataset, *, budget_bytes: int = 0) -> None:
        self.dataset = dataset
        self._budget = budget_bytes
        self._kept: dict[str, tuple[str, Decoded]] = {}
        self._lock = Lock()

    @property
    def reorient(self) -> bool:
        """True when dataset.json names one of nnU-Net's readers that turn images to RAS."""
        return (self.dataset.json.overwrite_image_reader_writer or "").endswith("WithReorient")

    def read(self, case: Case, *, last: bool = True) -> Decoded:
        """Image and label of a case, from memory if they were kept and their files have not changed since.

        Args:
            case: one of `dataset.training`.
            last: False: another step will want it; keep it if there is room.

        Raises:
            ImageError, GeometryError: a file that cannot be used.
            DatasetError: channels missing, image and label that do not fit, undeclared label values.
        """
        digest = files_digest(case)
        with self._lock:
            kept = self._kept.pop(case.id, None)
            if kept is not None:
                self._budget += kept[1].nbytes
        decoded = kept[1] if kept is not None and kept[0] == digest else self._decode(case)
        if not last:
            with self._lock:
                if decoded.nbytes <= self._budget:
                    self._budget -= decoded.nbytes
                    self._kept[case.id] = (digest, decoded)
        return decoded

    def _decode(self, case: Case) -> Decoded:
        if case.label is None:
            raise DatasetError("A training case has no label", where=case.id)
        volume, header = read_channels(case.images)
        labels, label_header = read_label(case.label)
        differ = disagreement(header.grid, label_header.grid)
        if differ is not None and not differ[1]:
            raise GeometryError(
                f"Image and label of case {case.id} do not lie on one grid",
                where=case.label,
                expected=f"the grid of {case.images[0].name}",
                found=differ[0],
                remedy="Resample the label to the image, or correct the header",
            )
        self._check(case, volume.array, labels.array)
        label = labels.array
        if self.reorient:
            volume, turn = reoriented(volume)
            label = turn.apply(label)
        return Decoded(volume=volume, label=label[0])

    def _check(self, case: Case, image: np.ndarray, label: np.ndarray) -> None:
        wanted = len(self.dataset.json.channels)
        if image.shape[0] != wanted:
            raise DatasetError(f"Case {case.id} has another number of channels", expected=wanted, found=image.shape[0])
        if image.dtype.kind == "f" and not np.isfinite([image.min(), image.max()]).all():
            raise ImageError(
                f"Case {case.id} holds voxels that are not finite",
                where=case.images[0],
                remedy="Replace NaN and infinite voxels, for instance by 0",
            )
        allowed = self.dataset.json.label_set.allowed_values
        found = np.flatnonzero(np.bincount(label.reshape(-1)))
        foreign = np.setdiff1d(found, allowed)
        if foreign.size:
            raise DatasetError(
                f"The label of case {case.id} holds values that dataset.json does not declare",
                where=case.label,
                expected=f"only {', '.join(map(str, allowed))}",
                found=", ".join(map(str, foreign[:10])),
                remedy="Declare these values in dataset.json, or correct the label file",
            )


def files_digest(case: Case) -> str:
    """SHA-256 over name, size and modification time of every file of a case.

    Raises:
        ImageError: a file is missing.
    """
    digest = hashlib.sha256()
    for path in _files(case):
        try:
            status = path.stat()
        except OSError as error:
            raise ImageError(f"A file of case {case.id} cannot be reached ({error.strerror})", where=path) from error
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(case: Case) -> list[Path]:
    listed = [*case.images, *([] if case.label is None else [case.label])]
    return [file for path in listed for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
