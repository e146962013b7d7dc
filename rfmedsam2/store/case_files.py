"""Grouping image files into cases: nnU-Net's channel suffixes, files without them, DICOM folders; layout faults.

CASE_0000.nii.gz, CASE_0001.nii.gz ... are the channels of CASE. A file without a suffix is a case on its own, with one
channel or with all of them inside; so is CASE_0000 alone, if it has all channels inside (a color image).
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rfmedsam2.errors import RfMedSamError, shortlist
from rfmedsam2.records.verify import Fault
from rfmedsam2.store.formats.dicom_files import is_dicom_folder
from rfmedsam2.store.images import image_ending, read_header
from rfmedsam2.system.file_names import as_one_file, require_names

_SUFFIXED = re.compile(r"(.+)_(\d{4})")
MANY_CHANNELS = 16
"""More files of one name than this are taken for numbered cases without a doubt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One case: its image files in channel order (or one file or DICOM folder with all channels) and its label.

    Attributes:
        id: name without channel suffix and ending.
        images: image files or DICOM folders.
        label: label file; None for cases to predict.
        group: patient (or any other group) whose cases must not be split between training and validation.

    Raises:
        DatasetError: the id cannot be part of a file name.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        require_names([self.id], where=self.images[0] if self.images else None)


def list_images(folder: Path, ending: str | None) -> list[Path]:
    """Image files of a folder with this ending (None: any image ending), and its DICOM series folders, sorted."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if is_dicom_folder(path):
                found.append(path)
        elif path.name.endswith(ending) if ending else image_ending(path):
            found.append(path)
    return found


def file_stem(path: Path, ending: str | None) -> str:
    """File name without its ending; the whole name of a folder."""
    if path.is_dir():
        return path.name
    # the longer of the two: Slicer's CASE.seg.nrrd also ends in .nrrd
    written = max((ending if ending and path.name.endswith(ending) else "", image_ending(path) or ""), key=len)
    return path.name[: -len(written)] if written else path.stem


def grouped(
    paths: Iterable[Path], *, channels: int, ending: str | None, known_ids: Collection[str] = ()
) -> dict[str, dict[int | None, list[Path]]]:
    """Group files: case id -> channel number (None: no suffix) -> files; more than one file is a duplicate.

    A number counts as a channel suffix, with two exceptions: the whole name is the id of a label, or numbers exceed the
    channels and no label has the name without the number. If several names have the same numbers from 0 on, however,
    the numbers are channels, and there are too many of them.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in paths:
        by_stem.setdefault(file_stem(path, ending), []).append(path)
    numbers: dict[str, set[int]] = {}
    for stem in by_stem:
        if match := _SUFFIXED.fullmatch(stem):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    alike = _same_channels(list(numbers.values()))
    groups: dict[str, dict[int | None, list[Path]]] = {}
    for stem, files in by_stem.items():
        match = _SUFFIXED.fullmatch(stem)
        most = channels if match is None or not alike else len(numbers[match[1]])
        is_channel = match is not None and _is_channel(stem, match[1], numbers[match[1]], most, known_ids)
        case, channel = (match[1], int(match[2])) if match and is_channel else (stem, None)
        groups.setdefault(case, {}).setdefault(channel, []).extend(files)
    return dict(sorted(groups.items()))


def numbered_like_channels(ids: Iterable[str]) -> dict[str, list[str]]:
    """Ids that nnU-Net would read as channel 0 and others of one case: name of that case -> ids, at least two."""
    numbered: dict[str, list[str]] = {}
    for case in sorted(ids):
        if match := _SUFFIXED.fullmatch(case):
            numbered.setdefault(match[1], []).append(case)
    return {
        name: found
        for name, found in numbered.items()
        if len(found) > 1 and found[0] == f"{name}_0000" and found[-1] < f"{name}_{MANY_CHANNELS:04d}"
    }


def _same_channels(numbers: Sequence[set[int]]) -> bool:
    """Whether several names share the numbers 0, 1, ..., which is unlikely for case ids."""
    first = numbers[0] if numbers else set()
    return len(numbers) > 1 and first == set(range(len(first))) and all(other == first for other in numbers)


def _is_channel(stem: str, prefix: str, numbers: set[int], channels: int, known_ids: Collection[str]) -> bool:
    if prefix in known_ids:
        return True
    return stem not in known_ids and max(numbers) < channels


def case_of(
    case: str, files: Mapping[int | None, Sequence[Path]], *, channels: Sequence[str]
) -> tuple[tuple[Path, ...], list[Fault]]:
    """Image files of one case in channel order, and problems that can be seen from their names."""
    faults = []
    every = [path for paths in files.values() for path in paths]
    found = shortlist((path.name for path in every), limit=6)
    if (None in files and len(every) > 1) or any(len(paths) > 1 for paths in files.values()):
        faults.append(
            Fault(
                case=case,
                file=str(every[1]),
                kind="duplicate-id",
                severity="error",
                message=f"Several files are the same image: {found}",
                remedy="Keep one of them",
            )
        )
    if None in files:
        return (files[None][0],), faults
    numbers = sorted(n for n in files if n is not None)
    lacking = [n for n in range(len(channels)) if n not in files]
    inside = _channels_inside(files[0][0]) if lacking and numbers == [0] else 1
    if inside > 1:
        return (files[0][0],), faults + _channel_count_faults(case, files[0][0], inside, len(channels))
    if lacking:
        names = ", ".join(f"_{n:04d} ({channels[n]})" for n in lacking)
        faults.append(
            Fault(
                case=case,
                file=str(every[0]),
                kind="missing-channel",
                severity="error",
                message=f"{len(lacking)} of {len(channels)} channels missing: {names}; found {found}",
                remedy="Add the missing files or remove the case",
            )
        )
    extra = [n for n in numbers if n >= len(channels)]
    if extra:
        faults.append(
            Fault(
                case=case,
                file=str(files[extra[0]][0]),
                kind="extra-channel",
                severity="error",
                message=f"Channels beyond the {len(channels)} declared: {', '.join(f'_{n:04d}' for n in extra)}",
                remedy="Declare them in channel_names or remove the files",
            )
        )
    return tuple(files[n][0] for n in numbers if n < len(channels)), faults


def _channels_inside(path: Path) -> int:
    """Channels in the only file of a case, CASE_0000: nnU-Net's color images and 4D volumes have all of them."""
    try:
        return read_header(path).channels
    except RfMedSamError:
        return 1  # reported when the file is read


def _channel_count_faults(case: str, path: Path, found: int, expected: int) -> list[Fault]:
    if found == expected:
        return []
    return [
        Fault(
            case=case,
            file=str(path),
            kind="missing-channel" if found < expected else "extra-channel",
            severity="error",
            message=f"{path.name} has {found} channels inside, expected {expected}",
            remedy="Save the image with the declared channels only (without transparency), or declare all of them",
        )
    ]


def ids_of_one_file(ids: Iterable[str]) -> list[Fault]:
    """Faults for ids whose files would be one on some file system: they differ only in letter case or in encoding."""
    alike: dict[str, list[str]] = {}
    for case in ids:
        alike.setdefault(as_one_file(case), []).append(case)
    return [
        Fault(
            case=same[0],
            file="",
            kind="duplicate-id",
            severity="error",
            message=f"Case ids that differ only in {_difference(same)}: {', '.join(same)}",
            remedy="Rename all but one",
        )
        for same in alike.values()
        if len(same) > 1
    ]


def _difference(ids: Sequence[str]) -> str:
    """How ids of one file differ; letters with accents look alike in both encodings."""
    folded = {unicodedata.normalize("NFD", case) for case in ids}
    return "letter case" if len(folded) == len(ids) else "how Unicode encodes accented letters (NFC, NFD)"


def label_files_in(folder: Path, faults: list[str] | None = None) -> dict[str, Path]:
    """Id -> file of the label maps in a folder, sorted; a second file of an id is left out, and said in `faults`."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = image_ending(path)
        if ending is None or path.name.startswith(".") or path.is_dir():
            continue
        id = path.name.removesuffix(ending)
        if id in files and faults is not None:
            faults.append(f"{id}: two files have this id in {folder}: {files[id].name}, {path.name}")
        files.setdefault(id, path)
    return files


def channel_file(folder: Path, id: str, channel: int = 0) -> Path | None:
    """The file CASE_0000 with the number of a channel, or else CASE, that holds all; None if there is neither."""
    fitting = {f"{id}_{channel:04d}": 0, id: 1}
    found = [p for p in folder.iterdir() if p.name.removesuffix(image_ending(p) or "") in fitting]
    return min(found, default=None, key=lambda p: (fitting[p.name.removesuffix(image_ending(p) or "")], len(p.name)))


def describe_contents(folder: Path) -> str:
    """Phrase for error messages: number of files by ending in a folder, with an example."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "a folder that does not exist"
    entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
    files = [p for p in entries if not p.is_dir()]
    folders = [p for p in entries if p.is_dir()]
    endings = Counter(image_ending(p) or "".join(p.suffixes[-1:]) or "without an ending" for p in files)
    parts = [f"{n} {ending}" for ending, n in endings.most_common(4)]
    if folders:
        parts.append(f"{len(folders)} folder(s) such as {min(p.name for p in folders)}")
    example = f", for instance {min(p.name for p in files)}" if files else ""
    return (", ".join(parts) + example) if parts else "an empty folder"


def closest_name(name: str, folder: Path) -> str | None:
    """The entry of a folder whose name is most similar to `name`, None if none is similar enough."""
    names = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.6)
    return next((n for n in names if close and n.lower() == close[0]), None)
