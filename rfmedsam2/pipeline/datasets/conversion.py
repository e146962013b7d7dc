"""What the converters of official downloads share: finding pairs, checking them, building the raw dataset.

A converter says what a download should hold (`Download`); `convert` checks every file first, reports all faults at
once, and only then builds the dataset, which appears complete or not at all.
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

from rfmedsam2.errors import DatasetError, RfMedSamError, StoreError
from rfmedsam2.pipeline.datasets.builder import new_dataset, write_dataset_json
from rfmedsam2.store.atomic import atomic
from rfmedsam2.store.images import read_header, read_label
from rfmedsam2.system.parallel import Track, map_cases, silent

ENDING = ".nii.gz"

Placement = Literal["copy", "hardlink", "symlink"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How a dataset is built from a download.

    Attributes:
        how: copy the files, or link them: a hard link needs the same disk, a symbolic link needs the download to
            stay where it is.
        force: replace a dataset of the same name.
        workers: files checked and written at once.
    """

    how: Placement = "copy"
    force: bool = False
    workers: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One case of a download; without a label it is a test case."""

    id: str
    image: Path
    label: Path | None = None


@dataclass(slots=True, kw_only=True)
class Download:
    """A download as it was found, and the dataset that it is to become.

    Attributes:
        what: what messages call it.
        folder: where it lies.
        name: folder name of the dataset.
        channels: channel names; images must have as many channels.
        labels: name -> value of everything that label files may hold.
        sources: all cases.
        faults: what already forbids a conversion.
        warnings: what the user should know.
        further: further fields of dataset.json.
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
    """What was built: the dataset's folder, numbers of cases, and what the user should know."""

    folder: Path
    training: int
    test: int
    warnings: tuple[str, ...]


def convert(download: Download, raw: Path, *, options: ConvertOptions, track: Track = silent) -> Conversion:
    """Check all files of a download, then build the dataset `raw`/`download.name`.

    Raises:
        DatasetError: lists every fault of every case.
        UsageError: the dataset exists and `options.force` is not set.
        StoreError: the raw folder cannot be written, or files cannot be linked.
    """
    # before the long check: a dataset that is in the way
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
    """Find the first of `candidates` (paths below `download`) that is a folder.

    Raises:
        DatasetError: the download is not there or has none of them.
    """
    if not download.is_dir():
        raise DatasetError(f"There is no {what} download", where=download, expected="the folder of the extracted files")
    for candidate in candidates:
        if (download / candidate).is_dir():
            return download / candidate
    raise DatasetError(
        f"This is no {what} download",
        where=download,
        expected=expected,
        found=", ".join(sorted(p.name for p in download.iterdir())[:8]) or "an empty folder",
        remedy="Name the folder into which the official archive was extracted",
    )


def listed(folder: Path, pattern: str = r"(.+)") -> dict[str, Path]:
    """NIfTI files of a folder: what group 1 of `pattern` matches in the name without its ending -> path, sorted.

    Hidden files (among them the `._` files that macOS puts into archives) and other kinds are left out; a folder that
    is not there counts as empty.
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
    """Add the training cases that either side has or that are declared; a missing image or label is a fault."""
    for case in sorted({*images, *labels, *declared}):
        missing = [kind for kind, files in (("image", images), ("label", labels)) if case not in files]
        if missing:
            download.faults.append(f"{case}: there is no {' and no '.join(missing)}")
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
    """All faults of one case: unreadable files, channels, geometry of the pair, label values."""
    faults: list[str] = []
    grid = None
    try:
        header = read_header(source.image)
        grid = header.grid
        if header.channels != len(download.channels):
            faults.append(f"{source.id}: the image has {header.channels} channels, expected {len(download.channels)}")
    except RfMedSamError as error:
        faults.append(f"{source.id}: {error}")
    if source.label is None:
        return faults
    try:
        volume, label_header = read_label(source.label)
    except RfMedSamError as error:
        return [*faults, f"{source.id}: {error}"]
    mismatch = None if grid is None else grid.mismatch(label_header.grid)
    if mismatch:
        faults.append(f"{source.id}: image and label differ in geometry: {mismatch}")
    present = np.flatnonzero(np.bincount(volume.array.ravel()))
    undeclared = sorted(set(present.tolist()) - set(download.labels.values()))
    if undeclared:
        allowed = f"{min(download.labels.values())} to {max(download.labels.values())}"
        faults.append(f"{source.id}: the label holds {', '.join(map(str, undeclared))}, allowed is {allowed}")
    return faults


def _raise_faults(download: Download, faults: list[str]) -> None:
    if not faults and not any(source.label for source in download.sources):
        faults = ["no labeled case was found"]
    if faults:
        raise DatasetError(
            f"The {download.what} download has {len(faults)} fault(s)",
            where=download.folder,
            found="\n  " + "\n  ".join(faults),
            remedy="Nothing was written. Download or extract the named files again, or remove them from the download",
        )


def _place(source: Source, download: Download, building: Path, how: Placement) -> None:
    part = "Ts" if source.label is None else "Tr"
    if source.label is not None:
        _transfer(source.label, building / "labelsTr" / f"{source.id}{ENDING}", how)
    if len(download.channels) == 1:
        _transfer(source.image, building / f"images{part}" / f"{source.id}_0000{ENDING}", how)
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
                f"A file cannot be linked ({error.strerror})", where=source, remedy="Copy instead (--place copy)"
            ) from error
        raise


def _split_channels(source: Source, folder: Path) -> None:
    """Write each channel of a 4D NIfTI file as its own 3D file, header and voxel type kept."""
    image = nibabel.load(source.image)
    if not isinstance(image, nibabel.Nifti1Image):
        raise DatasetError("A file with several channels is not NIfTI", where=source.image)
    voxels = np.asanyarray(image.dataobj)
    if voxels.dtype == np.float64:
        voxels = voxels.astype(np.float32)
    for number in range(voxels.shape[-1]):
        header = image.header.copy()
        header.set_data_dtype(voxels.dtype)
        # five axes: some writers put the channels on NIfTI's fifth
        channel = nibabel.Nifti1Image(voxels[..., number].reshape(voxels.shape[:3]), None, header=header)
        with atomic(folder / f"{source.id}_{number:04d}{ENDING}") as temporary:
            nibabel.save(channel, temporary)
