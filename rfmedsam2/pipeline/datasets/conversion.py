"""Common code of the converters of official downloads: pairing files, checking them, building the raw dataset.

A converter describes the download (`Download`); `convert` first checks every file, reports all faults at once, and only
then builds the dataset, atomically.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.errors import DatasetError, RfMedSamError, StoreError
from rfmedsam2.pipeline.datasets.builder import new_dataset, write_dataset_json
from rfmedsam2.store.formats.image_header import grids_differ
from rfmedsam2.store.images import read_header, read_label
from rfmedsam2.system.atomic import atomic
from rfmedsam2.system.ordinary_files import require_folder
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent

ENDING = ".nii.gz"

Placement = Literal["copy", "hardlink", "symlink"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Options of a conversion.

    Attributes:
        how: copy the files or link them: hard links need the same file system, symbolic links need the download to
            stay in place.
        force: replace a dataset of the same name.
        workers: number of files checked and written in parallel.
    """

    how: Placement = "copy"
    force: bool = False
    workers: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One case of a download; a test case if it has no label.

    Attributes:
        id: the case id.
        image: image with all channels, or with the first one if there are others.
        label: label map.
        others: images of the channels after the first, if every channel has its own file.
    """

    id: str
    image: Path
    label: Path | None = None
    others: tuple[Path, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """All image files, in channel order."""
        return (self.image, *self.others)


@dataclass(slots=True, kw_only=True)
class Download:
    """The contents of a download, and the dataset to build from it.

    Attributes:
        what: name of the download in messages.
        folder: folder of the download.
        name: folder name of the dataset.
        channels: channel names; images must have this number of channels.
        labels: name -> value of all values allowed in label files.
        sources: all cases.
        faults: faults found so far; any fault prevents the conversion.
        warnings: notes for the user.
        further: additional fields of dataset.json.
    """

    what: str
    folder: Path
    name: str
    channels: tuple[str, ...]
    labels: Mapping[str, int]
    sources: list[Source] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    further: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """Result of a conversion: the dataset's folder, numbers of cases, and notes for the user."""

    folder: Path
    training: int
    test: int
    warnings: tuple[str, ...]


def convert(download: Download, raw: Path, *, options: ConvertOptions, track: Track = silent) -> Conversion:
    """Check all files of a download, then build the dataset `raw`/`download.name`.

    Raises:
        DatasetError: cases have faults; lists all of them.
        UsageError: the dataset exists and `options.force` is not set.
        StoreError: the raw folder cannot be written, or files cannot be linked.
    """
    # fail before the long check if the dataset already exists
    with new_dataset(raw, download.name, force=options.force) as building:
        _raise_faults(download, _check_all(download, options, track))
        for part in ("imagesTr", "labelsTr", *(("imagesTs",) if _tests(download) else ())):
            (building / part).mkdir()
        for _ in map_cases(
            lambda source: _place(source, download, building, options.how),
            download.sources,
            workers=options.workers,
            name=lambda source: source.id,
            track=track,
            description="Writing",
        ):
            pass
        training = len(download.sources) - _tests(download)
        write_dataset_json(
            building,
            channels=download.channels,
            labels=download.labels,
            training=training,
            further={"name": download.name, **download.further},
        )
    return Conversion(
        folder=raw / download.name,
        training=training,
        test=_tests(download),
        warnings=tuple(download.warnings),
    )


def folder_of(download: Path, candidates: Iterable[str], *, what: str, expected: str) -> Path:
    """Find the first of `candidates` (relative to `download`) that is a folder.

    Raises:
        DatasetError: the download does not exist or has none of them.
    """
    require_folder(download, f"{what} download", expected="its extracted folder", error=DatasetError)
    for candidate in candidates:
        if (download / candidate).is_dir():
            return download / candidate
    raise DatasetError(
        f"This folder is not an official {what} download",
        where=download,
        expected=expected,
        found=", ".join(sorted(p.name for p in download.iterdir())[:8]) or "an empty folder",
        remedy="Name the folder into which the official archive was extracted",
    )


def listed(folder: Path, pattern: str = r"(.+)") -> dict[str, Path]:
    """NIfTI files of a folder: group 1 of `pattern`, matched to the name without ending -> path, sorted.

    Hidden files (such as the `._` files that macOS adds to archives) and other formats are skipped; a folder that does
    not exist counts as empty.
    """
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(pattern + re.escape(ENDING), path.name)
        if match and not path.name.startswith("."):
            found[match.group(1)] = path
    return found


def pair(
    download: Download, images: Mapping[str, Path], labels: Mapping[str, Path], *, declared: Iterable[str] = ()
) -> None:
    """Add all training cases with an image, a label or a declaration; a missing image or label is a fault."""
    for case in sorted({*images, *labels, *declared}):
        missing = [kind for kind, files in (("image", images), ("label", labels)) if case not in files]
        if missing:
            download.faults.append(f"{case}: missing {' and '.join(missing)}")
        else:
            download.sources.append(Source(id=case, image=images[case], label=labels[case]))


def _tests(download: Download) -> int:
    return sum(source.label is None for source in download.sources)


def _check_all(download: Download, options: ConvertOptions, track: Track) -> list[str]:
    checked = map_cases(
        lambda source: _check(source, download),
        download.sources,
        workers=options.workers,
        name=lambda source: source.id,
        track=track,
        description="Checking",
    )
    return [*download.faults, *(fault for faults in checked for fault in faults)]


def _check(source: Source, download: Download) -> list[str]:
    """All faults of one case: unreadable files, number of channels, mismatched geometry, label values."""
    faults: list[str] = []
    header = None
    try:
        headers = [read_header(path) for path in source.images]
        header, channels = headers[0], sum(each.channels for each in headers)
        if channels != len(download.channels):
            faults.append(f"{source.id}: the image has {channels} channels, expected {len(download.channels)}")
        for path, other in zip(source.others, headers[1:], strict=True):
            if (differ := grids_differ(header, other)) is not None and not differ[1]:
                faults.append(f"{source.id}: {path.name} is not on the grid of {source.image.name}: {differ[0]}")
    except RfMedSamError as error:
        faults.append(f"{source.id}: {error}")
    if source.label is None:
        return faults
    try:
        volume, label_header = read_label(source.label)
    except RfMedSamError as error:
        return [*faults, f"{source.id}: {error}"]
    mismatch = None if header is None else grids_differ(header, label_header)
    if mismatch:
        faults.append(f"{source.id}: image and label differ in geometry: {mismatch[0]}")
    present = np.flatnonzero(np.bincount(volume.array.ravel()))
    undeclared = sorted(set(present.tolist()) - set(download.labels.values()))
    if undeclared:
        allowed = f"{min(download.labels.values())} to {max(download.labels.values())}"
        faults.append(f"{source.id}: the label holds {', '.join(map(str, undeclared))}, allowed is {allowed}")
    return faults


def _raise_faults(download: Download, faults: list[str]) -> None:
    if not faults and not any(source.label for source in download.sources):
        faults = ["no labeled cases were found"]
    if faults:
        raise DatasetError(
            f"The {download.what} download has {len(faults)} fault(s)",
            where=download.folder,
            found="\n  " + "\n  ".join(faults),
            remedy="Nothing was written. Download or extract these files again, or remove them from the download",
        )


def _place(source: Source, download: Download, building: Path, how: Placement) -> None:
    part = "Ts" if source.label is None else "Tr"
    if source.label is not None:
        _transfer(source.label, building / "labelsTr" / f"{source.id}{ENDING}", how)
    if len(source.images) == len(download.channels):
        for number, image in enumerate(source.images):
            _transfer(image, building / f"images{part}" / f"{source.id}_{number:04d}{ENDING}", how)
    else:
        _split_channels(source, building / f"images{part}")


def _transfer(source: Path, target: Path, how: Placement) -> None:
    try:
        if how == "copy":
            shutil.copyfile(source, target)
        elif how == "hardlink":
            target.hardlink_to(source.resolve())
        else:
            target.symlink_to(source.resolve())
    except OSError as error:
        if how != "copy" and error.errno in {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK}:
            raise StoreError(
                f"A file cannot be linked ({error.strerror})",
                where=source,
                remedy=f"Copy instead ({option('place', 'copy')})",
            ) from error
        raise


def _split_channels(source: Source, folder: Path) -> None:
    """Write each channel of a 4D NIfTI file as a 3D file with the same header and dtype."""
    image = nibabel.load(source.image)
    if not isinstance(image, nibabel.Nifti1Image):
        raise DatasetError("A file with several channels is not NIfTI", where=source.image)
    voxels = np.asanyarray(image.dataobj)
    if voxels.dtype == np.float64:
        voxels = voxels.astype(np.float32)
    for number in range(voxels.shape[-1]):
        header = image.header.copy()
        header.set_data_dtype(voxels.dtype)
        # five axes: some programs put the channels on NIfTI's fifth axis
        channel = nibabel.Nifti1Image(voxels[..., number].reshape(voxels.shape[:3]), None, header=header)
        with atomic(folder / f"{source.id}_{number:04d}{ENDING}") as temporary:
            nibabel.save(channel, temporary)
