"""Raw datasets in nnU-Net v2's layout: dataset.json, imagesTr, labelsTr, imagesTs, or explicit file lists.

`open_dataset` looks at file names only. A dataset that is unusable as a whole raises an error; problems of single cases
are collected in `RawDataset.faults`, so that verification can report all of them at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from json import loads
from pathlib import Path
from typing import Any, Literal

from rfmedsam2.arguments import path_of
from rfmedsam2.errors import DatasetError, ImageError, RecordError, shortlist
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.verify import Fault
from rfmedsam2.store.case_files import (
    Case,
    case_of,
    closest_name,
    describe_contents,
    file_stem,
    grouped,
    ids_of_one_file,
    list_images,
)
from rfmedsam2.store.formats.image_header import ImageHeader
from rfmedsam2.store.formats.label_values import SLICER_ENDINGS
from rfmedsam2.store.images import IMAGE_ENDINGS, read_channels, read_label
from rfmedsam2.store.layout import Layout
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.ordinary_files import read_whole
from rfmedsam2.volume import Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class RawDataset:
    """A raw dataset: its dataset.json and its cases.

    Attributes:
        name: folder name, for instance Dataset004_Hippocampus.
        folder: path of the dataset.
        json: its dataset.json.
        training: cases with labels, sorted by id (files of a faulty case may be missing).
        test: cases of imagesTs, without labels.
        faults: problems that can be seen from file names alone.
    """

    name: str
    folder: Path
    json: DatasetJson
    training: tuple[Case, ...]
    test: tuple[Case, ...] = ()
    faults: tuple[Fault, ...] = ()

    @property
    def reorient(self) -> Literal["RAS"] | None:
        """Orientation of volumes after reading: RAS for nnU-Net's ...WithReorient readers, None: as in the file."""
        return "RAS" if (self.json.overwrite_image_reader_writer or "").endswith("WithReorient") else None

    def case(self, name: str | Case) -> Case:
        """The training or test case of an id; a case stands for its id.

        Raises:
            DatasetError: no such case.
        """
        cases = {case.id: case for case in (*self.test, *self.training)}
        name = name.id if isinstance(name, Case) else str(name)
        if name not in cases:
            close = get_close_matches(name, cases, n=1)
            remedy = f"Did you mean {close[0]}" if close else f"There are {shortlist(cases)}"
            raise DatasetError("The dataset has no such case", where=self.folder, found=name, remedy=remedy)
        return cases[name]

    def read(self, name: str | Case) -> tuple[Volume, Volume | None]:
        """Image (C, Z, Y, X) and label map (1, Z, Y, X) of a case, by its id; a test case has no label map: None.

        Raises:
            DatasetError: no such case.
            ImageError: a file cannot be read.
            GeometryError: grids of channels differ, impossible geometry.
        """
        case = self.case(name)
        image, _ = read_case(case, channels=len(self.json.channels))
        return image, None if case.label is None else read_label(case.label)[0]


def open_dataset(source: str | int | Path, *, root: str | Path = "rfmed_data") -> RawDataset:
    """Discover the training and test cases of a raw dataset; no image is read.

    Args:
        source: the dataset's folder, or its name or id ("Dataset004_Hippocampus", "Hippocampus", "4" or 4) in root/raw.
        root: holds raw, preprocessed and results.

    Raises:
        UsageError: no or several datasets of this name.
        DatasetError: the folder, its dataset.json or training cases do not exist; says what was found and expected.
        RecordError: dataset.json has faulty fields; lists all of them.
    """
    folder = Path(str(source))
    if len(folder.parts) == 1 and not folder.is_dir():
        layout = Layout.under(path_of(root, "root"))
        folder = layout.raw / layout.dataset_name(str(source))
    json = _dataset_json(folder)
    if json.dataset is not None:
        training, faults = _listed(folder, json)
    else:
        training, faults = _discovered(folder, json)
    if not training:
        raise _no_cases(folder, json)
    faults += ids_of_one_file(case.id for case in training)
    if json.numTraining is not None and json.numTraining != len(training):
        faults.append(
            Fault(
                case="",
                file=str(folder / "dataset.json"),
                kind="case-count",
                severity="warning",
                message=f"numTraining is {json.numTraining}, but there are {len(training)} training cases",
                remedy="Correct numTraining, or add the missing cases",
            )
        )
    test, test_faults = _test_cases(folder, json)
    return RawDataset(
        name=folder.resolve().name,
        folder=folder,
        json=json,
        training=tuple(training),
        test=tuple(test),
        faults=tuple(faults + test_faults),
    )


def read_case(case: Case, *, channels: int) -> tuple[Volume, ImageHeader]:
    """The image of a case with all its channels (C,Z,Y,X).

    Raises:
        ImageError: a file cannot be read, or the number of channels is not `channels`.
        GeometryError: the grids of the channels differ, or the geometry is invalid.
    """
    volume, header = read_channels(case.images)
    if volume.array.shape[0] != channels:
        raise ImageError(
            f"The number of channels of case {case.id} differs from the dataset's",
            where=", ".join(str(p) for p in case.images),
            expected=f"{channels} channel(s)",
            found=volume.array.shape[0],
            remedy="Give one file for each channel (CASE_0000, CASE_0001 ...) or one file with all of them",
        )
    return volume, header


def _dataset_json(folder: Path) -> DatasetJson:
    if folder.is_file():
        raise DatasetError(
            "A dataset is a folder, and this is a file", where=folder, remedy=f"Give the folder: {folder.parent}"
        )
    if not folder.is_dir():
        close = closest_name(folder.name, folder.parent)
        raise DatasetError(
            "The dataset folder does not exist", where=folder, remedy=f"Did you mean {close}?" if close else None
        )
    path = folder / "dataset.json"
    if not path.is_file():
        close = closest_name("dataset.json", folder)
        raise DatasetError(
            "The dataset has no dataset.json",
            where=folder,
            expected='a file dataset.json with "channel_names", "labels", "numTraining" and "file_ending"',
            found=describe_contents(folder),
            remedy=f"Rename {close} to dataset.json" if close else "Write one as described by nnU-Net v2",
        )
    return read_dataset_json(path)


def read_dataset_json(path: Path) -> DatasetJson:
    """Read nnU-Net v2's `dataset.json`.

    Raises:
        DatasetError: the file is in the format of nnU-Net v1.
        RecordError: it is missing, no JSON, or has faults.
    """
    try:
        return read_record(path, DatasetJson)
    except RecordError:
        if _is_version_1(path):
            raise DatasetError(
                "The labels of this dataset.json are in the format of nnU-Net v1 and the Decathlon",
                where=path,
                expected='"channel_names", "file_ending", and values by name: "labels": {"background": 0, "liver": 1}',
                found='names by value, the other way round: "labels": {"1": "liver"}, and maybe "modality"',
                remedy="Convert the dataset: rfmed_convert nnunetv1, or msd for the Decathlon's download; or "
                "exchange names and values",
            ) from None
        raise


def _is_version_1(path: Path) -> bool:
    """Whether the labels of a dataset.json are nnU-Net v1's: names by value, whatever the other fields are."""
    try:
        content = loads(read_whole(path))
    except (OSError, ValueError, RecursionError):
        return False
    labels = content.get("labels") if isinstance(content, dict) else None
    return (
        isinstance(labels, dict)
        and len(labels) > 0
        and all(re.fullmatch(r"\d+(\.0+)?", key) and isinstance(name, str) for key, name in labels.items())
    )


def _discovered(folder: Path, json: DatasetJson) -> tuple[list[Case], list[Fault]]:
    ending = json.file_ending
    # labels of a DICOM dataset cannot be .dcm themselves
    label_ending = None if ending == ".dcm" else ending
    label_files = [p for p in list_images(folder / "labelsTr", label_ending) if not p.is_dir()]
    if label_ending is not None:
        for slicer in SLICER_ENDINGS:
            label_files += [p for p in list_images(folder / "labelsTr", slicer) if p not in label_files]
    labels: dict[str, list[Path]] = {}
    for path in label_files:
        labels.setdefault(file_stem(path, label_ending), []).append(path)
    images = list_images(folder / "imagesTr", ending)
    groups = grouped(images, channels=len(json.channels), ending=ending, known_ids=labels)
    cases, faults = [], _wrong_endings(folder, json, {*groups}, {*labels})
    for case, files in groups.items():
        paths, found = case_of(case, files, channels=json.channels)
        label = labels.pop(case, None)
        faults += found + _label_faults(folder, json, case, label, next(iter(files.values()))[0])
        cases.append(
            Case(id=case, images=paths, label=label[0] if label else None, group=(json.groups or {}).get(case))
        )
    faults += [
        Fault(
            case=case,
            file=str(paths[0]),
            kind="missing-image",
            severity="error",
            message=f"Label without image: {paths[0].name}",
            remedy=f"Add {case}_0000{ending} to imagesTr, or remove the label",
        )
        for case, paths in labels.items()
    ]
    # only labels or only images do not make a dataset
    return ([] if label_files == [] else cases), faults


def _label_faults(folder: Path, json: DatasetJson, case: str, label: Sequence[Path] | None, image: Path) -> list[Fault]:
    if label is None:
        return [
            Fault(
                case=case,
                file=str(image),
                kind="missing-label",
                severity="error",
                message="Image without label",
                remedy=f"Add {folder / 'labelsTr' / (case + json.file_ending)}, or move the image to imagesTs",
            )
        ]
    if len(label) == 1:
        return []
    return [
        Fault(
            case=case,
            file=str(label[1]),
            kind="duplicate-id",
            severity="error",
            message=f"Several labels for one case: {', '.join(p.name for p in label)}",
            remedy="Keep one of them",
        )
    ]


def _wrong_endings(folder: Path, json: DatasetJson, ids: set[str], labels: set[str]) -> list[Fault]:
    """Images and labels whose ending is not file_ending: readers of this layout would skip them."""
    faults = []
    for name in ("imagesTr", "labelsTr"):
        there = {file_stem(path, json.file_ending) for path in list_images(folder / name, json.file_ending)}
        for path in list_images(folder / name, None):
            if path.is_dir() or path.name.endswith(json.file_ending):
                continue
            if name == "labelsTr" and (json.file_ending == ".dcm" or path.name.lower().endswith(SLICER_ENDINGS)):
                continue
            stem = file_stem(path, None)
            case = next((i for i in (stem, stem[:-5]) if i in ids | labels), None)
            twin = (name == "imagesTr" and stem in ids) or not there.isdisjoint((stem, case))
            faults.append(
                Fault(
                    case=case or stem,
                    file=str(path),
                    kind="duplicate-id" if twin else "wrong-suffix",
                    severity="error",
                    message=f"{name}/{path.name} and the file ending in {json.file_ending} have the same case id"
                    if twin
                    else f"{path.name} does not end in {json.file_ending}, the file_ending of dataset.json",
                    remedy="Convert the file, or remove it" if twin or case is None else "Convert it",
                )
            )
    return faults


def _listed(folder: Path, json: DatasetJson) -> tuple[list[Case], list[Fault]]:
    """Cases of dataset.json's "dataset": id -> {"images": [...], "label": ...}; paths are relative to the folder."""
    cases, faults = [], []
    for case, entry in sorted((json.dataset or {}).items()):
        images, label = _entry(folder, case, entry)
        count = len(json.channels)
        if len(images) not in (1, count):
            faults.append(
                Fault(
                    case=case,
                    file=str(images[0]) if images else str(folder / "dataset.json"),
                    kind="missing-channel" if len(images) < count else "extra-channel",
                    severity="error",
                    message=f"{len(images)} image file(s) listed for {count} channel(s)",
                    remedy="List one file for each channel, or one file with all of them",
                )
            )
        if label is None:
            faults += _label_faults(folder, json, case, None, images[0] if images else folder)
        faults += [
            Fault(
                case=case,
                file=str(path),
                kind="missing-image" if path != label else "missing-label",
                severity="error",
                message=f"A file listed in dataset.json does not exist: {path}",
                remedy="Correct the path (absolute, or relative to the dataset's folder)",
            )
            for path in (*images, *([label] if label else []))
            if not path.exists()
        ]
        cases.append(Case(id=case, images=images, label=label, group=(json.groups or {}).get(case)))
    return cases, faults


def _entry(folder: Path, case: str, entry: Mapping[str, Any]) -> tuple[tuple[Path, ...], Path | None]:
    images, label = entry.get("images"), entry.get("label")
    images = [images] if isinstance(images, str) else images
    valid_label = label is None or isinstance(label, str)
    if not (valid_label and isinstance(images, list) and all(isinstance(i, str) for i in images)):
        raise DatasetError(
            f'The entry of case {case} in "dataset" is invalid',
            where=folder / "dataset.json",
            expected='{"images": ["path", ...], "label": "path"}',
            found=dict(entry),
        )
    return tuple(folder / i for i in images), (folder / label if label else None)


def _test_cases(folder: Path, json: DatasetJson) -> tuple[list[Case], list[Fault]]:
    entries = list_images(folder / "imagesTs", json.file_ending)
    cases, faults = [], []
    for case, files in grouped(entries, channels=len(json.channels), ending=json.file_ending).items():
        paths, found = case_of(case, files, channels=json.channels)
        cases.append(Case(id=case, images=paths, group=(json.groups or {}).get(case)))
        faults += found
    return cases, faults


def _no_cases(folder: Path, json: DatasetJson) -> DatasetError:
    images, labels = folder / "imagesTr", folder / "labelsTr"
    expected = f"imagesTr/CASE_0000{json.file_ending} and labelsTr/CASE{json.file_ending}"
    if len(json.channels) > 1:
        expected = (
            f"imagesTr/CASE_0000{json.file_ending} to _{len(json.channels) - 1:04d} for {json.channels}, "
            f"and labelsTr/CASE{json.file_ending}"
        )
    if json.dataset is not None:
        expected = 'at least one case in "dataset" of dataset.json'
    return DatasetError(
        "The dataset has no training cases",
        where=folder,
        expected=expected,
        found=f"in imagesTr: {describe_contents(images)}; in labelsTr: {describe_contents(labels)}",
        remedy=_hint(folder, json),
    )


def _hint(folder: Path, json: DatasetJson) -> str:
    for name in ("imagesTr", "labelsTr"):
        if not (folder / name).is_dir():
            close = closest_name(name, folder)
            return f"Rename {close} to {name}" if close else f"Create the folder {name}"
        others = [p for p in list_images(folder / name, None) if not p.name.endswith(json.file_ending)]
        if others and not list_images(folder / name, json.file_ending):
            ending = next((e for e in IMAGE_ENDINGS if others[0].name.lower().endswith(e)), others[0].suffix)
            return f'Set "file_ending" in dataset.json to "{ending}", if that is the format of images and labels'
    return "Check that file names and file_ending match"
