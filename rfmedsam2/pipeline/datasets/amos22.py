"""AMOS22 (500 CT and 100 MR, 15 organs): the official download -> Dataset218_AMOS22_CT or Dataset219_AMOS22.

The validation cases, whose labels are public since the challenge ended, are training cases here; the split `amos22`
restores the official one. Numbers of test cases differ between the official pages, so they are not checked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from rfmedsam2.errors import DatasetError, UsageError
from rfmedsam2.pipeline.datasets.conversion import (
    Conversion,
    ConvertOptions,
    Download,
    Source,
    convert,
    folder_of,
    listed,
    pair,
)
from rfmedsam2.pipeline.datasets.label_tables import AMOS22_LABELS
from rfmedsam2.pipeline.datasets.published_splits import AMOS_LAST_CT
from rfmedsam2.system.json_text import parse_json
from rfmedsam2.system.ordinary_files import read_whole
from rfmedsam2.system.progress import Track, silent

Task = Literal[1, 2]

NAMES = {1: "Dataset218_AMOS22_CT", 2: "Dataset219_AMOS22"}

DAMAGED = frozenset({5514, 5437})
"""Unusable files of the unlabeled part."""

_OFFICIAL = {("training", "CT"): 200, ("training", "MR"): 40, ("validation", "CT"): 100, ("validation", "MR"): 20}
_PARTS = {"training": ("imagesTr", "labelsTr"), "validation": ("imagesVa", "labelsVa")}


def number_of(case: str) -> int | None:
    """Read the number in amos_0001; None for other names."""
    match = re.fullmatch(r"amos_(\d+)", case)
    return int(match.group(1)) if match else None


def modality_of(number: int) -> Literal["CT", "MR"]:
    """CT up to 500, else MR (readme of the official download)."""
    return "CT" if number <= AMOS_LAST_CT else "MR"


def convert_amos22(
    download: Path,
    raw: Path,
    *,
    task: Task = 1,
    options: ConvertOptions | None = None,
    track: Track = silent,
) -> Conversion:
    """Build Dataset218_AMOS22_CT (task 1: CT only) or Dataset219_AMOS22 (task 2: CT and MR).

    `download` is the folder with dataset.json, imagesTr, labelsTr, imagesVa, labelsVa and imagesTs, or its parent.

    Raises:
        DatasetError: the folder is not an AMOS22 download, or cases have faults; lists all of them.
        UsageError: the task does not exist, or the dataset exists and `options.force` is not set.
        StoreError: the raw folder cannot be written, or files cannot be linked.
    """
    if task not in NAMES:
        raise UsageError("Unknown AMOS22 task", expected="1 (CT) or 2 (CT and MR)", found=task)
    home = folder_of(
        download, ("imagesTr", "amos22/imagesTr"), what="AMOS22", expected="imagesTr, labelsTr, imagesVa, labelsVa"
    ).parent
    found = Download(
        what="AMOS22",
        folder=home,
        name=NAMES[task],
        channels=("CT",) if task == 1 else ("CT_or_MR",),
        labels=AMOS22_LABELS,
        further={
            "description": "AMOS22 after the challenge: its validation cases are training cases here",
            "reference": "https://amos22.grand-challenge.org, https://zenodo.org/records/7262581",
            # headers of AMOS are not uniform: nnU-Net's own converters request the same reader
            "overwrite_image_reader_writer": "NibabelIOWithReorient",
        },
    )
    declared = _declared(home / "dataset.json", found)
    for part, (images, labels) in _PARTS.items():
        _add_part(found, part, (home / images, home / labels), declared, task)
    seen = {source.id for source in found.sources}
    for case, path in _wanted(listed(home / "imagesTs"), found, task).items():
        if case in seen:
            found.faults.append(f"{case}: the same case is in imagesTs and among the labeled ones")
        found.sources.append(Source(id=case, image=path))
    return convert(found, raw, options=options or ConvertOptions(), track=track)


def _add_part(
    found: Download, part: str, folders: tuple[Path, Path], declared: dict[str, list[str]], task: Task
) -> None:
    images, labels = (_wanted(listed(folder), found, task) for folder in folders)
    seen = {source.id for source in found.sources}
    found.faults += [f"{case}: the same case is in several parts" for case in sorted(seen & set(images))]
    named = [case for case in declared.get(part, []) if _is_wanted(case, task)]
    pair(found, images, labels, declared=named)
    unnamed = sorted(set(images) - set(named))
    if part in declared and unnamed:
        found.warnings.append(f"{part}: dataset.json does not list {', '.join(unnamed)}; included anyway")
    for modality in ("CT", "MR")[:task]:
        count = sum(modality_of(number_of(case) or 0) == modality for case in images)
        if count != _OFFICIAL[part, modality]:
            found.warnings.append(f"{part}: {count} {modality} cases, officially {_OFFICIAL[part, modality]}")


def _wanted(files: dict[str, Path], found: Download, task: Task) -> dict[str, Path]:
    """Files of the task's modality; warns about those skipped because of their name or known damage."""
    for case, path in files.items():
        number = number_of(case)
        if number is None:
            found.warnings.append(f"{path.parent.name}/{path.name}: skipped, its name is not like amos_0001.nii.gz")
        elif number in DAMAGED:
            found.warnings.append(f"{path.parent.name}/{path.name}: skipped, known to be damaged")
    return {case: path for case, path in files.items() if _is_wanted(case, task)}


def _is_wanted(case: str, task: Task) -> bool:
    number = number_of(case)
    return number is not None and number not in DAMAGED and (task == 2 or modality_of(number) == "CT")


def _declared(path: Path, found: Download) -> dict[str, list[str]]:
    """Case ids in the official dataset.json, by part; its label values must be those of AMOS22."""
    if not path.is_file():
        found.warnings.append("dataset.json does not exist; only the folders were read")
        return {}
    try:
        content: Any = parse_json(read_whole(path))
        values = sorted(int(value) for value in content.get("labels", {}))
        ids = {part: [_id_of(entry) for entry in content[part]] for part in _PARTS if part in content}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            "The download's dataset.json is not AMOS22's",
            where=path,
            expected="labels by value, training and validation as AMOS22 writes them",
            found=f"{type(error).__name__}: {error}",
            remedy="Extract the archive again, or choose the converter of the dataset that this is",
        ) from error
    if values and values != sorted(AMOS22_LABELS.values()):
        found.faults.append(f"dataset.json declares the label values {values}, expected 0 to 15")
    return ids


def _id_of(entry: Any) -> str:
    """Case id of {"image": "./imagesTr/amos_0001.nii.gz", ...} or of a path."""
    name = entry["image"] if isinstance(entry, dict) else entry
    return Path(name).name.removesuffix(".nii.gz")
