"""Reading and checking training cases, with an in-memory cache so that fingerprint and preprocessing read once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, cast

import blosc2
import numpy as np

from rfmedsam2.errors import DatasetError, ImageError, RfMedSamError
from rfmedsam2.geometry import Shape, Triple
from rfmedsam2.pipeline.datasets.verify import examine_case
from rfmedsam2.records.case import SourceFile
from rfmedsam2.records.verify import Fault, require_no_errors
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.images import image_files, read_header
from rfmedsam2.store.orientation import reoriented
from rfmedsam2.store.packed_arrays import require_packable
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.ordinary_files import file_sha256, require_ordinary
from rfmedsam2.volume import Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Size of a case's image in memory.

    Attributes:
        shape_zyx: number of voxels along z, y, x.
        spacing_zyx_mm: spacing along z, y, x, mm.
        channels: number of channels of the image.
        itemsize: bytes per voxel and channel.
        reading: temporary bytes per voxel while reading a channel or the label map.
    """

    shape_zyx: Shape
    spacing_zyx_mm: Triple
    channels: int
    itemsize: int
    reading: int

    @property
    def voxels(self) -> int:
        """Number of voxels of one channel."""
        return self.shape_zyx[0] * self.shape_zyx[1] * self.shape_zyx[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedCase:
    """A training case in memory, reoriented if dataset.json requests it (`RawDataset.reorient`).

    Attributes:
        volume: (C, Z, Y, X) as read.
        label: (Z, Y, X) unsigned, on the same grid.
        voxels_by_label: label value -> number of voxels, without background.
        warnings: faults that should be checked but do not prevent training.
        files: name -> size and digest of the files that were read.
    """

    volume: Volume
    label: np.ndarray
    voxels_by_label: dict[int, int]
    warnings: tuple[Fault, ...] = ()
    files: Mapping[str, SourceFile] = field(default_factory=dict)


class _Kept:
    """A decoded case with compressed arrays: a CT takes a quarter of the memory and of the reading time."""

    def __init__(self, decoded: DecodedCase, digest: str) -> None:
        self.digest, self._files = digest, decoded.files
        self._grid, self._voxels, self._warnings = decoded.volume.grid, decoded.voxels_by_label, decoded.warnings
        self._image, self._label = _packed(decoded.volume.array), _packed(decoded.label)
        self.nbytes = int(self._image.schunk.cbytes + self._label.schunk.cbytes)

    def unpacked(self) -> DecodedCase:
        """Decompress the case."""
        volume = Volume(array=self._image[...], grid=self._grid)
        return DecodedCase(
            volume=volume,
            label=self._label[...],
            voxels_by_label=self._voxels,
            warnings=self._warnings,
            files=self._files,
        )


def _packed(array: np.ndarray) -> Any:
    """Compress an array in memory, in one thread, because cases are read in several."""
    cparams = {"codec": blosc2.Codec.LZ4, "clevel": 1, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
    require_packable(array)
    return cast(Any, blosc2).asarray(np.ascontiguousarray(array), cparams=cparams, dparams={"nthreads": 1})


class FaultyCaseError(DatasetError):
    """A case with errors; `faults` holds all of them, at least one."""

    def __init__(self, name: str, faults: tuple[Fault, ...]) -> None:
        listed = " | ".join(f"{fault.file}: {fault.message}" for fault in faults)
        super().__init__(f"Case {name} cannot be used ({listed})", remedy=faults[0].remedy)
        self.faults = faults


class CaseReader:
    """Decodes and checks the training cases of a dataset; thread-safe.

    Args:
        dataset: the dataset.
        budget_bytes: size limit of the in-memory cache; 0: no cache.
    """

    def __init__(self, dataset: RawDataset, *, budget_bytes: int = 0) -> None:
        self.dataset = dataset
        self._budget = budget_bytes
        self._full = budget_bytes <= 0
        self._kept: dict[str, _Kept] = {}
        self._extents: dict[str, Extent] = {}
        self._files: dict[str, dict[str, SourceFile]] = {}
        self._lock = Lock()

    def files(self, case: Case, known: Mapping[str, SourceFile] | None = None) -> dict[str, SourceFile]:
        """Size and digest of every file of a case as it is now.

        Args:
            case: one of `dataset.training`.
            known: files as they were when they were last looked at; what looks the same is not read again.

        Raises:
            ImageError: a file is missing or cannot be read.
        """
        self._files[case.id] = source_files(case, self._files.get(case.id, known))
        return self._files[case.id]

    def read(self, case: Case, *, last: bool = True) -> DecodedCase:
        """Image and label of a case, from the cache if they are in it and their files have not changed.

        Args:
            case: one of `dataset.training`.
            last: False: another step will read the case again; cache it if there is room.

        Raises:
            FaultyCaseError: a file cannot be used, or image, label and dataset.json do not match.
            DatasetError: the case has no label.
            ImageError: a file has changed meanwhile.
        """
        try:
            digest = files_digest(case)
        except ImageError:
            self._decode(case)  # raises with all faults of the case, which may be left out
            raise
        with self._lock:
            kept = self._kept.pop(case.id, None)
            if kept is not None:
                self._budget += kept.nbytes
                self._full = False
        if kept is None or kept.digest != digest:
            kept, decoded = None, replace(self._decode(case), files=self.files(case))
            if files_digest(case) != digest:
                raise ImageError(
                    f"A file of case {case.id} changed while it was read",
                    where=", ".join(str(path) for path in _files(case)),
                    remedy="Run the same command again when nothing else writes to these files",
                )
        else:
            decoded = kept.unpacked()
        if not last and not self._full:
            kept = kept or _Kept(decoded, digest)
            with self._lock:
                self._full = kept.nbytes > self._budget
                if not self._full:
                    self._budget -= kept.nbytes
                    self._kept[case.id] = kept
        return decoded

    def extents(self) -> list[Extent]:
        """Sizes of the training cases from their headers; unreadable ones are skipped."""
        for case in self.dataset.training:
            if case.id not in self._extents:
                try:
                    self._extents[case.id] = _extent(case)
                except RfMedSamError:
                    continue  # reported when the case is read
        return [self._extents[case.id] for case in self.dataset.training if case.id in self._extents]

    def layout_faults(self) -> tuple[Fault, ...]:
        """Errors of training cases that can be seen from file names: missing files, wrong endings, duplicate ids."""
        test = self.dataset.folder / "imagesTs"
        return tuple(
            fault
            for fault in self.dataset.faults
            if fault.severity == "error" and not Path(fault.file).is_relative_to(test)
        )

    def check_file_layout(self) -> None:
        """Raise if file names show that training cases cannot be used.

        Raises:
            DatasetError: lists all faults.
        """
        require_no_errors(self.layout_faults(), where=self.dataset.folder)

    def leave_out(self, names: Collection[str]) -> None:
        """Go on with a dataset without these training cases."""
        kept = tuple(case for case in self.dataset.training if case.id not in names)
        self.dataset = replace(self.dataset, training=kept)

    def _decode(self, case: Case) -> DecodedCase:
        found = examine_case(case, self.dataset.json)
        errors = tuple(fault for fault in found.faults if fault.severity == "error")
        if errors:
            raise FaultyCaseError(case.id, errors)
        if found.volume is None or found.label is None:
            raise DatasetError("A training case has no image or no label", where=case.id)
        volume, label = found.volume, found.label
        if self.dataset.reorient is not None:
            volume, turn = reoriented(volume, self.dataset.reorient)
            label = turn.apply(label)
        return DecodedCase(volume=volume, label=label, voxels_by_label=found.voxels_by_label, warnings=found.faults)


def _extent(case: Case) -> Extent:
    header = read_header(case.images[0])
    image = np.dtype(header.dtype)
    label = image if case.label is None else np.dtype(read_header(case.label).dtype)
    # floats may be stored in double precision; a label map in floats is rounded and compared with its original
    whole = label.itemsize + 2 if label.kind in "iu" else 18
    return Extent(
        shape_zyx=header.grid.shape_zyx,
        spacing_zyx_mm=header.grid.spacing_zyx_mm,
        channels=max(header.channels, len(case.images)),
        itemsize=image.itemsize,
        reading=max(image.itemsize if image.kind in "iu" else 8 + image.itemsize, whole),
    )


def source_files(case: Case, known: Mapping[str, SourceFile] | None = None) -> dict[str, SourceFile]:
    """Name -> size, digest and modification time of every file of a case, images first.

    Args:
        case: the case.
        known: files as they were before; one of the same size and modification time is not read again.

    Raises:
        ImageError: a file is missing or cannot be read.
    """
    found: dict[str, SourceFile] = {}
    for path in _files(case):
        if path.is_dir():
            continue  # beside the slices of a series
        # an image and its label may have the same name
        name = path.name if path.name not in found else f"{path.name} ({len(found) + 1})"
        try:
            status, before = require_ordinary(path), (known or {}).get(name)
            same = before is not None and (before.size, before.modified_ns) == (status.st_size, status.st_mtime_ns)
            # the time is taken before the contents: a later change is noticed
            sha256 = before.sha256 if before is not None and same else file_sha256(path)
        except OSError as error:
            raise ImageError(f"A file of case {case.id} cannot be accessed ({error.strerror})", where=path) from error
        found[name] = SourceFile(size=status.st_size, sha256=sha256, modified_ns=status.st_mtime_ns)
    return found


def files_digest(case: Case) -> str:
    """SHA-256 of name, size and modification time of every file of a case.

    Raises:
        ImageError: a file is missing.
    """
    digest = hashlib.sha256()
    for path in _files(case):
        try:
            status = require_ordinary(path)
        except OSError as error:
            raise ImageError(f"A file of case {case.id} cannot be accessed ({error.strerror})", where=path) from error
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(case: Case) -> list[Path]:
    listed = [*case.images, *([] if case.label is None else [case.label])]
    return [file for path in listed for file in image_files(path)]
