"""Verification of a dataset: reads every file once and reports all faults of all cases.

`examine_case` also returns what it read, so that fingerprinting can verify without a second read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfmedsam2.arrays import intensity_limit
from rfmedsam2.errors import GeometryError, RfMedSamError
from rfmedsam2.pipeline.datasets.label_agreement import misnamed_segments
from rfmedsam2.records.dataset import REGION_REMEDY, DatasetJson
from rfmedsam2.records.plan import Split
from rfmedsam2.records.verify import Fault, FaultKind, VerifyReport
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.formats.detached import spacing_file
from rfmedsam2.store.formats.image_header import (
    ChangedWhileReadingError,
    ImageHeader,
    NotLabelsError,
    TruncatedImageError,
    assumptions,
    grids_differ,
)
from rfmedsam2.store.images import read_image, read_label, with_channel
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.volume import Volume

_FOUND_BY_NAMES = ("missing-channel", "extra-channel", "missing-image", "missing-label")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseExamination:
    """One case, read once.

    Attributes:
        case: the case.
        volume: all channels (C,Z,Y,X) in the orientation of the file; None if a channel is missing or unreadable.
        header: header of the first readable channel, None if there is none.
        label: label map (Z,Y,X), uint8 or uint16; None if missing, unreadable, or of a different shape.
        voxels_by_label: label value -> number of voxels, without background; empty without label.
        faults: all faults.
    """

    case: Case
    volume: Volume | None
    header: ImageHeader | None
    label: np.ndarray | None
    voxels_by_label: dict[int, int]
    faults: tuple[Fault, ...]


def verify(
    dataset: RawDataset, *, splits: Sequence[Split] = (), workers: int = 2, track: Track = silent
) -> VerifyReport:
    """Read every image and label of a dataset once and collect all faults.

    Args:
        dataset: dataset returned by `open_dataset`.
        splits: folds to check for patients in both training and validation.
        workers: number of cases read in parallel.
        track: progress display.
    """
    begin = time.monotonic()
    cases = [*dataset.training, *dataset.test]

    def faults_of(case: Case) -> tuple[Fault, ...]:
        return examine_case(case, dataset.json).faults

    faults = [*dataset.faults, *_region_faults(dataset), *split_faults(dataset, splits)]
    for found in map_cases(
        faults_of, cases, workers=workers, name=lambda case: case.id, track=track, description="Verifying"
    ):
        faults += [fault for fault in found if not _known(fault, dataset.faults)]
    return VerifyReport(
        dataset=dataset.name,
        cases=len(cases),
        files=sum(len(case.images) + (case.label is not None) for case in cases),
        seconds=time.monotonic() - begin,
        faults=tuple(sorted(faults, key=lambda f: (f.severity, f.case, f.kind))),
    )


def examine_case(case: Case, json: DatasetJson) -> CaseExamination:
    """Read the files of a case once and collect all faults; faulty files raise no errors."""
    faults: list[Fault] = []
    volume, header = _examine_image(case, json, faults)
    label, counts = None, {}
    if case.label is not None:
        label, label_header = _examine_label(case, case.label, faults)
        if label is not None:
            counts = label_counts(label)
            faults += _value_faults(case, case.label, counts, json) + _name_faults(case, case.label, counts, json)
        if label is not None and label_header is not None and header is not None:
            faults += _grid_faults(case, case.label, header, label_header, "the image")
            if label.shape != header.grid.shape_zyx:
                label = None
    return CaseExamination(
        case=case, volume=volume, header=header, label=label, voxels_by_label=counts, faults=tuple(faults)
    )


def label_counts(label_zyx: np.ndarray) -> dict[int, int]:
    """Label value -> number of voxels, without background; counted per plane, because bincount widens its input."""
    counts = np.zeros(int(label_zyx.max()) + 1, dtype=np.int64)
    for plane in label_zyx:
        counts += np.bincount(plane.ravel(), minlength=counts.size)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts) if value != 0}


def split_faults(dataset: RawDataset, splits: Sequence[Split]) -> list[Fault]:
    """Faults for cases or patients in both training and validation of a fold, and for cases that do not exist."""
    groups = {case.id: case.group for case in dataset.training}
    faults = []
    for number, split in enumerate(splits):
        faults += [
            _fault(case, "", "split-overlap", f"Fold {number} trains and validates on this case", "Make new splits")
            for case in sorted(set(split.train) & set(split.val))
        ]
        faults += [
            _fault(case, "", "split-unknown", f"Fold {number} names a case that does not exist", "Make new splits")
            for case in sorted((set(split.train) | set(split.val)) - set(groups))
        ]
        trained = {groups.get(case): case for case in sorted(split.train, reverse=True) if groups.get(case)}
        for case in sorted(set(split.val) - set(split.train)):
            group = groups.get(case)
            if group is not None and group in trained:
                message = f"Fold {number} validates on patient {group} and also trains on it ({trained[group]})"
                faults.append(_fault(case, "", "split-overlap", message, "Make new splits, grouped by patient"))
    return faults


def _region_faults(dataset: RawDataset) -> list[Fault]:
    message = dataset.json.label_set.region_warning
    return (
        []
        if message is None
        else [_warning("", dataset.folder / "dataset.json", "region-order", message, REGION_REMEDY)]
    )


def _known(fault: Fault, layout: Sequence[Fault]) -> bool:
    """Whether a fault was already found from file names: channels of a case, missing files."""
    known = [f for f in layout if f.case == fault.case and f.kind in _FOUND_BY_NAMES]
    return any(f.kind == fault.kind or f.file == fault.file for f in known)


def _examine_image(case: Case, json: DatasetJson, faults: list[Fault]) -> tuple[Volume | None, ImageHeader | None]:
    stack, header, broken = None, None, False
    for index, path in enumerate(case.images):
        try:
            volume, found = read_image(path)
            stack_header = header or found
            differ = _grid_faults(case, path, stack_header, found, case.images[0].name)
            faults += differ + _header_faults(case, path, found) + _intensity_faults(case, path, volume.array)
            header = stack_header
            if len(case.images) == 1:
                stack = volume.array
            elif all(fault.kind != "shape-mismatch" for fault in differ):
                stack = with_channel(stack, volume.array, index=index, count=len(case.images), where=path)
            else:
                broken = True
        except RfMedSamError as error:
            faults.append(_fault_of(case, path, error))
            broken = True
    if stack is None or header is None or broken:
        return None, header
    expected = len(json.channels)
    if stack.shape[0] != expected:
        kind = "missing-channel" if stack.shape[0] < expected else "extra-channel"
        message = f"{stack.shape[0]} channel(s) in the image, but dataset.json declares {expected}"
        faults.append(_fault(case, case.images[0], kind, message, "Correct channel_names or the files"))
        return None, header
    return Volume(array=stack, grid=header.grid), header


def _examine_label(case: Case, path: Path, faults: list[Fault]) -> tuple[np.ndarray | None, ImageHeader | None]:
    try:
        volume, header = read_label(path)
    except RfMedSamError as error:
        faults.append(_fault_of(case, path, error))
        return None, None
    faults += _header_faults(case, path, header)
    return volume.array[0], header


def _intensity_faults(case: Case, path: Path, array: np.ndarray) -> list[Fault]:
    faults = []
    for number, channel in enumerate(array):
        which = f" in channel {number}" if len(array) > 1 else ""
        with np.errstate(invalid="ignore"):
            low, high = channel.min(), channel.max()  # NaN and infinity propagate to them
            limit = intensity_limit(channel.dtype)
            bad = (
                0 if low >= -limit and high <= limit else int(np.count_nonzero(~(abs(channel.astype(float)) <= limit)))
            )
        if bad:
            message = f"{bad} voxel(s) are NaN, infinite or beyond {limit:.3g}{which}"
            faults.append(_fault(case, path, "not-finite", message, "Replace them, for instance by background"))
        elif low == high:
            message = f"All voxels have the same value {low}{which}"
            faults.append(_warning(case, path, "constant-image", message, "Check the conversion of this image"))
    return faults


def _value_faults(case: Case, path: Path, counts: dict[int, int], json: DatasetJson) -> list[Fault]:
    labels = json.label_set
    foreign = {value: n for value, n in counts.items() if value not in labels.allowed_values}
    faults = []
    if foreign:
        found = ", ".join(f"{value} ({n} voxels)" for value, n in list(foreign.items())[:10])
        message = f"Undeclared label value(s) {found}; declared are {', '.join(map(str, labels.allowed_values))}"
        faults.append(_fault(case, path, "undeclared-label", message, "Correct the label map, or declare the value"))
    if not any(value in counts for value in labels.values):
        faults.append(_warning(case, path, "empty-label", "No foreground voxel", "Check that this is intended"))
    return faults


def _name_faults(case: Case, path: Path, counts: dict[int, int], json: DatasetJson) -> list[Fault]:
    misnamed = misnamed_segments(path, json.label_set.foreground, "dataset.json")
    wrong = [phrase for value, phrase in misnamed if value in counts]
    if not wrong:
        return []
    message = f"Segments have other values than dataset.json gives their names: {'; '.join(wrong)}"
    remedy = "Give the segments the values of dataset.json: in Slicer export them to a labelmap with its color table"
    return [_fault(case, path, "label-names", message, remedy)]


def _header_faults(case: Case, path: Path, header: ImageHeader) -> list[Fault]:
    faults = []
    if header.skew_degrees > 0.01:  # less is rounding
        message = f"Axes are {header.skew_degrees:.3f} degrees from perpendicular (corrected)"
        faults.append(_warning(case, path, "skewed-axes", message, "No action needed: labels keep the file's axes"))
    for kind, message in assumptions(header).items():
        faults.append(_warning(case, path, kind, message, _remedy(kind, path)))
    return faults


def _remedy(kind: FaultKind, path: Path) -> str:
    """What to do about an assumption."""
    match kind:
        case "forms-differ":
            return "Check that image and label agree in a viewer"
        case "unit-ignored":
            return "Convert the file to mm if lengths matter"
        case "scaling-ignored":
            return "Store the values that are meant"
    beside = spacing_file(path)
    where = "its header" if beside is None else f'{beside.name} beside it: {{"spacing": [z, y, x]}}'
    return f"Write the spacing in mm to {where}"


def _grid_faults(case: Case, path: Path, one: ImageHeader, other: ImageHeader, whose: str) -> list[Fault]:
    differ = grids_differ(one, other)
    if differ is None:
        return []
    phrase, harmless = differ
    if one.grid.shape_zyx != other.grid.shape_zyx:
        message = f"Grid differs from {whose}: {phrase}"
        return [_fault(case, path, "shape-mismatch", message, "Resample one to the other")]
    if harmless:
        message = f"Grid differs slightly from {whose}: {phrase}; less than half a voxel"
        return [_warning(case, path, "affine-mismatch", message, "No action needed, or copy the image's header")]
    message = f"Grid differs from {whose}: {phrase}"
    return [_fault(case, path, "affine-mismatch", message, "Resample one to the other, or correct the wrong header")]


def _fault_of(case: Case, path: Path, error: RfMedSamError) -> Fault:
    kind: FaultKind = "unreadable"
    if isinstance(error, ChangedWhileReadingError):
        kind = "changed-while-reading"
    elif isinstance(error, TruncatedImageError):
        kind = "truncated"
    elif isinstance(error, NotLabelsError):
        kind = "not-a-label"
    elif isinstance(error, GeometryError):
        kind = "bad-geometry"
    parts = [error.what]
    if error.expected is not None:
        parts.append(f"expected {error.expected}")
    if error.found is not None:
        parts.append(f"found {error.found}")
    return _fault(case, error.where or path, kind, "; ".join(parts), error.remedy or "Replace the file")


def _fault(case: Case | str, file: object, kind: FaultKind, message: str, remedy: str) -> Fault:
    name = case if isinstance(case, str) else case.id
    return Fault(case=name, file=str(file), kind=kind, severity="error", message=message, remedy=remedy)


def _warning(case: Case | str, file: object, kind: FaultKind, message: str, remedy: str) -> Fault:
    return _fault(case, file, kind, message, remedy).model_copy(update={"severity": "warning"})
