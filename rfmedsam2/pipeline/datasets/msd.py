"""Medical Segmentation Decathlon and nnU-Net v1: TaskXX_Name -> DatasetXXX_Name, one file per channel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rfmedsam2.arguments import option
from rfmedsam2.errors import DatasetError, UsageError, shortlist
from rfmedsam2.pipeline.datasets.conversion import (
    ENDING,
    Conversion,
    ConvertOptions,
    Download,
    Source,
    convert,
    folder_of,
    listed,
    pair,
)
from rfmedsam2.system.json_text import parse_json
from rfmedsam2.system.ordinary_files import read_whole
from rfmedsam2.system.progress import Track, silent

_KEPT = ("description", "reference", "license", "release")


def convert_msd(
    download: Path,
    raw: Path,
    *,
    dataset_id: int | None = None,
    options: ConvertOptions | None = None,
    track: Track = silent,
) -> Conversion:
    """Build DatasetXXX_Name from an MSD task's folder (dataset.json, imagesTr, labelsTr, imagesTs).

    Args:
        download: the folder TaskXX_Name.
        raw: the raw folder in which the dataset appears.
        dataset_id: number of the dataset; None: the task's.
        options: copy or link, replace, workers. Images with several channels are always rewritten.
        track: progress display.

    Raises:
        DatasetError: the folder is not an MSD task, or cases have faults; lists all of them.
        UsageError: the dataset has no number, or it exists and `options.force` is not set.
        StoreError: the raw folder cannot be written, or files cannot be linked.
    """
    found, content = _task(download, "MSD", dataset_id)
    images, tests = (listed(found.folder / part) for part in ("imagesTr", "imagesTs"))
    _require_layout(found, others={f"{_id_of(entry)}_0000" for entry in content["training"]}, there=images)
    _pair_with_declared(found, content, images=images, tests=tests)
    return convert(found, raw, options=options or ConvertOptions(), track=track)


def convert_nnunet_v1(
    download: Path,
    raw: Path,
    *,
    dataset_id: int | None = None,
    options: ConvertOptions | None = None,
    track: Track = silent,
) -> Conversion:
    """Build DatasetXXX_Name from a dataset of nnU-Net v1: as the Decathlon's, with a file CASE_0000 per channel.

    Args:
        download: the folder TaskXXX_Name below nnUNet_raw_data.
        raw: the raw folder in which the dataset appears.
        dataset_id: number of the dataset; None: the task's.
        options: copy or link, replace, workers.
        track: progress display.

    Raises:
        DatasetError: the folder is not a dataset of nnU-Net v1, or cases have faults; lists all of them.
        UsageError: the dataset has no number, or it exists and `options.force` is not set.
        StoreError: the raw folder cannot be written, or files cannot be linked.
    """
    found, content = _task(download, "nnU-Net v1", dataset_id)
    for part, folder in (("training", "imagesTr"), ("test", "imagesTs")):  # some list the file of the first channel
        there = listed(found.folder / folder)
        ids = (_id_of(entry) for entry in content.get(part, []))
        content[part] = [id.removesuffix("_0000") if id in there else id for id in ids]
    _require_layout(found, others=set(content["training"]), there=listed(found.folder / "imagesTr"))
    training, tests = (_channel_files(found, part) for part in ("imagesTr", "imagesTs"))
    first = [{case: files[0] for case, files in cases.items()} for cases in (training, tests)]
    _pair_with_declared(found, content, images=first[0], tests=first[1])
    others = {files[0]: files[1:] for cases in (training, tests) for files in cases.values()}
    found.sources = [replace(source, others=others[source.image]) for source in found.sources]
    return convert(found, raw, options=options or ConvertOptions(), track=track)


def _require_layout(found: Download, *, others: set[str], there: Mapping[str, Path]) -> None:
    """Check that images are not named in the other of both layouts.

    Raises:
        UsageError: all are; names the converter of that one.
    """
    if not others or not others <= set(there):
        return
    of_msd = found.what == "MSD"
    raise UsageError(
        f"The images are named as {'nnU-Net v1' if of_msd else 'the Decathlon'} names them",
        where=found.folder / "imagesTr",
        expected=f"CASE{ENDING} with all channels" if of_msd else f"CASE_0000{ENDING}, a file for each channel",
        found=there[min(others)].name,
        remedy=f"Convert it with rfmed_convert {'nnunetv1' if of_msd else 'msd'}",
    )


def _channel_files(found: Download, part: str) -> dict[str, tuple[Path, ...]]:
    """Case -> files of its channels, all of which must exist."""
    suffixed = listed(found.folder / part, r"(.+_\d{4})")
    files: dict[str, tuple[Path, ...]] = {}
    for case in sorted({name[:-5] for name in suffixed}):
        wanted = [f"{case}_{number:04d}" for number in range(len(found.channels))]
        lacking = [name for name in wanted if name not in suffixed]
        if lacking:
            found.faults.append(f"{case}: missing {', '.join(f'{part}/{name}{ENDING}' for name in lacking)}")
        else:
            files[case] = tuple(suffixed[name] for name in wanted)
    return files


def _task(download: Path, what: str, dataset_id: int | None) -> tuple[Download, dict[str, Any]]:
    home = folder_of(download, ("imagesTr",), what=what, expected="dataset.json, imagesTr and labelsTr").parent
    content = _content(home / "dataset.json", what)
    found = Download(
        what=what,
        folder=home,
        name=_dataset_name(home, content, dataset_id),
        channels=tuple(content["modality"][str(i)] for i in range(len(content["modality"]))),
        labels={"background" if value == 0 else str(name): value for value, name in _by_value(content["labels"])},
        further={key: content[key] for key in _KEPT if key in content},
    )
    return found, content


def _pair_with_declared(
    found: Download, content: dict[str, Any], *, images: dict[str, Path], tests: dict[str, Path]
) -> None:
    """Add all cases, training and test, of the folders and of dataset.json."""
    named = [_id_of(entry) for entry in content["training"]]
    pair(found, images, listed(found.folder / "labelsTr"), declared=named)
    for case in sorted({*tests, *(_id_of(entry) for entry in content.get("test", []))}):
        if case in tests:
            found.sources.append(Source(id=case, image=tests[case]))
        else:
            found.faults.append(f"{case}: dataset.json lists this test case, but it has no image")
    _compare_with_declared(found, content, set(images) - set(named))


def _content(path: Path, what: str) -> dict[str, Any]:
    """Read the download's dataset.json with the fields that a conversion needs.

    Raises:
        DatasetError: missing, not JSON, or without one of these fields.
    """
    if not path.is_file():
        raise DatasetError(
            f"The {what} download has no dataset.json", where=path.parent, remedy="Extract the archive again"
        )
    try:
        content: Any = parse_json(read_whole(path))
        channels = sorted(int(number) for number in content["modality"])
        sound = channels == list(range(len(channels))) and _is_sound_table(content["labels"])
        _ = [_id_of(entry) for entry in [*content["training"], *content.get("test", [])]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            f"The {what} download's dataset.json is invalid",
            where=path,
            expected="modality, labels and training as the Decathlon writes them",
            found=f"{type(error).__name__}: {error}",
            remedy="Extract the archive again; datasets in the layout of nnU-Net v2 need no conversion",
        ) from error
    if not sound:
        raise DatasetError(
            f"The {what} download's dataset.json has invalid channel or label numbers",
            where=path,
            expected="channels 0, 1, ..., no negative labels, and one name for each, background for 0 alone",
            found=f"channels {list(content['modality'])}, labels {content['labels']}",
        )
    return content


def _is_sound_table(labels: dict[str, Any]) -> bool:
    """Whether names by value say the same the other way round; 0 is the background, whatever it is called."""
    table = _by_value(labels)
    values = [value for value, _ in table]
    names = ["background" if value == 0 else str(name).strip() for value, name in table]
    return min(values) >= 0 and all(names) and len(set(values)) == len(set(names)) == len(names)


def _dataset_name(home: Path, content: dict[str, Any], dataset_id: int | None) -> str:
    match = re.fullmatch(r"Task(\d+)_(\w+)", home.resolve().name)
    number = dataset_id if dataset_id is not None else int(match.group(1)) if match else None
    name = match.group(2) if match else re.sub(r"\W+", "_", str(content.get("name", ""))).strip("_")
    if number is None or not name or not 0 < number < 1000:
        raise UsageError(
            "The dataset has no valid number or name",
            where=home,
            expected=f"a folder like Task04_Hippocampus, or a number from 1 to 999 ({option('dataset_id')})",
            found=home.name if dataset_id is None else dataset_id,
        )
    return f"Dataset{number:03d}_{name}"


def _compare_with_declared(found: Download, content: dict[str, Any], unnamed: set[str]) -> None:
    if unnamed:
        names = shortlist(sorted(unnamed), limit=10)
        found.warnings.append(f"dataset.json does not list {len(unnamed)} training case(s): {names}; included anyway")
    tests = sum(source.label is None for source in found.sources)
    for key, count in (("numTraining", len(found.sources) - tests), ("numTest", tests)):
        if key in content and content[key] != count:
            found.warnings.append(f"{key} is {content[key]} in dataset.json, but {count} were found")


def _by_value(labels: dict[str, Any]) -> list[tuple[int, Any]]:
    """Values, of which pandas writes 1 as 1.0, with their names.

    Raises:
        ValueError: a key is not a whole number.
    """
    return [(int(re.sub(r"\.0+$", "", key)), name) for key, name in labels.items()]


def _id_of(entry: Any) -> str:
    """Case id of {"image": "./imagesTr/x.nii.gz", ...} or of a path; only the file name matters."""
    name = entry["image"] if isinstance(entry, dict) else entry
    return Path(name).name.removesuffix(ENDING)
