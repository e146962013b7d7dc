"""Computing the dataset fingerprint: sizes, spacings and foreground intensities of the training cases.

nnU-Net draws the same number of foreground voxels from every case, with replacement, and takes mean, standard deviation
and percentiles of the pool. Here the limit for infinitely many draws is computed: the mixture of the cases' own
distributions, each with the same weight. Moments are exact. Percentiles are exact for images with fewer than 65 536
integer gray values (histograms) and for up to `MIN_POINTS` foreground voxels per case; beyond that, a case is
represented by at least as many evenly spaced quantiles, so the rank of a percentile is off by at most 1/8192. Without
histograms, memory is bounded by `POINTS` values over all cases.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.errors import DatasetError, ImageError, RecordError, UsageError
from rfmedsam2.pipeline.preprocessing.case_reader import CaseReader, DecodedCase, FaultyCaseError, files_digest
from rfmedsam2.records.case import SourceFile
from rfmedsam2.records.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from rfmedsam2.records.verify import REMEDY, Fault, require_no_errors, summaries
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.images import image_files
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.lock import exclusive_lock
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.atomic import read_record, write_record
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.transforms.crop import nonzero_box

logger = logging.getLogger(__name__)
POINTS = 1 << 23
MIN_POINTS = 1 << 12
MAX_POINTS = 1 << 16
WRITING_SECONDS = 60.0
"""How long to wait for another run that writes what belongs to the whole dataset, which takes it no second."""


def fingerprint(
    dataset: RawDataset | CaseReader,
    layout: Layout,
    *,
    workers: int = 2,
    clean: bool = False,
    skip_faulty: bool = False,
    skip_unlabeled: bool = False,
    track: Track = silent,
) -> Fingerprint:
    """Compute the fingerprint of a dataset's training cases, or load the one on disk if no file has changed since.

    Every file is read once, and all checks of verification are made; what they warn of is logged.

    Args:
        dataset: a dataset, or a reader whose cache the next step will use.
        layout: the folder layout, which determines where the fingerprint is written.
        workers: number of cases processed in parallel.
        clean: always compute a new fingerprint.
        skip_faulty: go on without cases with errors, which the fingerprint then names; a reader leaves them out, too.
        skip_unlabeled: leave voxels of the ignore label out of the intensities; nnU-Net counts them as foreground.
        track: progress display.

    Raises:
        DatasetError: no cases, no foreground, or cases with errors; lists all errors of all cases.
        UsageError: `skip_unlabeled` for a dataset without an ignore label.
    """
    source = dataset if isinstance(dataset, CaseReader) else CaseReader(dataset)
    raw = source.dataset
    if not raw.training:
        raise DatasetError("The dataset has no training cases", where=raw.folder)
    if skip_unlabeled and raw.json.label_set.ignore is None:
        raise UsageError(
            "The dataset declares no ignore label, so no voxel is unlabeled",
            where=raw.folder / "dataset.json",
            remedy=f"Leave {option('skip_unlabeled')} out",
        )
    left_out = _left_out(source, source.layout_faults(), skip=skip_faulty)
    _warn_of(raw.faults)
    path = layout.fingerprint_file(raw.name)
    if not clean:
        try:
            found = read_record(path, Fingerprint)
        except RecordError:
            found = None
        same = found is not None and (found.dataset, found.skip_unlabeled) == (raw.name, skip_unlabeled)
        if found is not None and same and _is_current(found, source):
            return found
    sizes, intensities, faults = _fingerprint_cases(source, workers, track, skip_unlabeled=skip_unlabeled)
    left_out |= _left_out(source, [fault for fault in faults if fault.severity == "error"], skip=skip_faulty)
    _warn_of(faults)
    raw = source.dataset
    result = Fingerprint(
        dataset=raw.name,
        digest=dataset_digest(raw, {case.id: case.files or {} for case in sizes}),
        cases=sizes,
        intensities=tuple(mixture_statistics(channel, where=raw.name) for channel in zip(*intensities, strict=True)),
        median_relative_size_after_crop=float(np.median([case.relative_size_after_crop for case in sizes])),
        left_out=left_out,
        skip_unlabeled=skip_unlabeled,
    )
    with exclusive_lock(path.parent, wait_seconds=WRITING_SECONDS):
        write_record(path, result)
    return result


def _warn_of(faults: Sequence[Fault]) -> None:
    for text in summaries(faults):
        logger.warning("%s", text)


def _left_out(source: CaseReader, faults: Sequence[Fault], *, skip: bool) -> dict[str, str]:
    """Leave out cases with errors; returns id -> errors.

    Raises:
        DatasetError: there are errors that may not be skipped, or no case is left.
    """
    if not skip or any(not fault.case for fault in faults):
        require_no_errors(
            faults,
            where=source.dataset.folder,
            remedy=f"{REMEDY}; or go on without them: {option('skip_faulty', True)}",
        )
    found: dict[str, str] = {}
    for fault in faults:
        found[fault.case] = f"{found[fault.case]}; {fault.message}" if fault.case in found else fault.message
    source.leave_out(found)
    if not source.dataset.training:
        require_no_errors(faults, where=source.dataset.folder)
    return found


def dataset_digest(dataset: RawDataset, files: Mapping[str, Mapping[str, SourceFile]]) -> str:
    """SHA-256 of dataset.json and of name and contents of every training file.

    Args:
        dataset: the dataset.
        files: case id -> name -> file (`CaseReader.files`).
    """
    digest = hashlib.sha256(dataset.json.to_json().encode())
    for case in dataset.training:
        contents = [(name, file.size, file.sha256) for name, file in files[case.id].items()]
        digest.update(f"{case.id}\0{contents}\n".encode())
    return digest.hexdigest()


def _is_current(found: Fingerprint, source: CaseReader) -> bool:
    """Whether dataset.json and all files are those of the fingerprint; only files with a new time are read."""
    raw = source.dataset
    if found.left_out:
        return False  # they may have been corrected
    known = {case.id: case.files for case in found.cases if case.files is not None}
    if known.keys() != {case.id for case in raw.training}:
        return found.digest == _digest_by_times(raw)
    try:
        files = {case.id: source.files(case, known[case.id]) for case in raw.training}
    except ImageError:
        return False  # reading the cases says what they lack
    return found.digest == dataset_digest(raw, files)


def same_images(dataset: RawDataset, cases: Sequence[CaseFingerprint]) -> list[tuple[str, ...]]:
    """Ids of training cases whose image files have the same contents, two or more each: one scan under two names."""
    images = {case.id: case.images for case in dataset.training}
    ids: dict[tuple[str, ...], list[str]] = {}
    for case in cases:
        count = sum(not file.is_dir() for path in images[case.id] for file in image_files(path))
        files = list((case.files or {}).values())[:count]  # the label's follow
        ids.setdefault(tuple(sorted(file.sha256 for file in files)), []).append(case.id)
    return [tuple(same) for contents, same in ids.items() if contents and len(same) > 1]


def _digest_by_times(dataset: RawDataset) -> str:
    """The digest of version 0.1."""
    digest = hashlib.sha256(dataset.json.to_json().encode())
    for case in dataset.training:
        digest.update(f"{case.id}\0{files_digest(case)}\n".encode())
    return digest.hexdigest()


def _fingerprint_cases(
    source: CaseReader, workers: int, track: Track, *, skip_unlabeled: bool
) -> tuple[tuple[CaseFingerprint, ...], tuple[tuple[Distribution | None, ...], ...], list[Fault]]:
    """Fingerprint and distribution per channel of every training case without errors; warnings, and other's errors."""
    training = source.dataset.training
    ignore = source.dataset.json.label_set.ignore if skip_unlabeled else None
    points = int(np.clip(POINTS // len(training), MIN_POINTS, MAX_POINTS))

    def examine(case: Case) -> tuple[CaseFingerprint | None, tuple[Distribution | None, ...], tuple[Fault, ...]]:
        try:
            decoded = source.read(case, last=False)
        except FaultyCaseError as error:
            return None, (), error.faults
        found = case_fingerprint(case.id, decoded).model_copy(update={"files": dict(decoded.files)})
        return found, foreground_distributions(decoded, points, ignore=ignore), decoded.warnings

    sizes, intensities, faults = [], [], []
    for found, distributions, warned in map_cases(
        examine, training, workers=workers, name=lambda case: case.id, track=track, description="Fingerprint"
    ):
        faults += warned
        if found is not None:
            sizes.append(found)
            intensities.append(distributions)
    return tuple(sizes), tuple(intensities), faults


def case_fingerprint(name: str, decoded: DecodedCase) -> CaseFingerprint:
    """Shape, spacing, shape after the crop to non-zero, and voxel count of every label."""
    box = nonzero_box(decoded.volume.array)
    a, b, c = (stop - start for start, stop in box)
    grid = decoded.volume.grid
    return CaseFingerprint(
        id=name,
        shape_zyx=grid.shape_zyx,
        shape_after_crop_zyx=(a, b, c),
        spacing_zyx_mm=grid.spacing_zyx_mm,
        voxels_by_label=decoded.voxels_by_label,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Foreground intensities of one channel of one case: ascending values with weights that sum to 1."""

    values: np.ndarray
    shares: np.ndarray
    mean: float
    variance: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, samples: np.ndarray, points: int) -> Distribution:
        """From at least one value; integers are counted exactly, floats are kept or reduced to `points` quantiles."""
        values, counts = _counted(samples, points)
        return cls(
            values=values,
            shares=counts / counts.sum(),
            mean=float(samples.mean(dtype=np.float64)),
            variance=float(samples.var(dtype=np.float64)),
            lowest=float(samples.min()),
            highest=float(samples.max()),
        )


def foreground_distributions(
    decoded: DecodedCase, points: int, *, ignore: int | None = None
) -> tuple[Distribution | None, ...]:
    """One distribution per channel; None without foreground.

    Foreground is any label above 0, with the ignore label, as in nnU-Net; `ignore` leaves voxels of that value out.
    """
    # nnU-Net uses the cropped region; this differs only if there are labels where the image is zero
    region = tuple(slice(*limits) for limits in nonzero_box(decoded.volume.array))
    mask = decoded.label[region] > 0
    if ignore is not None:
        mask &= decoded.label[region] != ignore
    if not mask.any():
        return (None,) * decoded.volume.array.shape[0]
    return tuple(Distribution.of(channel[region][mask], points) for channel in decoded.volume.array)


def mixture_statistics(cases: Sequence[Distribution | None], *, where: object = None) -> IntensityStatistics:
    """Statistics of the mixture in which every case with foreground has the same weight.

    Raises:
        DatasetError: no case has foreground.
    """
    present = [case for case in cases if case is not None]
    if not present:
        raise DatasetError(
            "No training case has foreground", where=where, remedy="Check the label files and dataset.json"
        )
    mean = float(np.mean([case.mean for case in present]))
    variance = float(np.mean([case.variance + (case.mean - mean) ** 2 for case in present]))
    values = np.concatenate([case.values for case in present])
    shares = np.concatenate([case.shares for case in present]) / len(present)
    order = np.argsort(values, kind="stable")
    below = np.cumsum(shares[order])
    # the smallest value that at least this fraction of the mixture does not exceed
    places = np.minimum(np.searchsorted(below, np.array([0.005, 0.5, 0.995]) * below[-1]), len(values) - 1)
    low, median, high = values[order[places]].tolist()
    return IntensityStatistics(
        mean=mean,
        median=float(median),
        std=float(np.sqrt(variance)),
        min=min(case.lowest for case in present),
        max=max(case.highest for case in present),
        percentile_00_5=float(low),
        percentile_99_5=float(high),
    )


def _counted(samples: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending values and their counts."""
    low, high = float(samples.min()), float(samples.max())
    whole = samples.dtype.kind in "iu" or bool(np.all(np.rint(samples) == samples))
    if whole and high - low < MAX_POINTS:
        counts = np.bincount(samples.astype(np.int64) - int(low))
        values = np.flatnonzero(counts)
        return (values + int(low)).astype(np.float32), counts[values].astype(np.float64)
    ordered = np.sort(samples).astype(np.float32, copy=False)
    if ordered.size > points:
        ordered = ordered[((np.arange(points) + 0.5) * (ordered.size / points)).astype(np.int64)]
    return ordered, np.ones(ordered.size)
