"""Existing label maps in the formats of other programs. Every map is checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rfmedsam2.arguments import Part, option
from rfmedsam2.errors import DatasetError, RecordError, RfMedSamError, UsageError, shortlist
from rfmedsam2.pipeline.datasets.label_agreement import DATASET, read_tables
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PREDICTIONS, PredictionsRecord
from rfmedsam2.store.case_files import Case, label_files_in
from rfmedsam2.store.exchange.codes import code_table, segments_of
from rfmedsam2.store.exchange.dicom_segmentation import require_highdicom
from rfmedsam2.store.exchange.formats import (
    ENDINGS,
    NO_SERIES,
    LabelSource,
    exchange_path,
    needs_series,
    require_exchangeable,
    write_exchange,
)
from rfmedsam2.store.formats.dicom_files import is_dicom_file, is_dicom_folder
from rfmedsam2.store.images import image_ending, read_label
from rfmedsam2.system.atomic import is_taken, read_record
from rfmedsam2.system.ordinary_files import require_folder
from rfmedsam2.system.progress import Track, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatOptions:
    """What is written of each label map.

    Attributes:
        formats: names of formats (`store.exchange.formats.ENDINGS`).
        series: DICOM series of the only map, or a folder that holds a series for each, in a folder of its name; or the
            series by the ids of the maps.
        codes: a user's table of codes.
        keep_empty: write frames without labels of a DICOM-SEG, too.
        overwrite: replace files that are there.
    """

    formats: tuple[str, ...]
    series: Path | Mapping[str, Path] | None = None
    codes: Path | None = None
    keep_empty: bool = False
    overwrite: bool = False


def convert_labels(
    maps: Path | Mapping[str, Path],
    out: Path,
    options: FormatOptions,
    *,
    labels: LabelSet | None = None,
    track: Track = silent,
) -> tuple[Path, ...]:
    """Write label maps in other formats: OUT/FORMAT/CASE + ending; returns the files.

    Args:
        maps: folder of label maps, or one file; or files of one folder by their ids.
        out: output folder.
        options: what is written.
        labels: names of the values; None: those of dataset.json or predictions.json beside the maps, or one folder up.
        track: progress display.

    Raises:
        UsageError: no maps or formats, or files would be replaced.
        DatasetError: maps that cannot be written; names each and the reason, and nothing was written.
        RecordError: a damaged table of labels or codes.
    """
    require_formats(options.formats)
    found, faults = _found(maps) if isinstance(maps, Path) else (dict(maps), [])
    targets = {id: [exchange_path(out, id, format) for format in options.formats] for id in found}
    require_new(
        [path for paths in targets.values() for path in paths], inputs=[*found.values()], overwrite=options.overwrite
    )
    folder = next(iter(found.values())).parent
    source_of = _Sources(folder, options, labels, single=len(found) == 1)
    for id, path in track(found.items(), "check", len(found)):
        try:
            require_exchangeable(source_of(id, path), options.formats)
        except RfMedSamError as error:
            faults.append(f"{id}: {error}")
    if faults:
        raise _all(faults, "nothing was written")
    written = []
    for id, path in track(found.items(), "write", len(found)):
        try:
            source = source_of(id, path)
            for format, target in zip(options.formats, targets[id], strict=True):
                write_exchange(target, source, format=format, keep_empty=options.keep_empty)
                written.append(target)
        except RfMedSamError as error:
            faults.append(f"{id}: {error}")
    if faults:
        raise _all(faults, f"{len(written)} file(s) were written")
    return tuple(written)


class PredictedFormats:
    """Formats of label maps that are about to be predicted, checked beforehand.

    Args:
        cases: the cases to predict.
        out: folder of the label maps.
        formats: names of formats; none: nothing is checked and written.
        continue_: keep files of label maps that are kept.
        overwrite: replace files that are there.
        part: only this part of the cases is predicted.

    Raises:
        UsageError: no folder, or unknown formats; cases without a DICOM series for a DICOM-SEG; files would be
            replaced.
        MissingPackageError: highdicom is needed, and not installed.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        out: Path,
        formats: tuple[str, ...],
        *,
        continue_: bool,
        overwrite: bool,
        part: Part | None = None,
    ) -> None:
        cases = cases if part is None else part.of(sorted(cases, key=lambda case: case.id))
        series = {case.id: case.images[0] for case in cases if _is_dicom(case.images[0])} if formats else {}
        self._out, self._overwrite = out, overwrite
        self._options = FormatOptions(formats=formats, series=series, overwrite=overwrite)
        if not formats:
            return
        require_formats(formats)
        if image_ending(out) is not None and not out.is_dir():
            raise UsageError("Other formats are written beside the label maps", where=out, expected="an output folder")
        if needs_series(formats):
            require_highdicom()
            if without := [case.id for case in cases if case.id not in series]:
                raise UsageError(
                    NO_SERIES,
                    found=f"{len(without)} case(s) in other formats: {shortlist(without)}",
                    remedy="Predict these apart, or choose other formats",
                )
        if not continue_:
            require_new([p for case in cases for p in self._files(case.id)], inputs=(), overwrite=overwrite)

    def write(self, written: Sequence[Path], kept: Sequence[Path], labels: LabelSet) -> None:
        """Write the formats of label maps, but those that kept ones have already.

        Raises:
            UsageError: files of newly predicted label maps would be replaced.
            DatasetError: files that were not written; names each and the reason.
        """
        if not self._options.formats:
            return
        maps = {path.name.removesuffix(image_ending(path) or ""): path for path in (*written, *kept)}
        new = {path.name for path in written}
        for format in self._options.formats:
            wanted = {
                id: path
                for id, path in maps.items()
                if path.name in new or not is_taken(exchange_path(self._out, id, format))
            }
            if wanted:
                convert_labels(wanted, self._out, replace(self._options, formats=(format,)), labels=labels)

    def _files(self, id: str) -> list[Path]:
        return [exchange_path(self._out, id, format) for format in self._options.formats]


def _is_dicom(image: Path) -> bool:
    return image.is_dir() or is_dicom_file(image)


def require_formats(formats: Sequence[str]) -> None:
    """Check names of formats.

    Raises:
        UsageError: none, an unknown one, or one twice.
    """
    unknown = [format for format in formats if format not in ENDINGS]
    if not formats or unknown or len(set(formats)) < len(formats):
        raise UsageError(
            "These are not formats of label maps", expected=f"any of {' '.join(ENDINGS)}", found=" ".join(formats)
        )


def require_new(paths: Sequence[Path], *, inputs: Sequence[Path], overwrite: bool) -> None:
    """Check that no file is there yet, or that it may be replaced and is not an input.

    Raises:
        UsageError: names those that are there.
    """
    there = [path for path in paths if is_taken(path)]
    read = {path.resolve() for path in inputs}
    if over := [path for path in there if path.resolve() in read]:
        raise UsageError(
            "This would overwrite an input",
            where=shortlist(over),
            remedy=f"Choose another place with {option('out', flag='-o')}",
        )
    if there and not overwrite:
        raise UsageError(
            f"{len(there)} file(s) would be replaced",
            where=shortlist(there),
            remedy=f"Choose another place with {option('out', flag='-o')}, or replace them with "
            f"{option('overwrite', True)}",
        )


class _Sources:
    """Reads a label map with all that is known of it."""

    def __init__(self, folder: Path, options: FormatOptions, labels: LabelSet | None, *, single: bool) -> None:
        beside = [folder / DATASET, folder / PREDICTIONS, folder.parent / DATASET]
        tables = [] if labels is not None else read_tables(beside, known=[])
        self._labels = labels if labels is not None else tables[0].labels if tables else None
        self._codes = code_table(options.codes)
        self._series, self._single, self._needs = options.series, single, needs_series(options.formats)
        self._predicted = _predicted(folder / PREDICTIONS)
        if isinstance(self._series, Path):
            require_folder(self._series, "folder of the DICOM series")

    def __call__(self, id: str, path: Path) -> LabelSource:
        volume, header = read_label(path)
        values = tuple(int(value) for value in np.unique(volume.array))
        return LabelSource(
            labels_zyx=volume.array[0],
            header=header,
            segments=segments_of(self._labels, values, self._codes),
            series=self._series_of(id) if self._needs else None,
            automatic=path.name in self._predicted,
        )

    def _series_of(self, id: str) -> Path:
        if isinstance(self._series, Mapping) and id in self._series:
            return self._series[id]
        if not isinstance(self._series, Path):
            raise UsageError(
                NO_SERIES,
                remedy=f"Name its folder, or the folder of all series, with {option('series')}",
            )
        below = next((p for name in (id, f"{id}_0000") if is_dicom_folder(p := self._series / name)), None)
        if below is not None:
            return below
        if self._single and is_dicom_folder(self._series):
            return self._series
        raise UsageError(
            "The DICOM series of this label map is not there",
            where=self._series,
            expected=f"a folder {id} of DICOM files",
            remedy=f"Name the folder of all series with {option('series')}, each in a folder named after its map",
        )


def _found(maps: Path) -> tuple[dict[str, Path], list[str]]:
    faults: list[str] = []
    if maps.is_dir():
        files = label_files_in(maps, faults)
    else:
        ending = image_ending(maps)
        files = {maps.name.removesuffix(ending): maps} if ending and maps.exists() else {}
    if not files:
        raise UsageError("There are no label maps", where=maps, expected="a label map, or a folder of them")
    return files, faults


def _predicted(file: Path) -> set[str]:
    try:
        return {case.file for case in read_record(file, PredictionsRecord).cases.values()} if file.is_file() else set()
    except RecordError:
        return set()


def _all(faults: Sequence[str], outcome: str) -> DatasetError:
    return DatasetError(
        f"{len(faults)} fault(s); {outcome}",
        found="\n  ".join(["", *faults, ""]).rstrip(" "),
        remedy="Correct these files, or convert the others alone",
    )
