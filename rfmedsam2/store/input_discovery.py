"""Finding the cases to predict in a folder, an image file, a DICOM series or a list of files."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

from rfmedsam2.errors import DatasetError, UsageError, shortlist
from rfmedsam2.store.case_files import (
    Case,
    case_of,
    describe_contents,
    file_stem,
    grouped,
    ids_of_one_file,
    list_images,
    numbered_like_channels,
)
from rfmedsam2.store.formats.dicom_files import is_dicom_file, is_dicom_folder
from rfmedsam2.store.formats.image_header import require_ordinary_file
from rfmedsam2.store.images import IMAGE_ENDINGS, image_ending
from rfmedsam2.system.csv_text import decode_text, read_rows
from rfmedsam2.system.file_names import require_names
from rfmedsam2.system.json_text import parse_json
from rfmedsam2.system.ordinary_files import read_whole

logger = logging.getLogger(__name__)
_LISTS = (".csv", ".json", ".txt")


def find_cases(source: Path | Sequence[Path], *, channels: int, file_ending: str | None) -> tuple[Case, ...]:
    """Find the cases to predict, sorted by id.

    Args:
        source: a folder of images (with or without _0000, or of DICOM folders), a DICOM series folder, one image file
            (its other channels are expected beside it), a .csv, .json or .txt list, or a sequence of paths.
        channels: number of input channels of the model.
        file_ending: ending of image files in a folder; any readable format if None or if no file has this ending.

    Raises:
        DatasetError: no case was found (says what was expected and found), channels are missing, or ids collide.
        UsageError: the source does not exist or its format is unknown.
        ImageError: the source is a pipe or a device.
    """
    if not isinstance(source, Path):
        return _cases([Path(p) for p in source], channels, None, where="the list of paths")
    if not source.exists():
        raise UsageError(
            "The input does not exist", where=source, expected="a folder, an image file or a list of files"
        )
    if source.is_dir():
        return _in_folder(source, channels, file_ending)
    require_ordinary_file(source)
    if source.suffix.lower() in _LISTS:
        return _in_list(source, channels)
    if image_ending(source) is None and not is_dicom_file(source):
        raise UsageError(
            "The input is neither an image nor a list",
            where=source,
            expected=f"{' '.join(IMAGE_ENDINGS)}, DICOM, or a list in {' '.join(_LISTS)}",
        )
    return _cases(_with_siblings(source, channels), channels, None, where=source)


def _in_folder(folder: Path, channels: int, ending: str | None) -> tuple[Case, ...]:
    entries = list_images(folder, ending)
    only_slices = all(p.is_file() and image_ending(p) in (None, ".dcm") for p in entries)
    if only_slices and is_dicom_folder(folder):
        return (Case(id=folder.resolve().name, images=(folder,)),)
    if not entries and (others := list_images(folder, None)):
        # no file of the model's own format: accept any readable format
        return _cases(others, channels, None, where=folder)
    if not entries:
        remedy = "Check the folder; a dataset has its images in imagesTr and imagesTs"
        folders = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith("labels")]
        below = [p.name for p in folders if list_images(p, ending)]
        if below:
            remedy = f"Name the subfolder that holds the images: {', '.join(below[:4])}"
        name = f"CASE_0000{ending or '.nii.gz'}"
        raise DatasetError(
            "There are 0 cases to predict",
            where=folder,
            expected=f"files like {name}"
            + (f" to _{channels - 1:04d}" if channels > 1 else " (_0000 may be left out)"),
            found=describe_contents(folder),
            remedy=remedy,
        )
    if others := [path.name for path in sorted(set(list_images(folder, None)).difference(entries))]:
        logger.warning(
            "%d image(s) are left out, because their names do not end in %s like the others: %s. Name them one by one, "
            "or convert them",
            len(others),
            ending,
            shortlist(others),
        )
    return _cases(entries, channels, ending, where=folder)


def _cases(paths: Sequence[Path], channels: int, ending: str | None, *, where: object) -> tuple[Case, ...]:
    lost = [str(p) for p in paths if not _exists(p)]
    if lost or not paths:
        raise DatasetError(
            f"{len(lost)} input file(s) do not exist" if lost else "There are 0 cases to predict",
            where=where,
            found=shortlist(lost, limit=10) if lost else "an empty list",
            remedy="Correct the paths" if lost else "Name at least one image",
        )
    names = [f"channel {i}" for i in range(channels)]
    cases, faults = [], []
    for case, files in grouped(paths, channels=channels, ending=ending).items():
        images, found = case_of(case, files, channels=names)
        cases.append(Case(id=case, images=images))
        faults += found
    _require_usable([*faults, *ids_of_one_file(c.id for c in cases)], where)
    for name, ids in numbered_like_channels(case.id for case in cases).items():
        logger.warning(
            "%s are predicted as %d cases, because the model has %d input channel(s). nnU-Net reads such names as "
            "channels of one case, %s: if that is what they are, give only the channels that the model was trained on",
            shortlist(ids),
            len(ids),
            channels,
            name,
        )
    return tuple(cases)


def _require_usable(faults: Sequence, where: object) -> None:
    if faults:
        raise DatasetError(
            f"{len(faults)} input case(s) cannot be used",
            where=where,
            found=shortlist((f"{f.case}: {f.message}" for f in faults), limit=20, separator="; "),
            remedy="Give every channel of a case exactly once",
        )


def _with_siblings(path: Path, channels: int) -> list[Path]:
    """A single file CASE_0000 with the other channels beside it, for models with several channels."""
    ending = image_ending(path) or ""
    stem = file_stem(path, ending)
    if channels == 1 or len(stem) < 6 or stem[-5] != "_" or not stem[-4:].isdigit():
        return [path]
    siblings = [path.with_name(f"{stem[:-4]}{n:04d}{ending}") for n in range(channels)]
    return [p for p in siblings if p.exists()]


def _in_list(path: Path, channels: int) -> tuple[Case, ...]:
    """Cases of a list file; paths are relative to the file's folder."""
    folder = path.parent
    try:
        named, plain = _LIST_READERS[path.suffix.lower()](decode_text(read_whole(path)), folder)
    except OSError as error:
        raise DatasetError(f"The list of inputs cannot be read ({error.strerror})", where=path) from None
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DatasetError(
            "The list of inputs cannot be parsed",
            where=path,
            expected="one path per line (.txt), columns id, image, image ... (.csv), or paths by case id (.json)",
            found=error,
        ) from None
    require_names(named, where=path)
    cases = list(_cases([folder / p for p in plain], channels, None, where=path)) if plain else []
    for case, images in named.items():
        files = tuple(folder / p for p in images)
        if lost := [str(p) for p in files if not _exists(p)]:
            raise DatasetError("Input files do not exist", where=path, found=", ".join(lost), remedy="Correct the list")
        if len(files) not in (1, channels):
            raise DatasetError(
                f"The number of images of case {case} differs from the model's channels",
                where=path,
                expected=f"{channels} file(s), or one with all channels",
                found=len(files),
            )
        if len(set(files)) < len(files):
            logger.warning("One image is given for several channels of case %s: %s", case, ", ".join(images))
        cases.append(Case(id=case, images=files))
    if not cases:
        raise DatasetError("There are 0 cases to predict", where=path, found="an empty list")
    _require_usable(ids_of_one_file(c.id for c in cases), path)
    return tuple(sorted(cases, key=lambda c: c.id))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no file of this system has such a name
        return False


_Listed = tuple[dict[str, list[str]], list[str]]
"""Paths by case id, and paths without one."""


def _text_list(text: str, folder: Path) -> _Listed:
    lines = [line.strip() for line in text.splitlines()]
    return {}, [line for line in lines if line and not (line.startswith("#") and not _exists(folder / line))]


def _json_list(text: str, _folder: Path) -> _Listed:
    data = parse_json(text)
    if isinstance(data, list) and all(map(_is_path, data)):
        return {}, data
    if isinstance(data, list):
        if not all(isinstance(entry, dict) and {"id", "images"} <= set(entry) for entry in data):
            raise ValueError('an entry lacks "id" or "images"')
        ids = [_id(entry["id"]) for entry in data]
        if twice := sorted({one for one in ids if ids.count(one) > 1}):
            raise ValueError(f"the id {twice[0]} occurs twice")
        data = {case: entry["images"] for case, entry in zip(ids, data, strict=True)}
    if not isinstance(data, dict):
        raise ValueError("neither a list nor an object of case ids")
    named = {case: [files] if isinstance(files, str) else files for case, files in data.items()}
    for case, files in named.items():
        if not isinstance(files, list) or not all(map(_is_path, files)):
            raise ValueError(f"the images of {case} are not a path or a list of paths")
    return named, []


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _id(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("an id is neither text nor a whole number")
    return str(value)


def _csv_list(text: str, folder: Path) -> _Listed:
    """Rows "id, image, image ..." with or without a header row; rows of one column are paths."""
    lines = text.splitlines()
    if all(_exists(folder / line) for line in lines):  # names may hold commas and semicolons themselves
        return {}, [line for line in lines if line]
    rows = []
    for line, row in read_rows(text):
        while not row[-1]:
            row.pop()
        if not all(row):
            raise ValueError(f"an empty cell before others in line {line}")
        rows.append(row)
    if rows and not any(image_ending(Path(cell)) or "/" in cell or _exists(folder / cell) for cell in rows[0]):
        rows = rows[1:]
    plain = [row[0] for row in rows if len(row) == 1]
    named: dict[str, list[str]] = {}
    for row in rows:
        if len(row) > 1:
            if row[0] in named:
                raise ValueError(f"the id {row[0]} occurs twice")
            named[row[0]] = row[1:]
    return named, plain


_LIST_READERS = {".txt": _text_list, ".json": _json_list, ".csv": _csv_list}
