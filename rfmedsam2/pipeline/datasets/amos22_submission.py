"""AMOS22 submissions: strict checks of the predictions, then a reproducible zip file.

AMOS22 (amos22.grand-challenge.org): one zip with `results/amos_0001.nii.gz ...`, one file per image with its name. What
the pages leave open (dtype, header) is interpreted strictly: uint8, and exactly the image's geometry.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from rfmedsam2.errors import RfMedSamError, SubmissionError, UsageError
from rfmedsam2.pipeline.datasets.amos22 import modality_of, number_of
from rfmedsam2.pipeline.datasets.conversion import ENDING, listed
from rfmedsam2.pipeline.datasets.label_tables import AMOS22_LABELS
from rfmedsam2.store.formats.image_header import ImageHeader
from rfmedsam2.store.images import read_header, read_image, write_label
from rfmedsam2.system.atomic import atomic
from rfmedsam2.system.ordinary_files import file_sha256, require_folder
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent

# zip's earliest date, so that the same predictions give the same bytes
_DATE = (1980, 1, 1, 0, 0, 0)
_HIGHEST_LABEL = max(AMOS22_LABELS.values())
_AFFINE_TOLERANCE_MM = 1e-4
FaultKind = Literal["missing", "extra", "unreadable", "geometry", "dtype", "labels", "scaling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionFault:
    """One reason for which the challenge could reject: case, file name, kind, and message."""

    case: str
    file: str
    kind: FaultKind
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionReport:
    """Result of checking and writing a submission.

    Attributes:
        task: 1 (CT), 2 (CT and MR), or None: all images in the folder.
        expected: ids that a submission must have, sorted.
        faults: all faults; empty for a valid submission.
        rewritten: ids that are converted to uint8 in the archive, because their file has another integer dtype.
        ignored: names in the predictions' folder that are not NIfTI files and are left out of the archive.
        archive: the zip file, None if nothing was written.
        sha256: digest of the zip file.
    """

    task: int | None
    expected: tuple[str, ...]
    faults: tuple[SubmissionFault, ...]
    rewritten: tuple[str, ...]
    ignored: tuple[str, ...]
    archive: Path | None = None
    sha256: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "archive": None if self.archive is None else str(self.archive)}


class RefusedSubmissionError(SubmissionError):
    """A submission with faults, which `report` contains and the message lists."""

    def __init__(self, report: SubmissionReport, *, where: Path) -> None:
        lines = [f"{fault.file}: {fault.message}" for fault in report.faults]
        super().__init__(
            f"The predictions have {len(lines)} fault(s) for which AMOS22 would reject them",
            where=where,
            found="\n  " + "\n  ".join(lines),
            remedy="Nothing was written. Predict these cases again, then run the same command",
        )
        self.report = report
        self.faults = report.faults


def submit_amos22(
    predictions: Path,
    images: Path,
    archive: Path,
    *,
    task: Literal[1, 2] | None = None,
    workers: int = 2,
    track: Track = silent,
) -> SubmissionReport:
    """Check predictions against their images, then write the zip file for AMOS22.

    Args:
        predictions: folder of label maps `amos_0001.nii.gz`.
        images: folder of the images, with or without `_0000`.
        archive: the zip file to write; the same predictions give the same bytes.
        task: 1 expects only the CT images, 2 or None all images in the folder.
        workers: number of files read in parallel.
        track: progress display.

    Raises:
        RefusedSubmissionError: there are faults; lists all of them, and nothing was written.
        UsageError: a folder does not exist or holds no images, or the archive's name does not end in .zip.
        StoreError: the archive cannot be written or the disk is full.
    """
    if archive.suffix != ".zip":
        raise UsageError("The archive is not a zip file", where=archive, expected="a name ending in .zip")
    report = check_amos22(predictions, images, task=task, workers=workers, track=track)
    if report.faults:
        raise RefusedSubmissionError(report, where=predictions)
    with atomic(archive) as temporary:
        _write_zip(temporary, _members(predictions, report, track))
        digest = file_sha256(temporary)
    return SubmissionReport(**{**_fields(report), "archive": archive, "sha256": digest})


def require_submission(path: Path) -> None:
    """Check that a file is an archive made by `submit_amos22`.

    Raises:
        SubmissionError: it is anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        names = []
    if not names or not all(name.startswith("results/") for name in names):
        raise SubmissionError("The file is not a submission", where=path)


def check_amos22(
    predictions: Path, images: Path, *, task: Literal[1, 2] | None = None, workers: int = 2, track: Track = silent
) -> SubmissionReport:
    """Check predictions against their images without writing; see `submit_amos22` for arguments and errors."""
    require_folder(predictions, "folder of predictions")
    require_folder(images, "folder of images")
    image_of = _expected(images, task)
    found = listed(predictions)
    both = sorted(set(image_of) & set(found))
    checked = map_cases(
        lambda case: _check(case, found[case], image_of[case]),
        both,
        workers=workers,
        name=str,
        track=track,
        description="Checking",
    )
    results = dict(zip(both, checked, strict=True))
    faults = [
        *(_missing(case) for case in sorted(set(image_of) - set(found))),
        *(_extra(case, found[case], task) for case in sorted(set(found) - set(image_of))),
        *(fault for faults, _ in results.values() for fault in faults),
    ]
    return SubmissionReport(
        task=task,
        expected=tuple(sorted(image_of)),
        faults=tuple(sorted(faults, key=lambda fault: (fault.case, fault.kind))),
        rewritten=tuple(case for case, (_, rewrite) in results.items() if rewrite),
        ignored=tuple(sorted({p.name for p in predictions.iterdir()} - {p.name for p in found.values()})),
    )


def _expected(images: Path, task: int | None) -> dict[str, Path]:
    """Case id -> image, by names with or without _0000."""
    found = {name.removesuffix("_0000"): path for name, path in listed(images).items()}
    expected = {case: path for case, path in found.items() if task != 1 or _is_ct(case)}
    if not expected:
        raise UsageError(
            "The folder holds no images",
            where=images,
            expected=f"files like amos_0002_0000{ENDING}" + (" of CT cases" if task == 1 else ""),
            found=f"{len(found)} NIfTI files",
        )
    return expected


def _is_ct(case: str) -> bool:
    # images with other names are expected in both tasks
    number = number_of(case)
    return number is None or modality_of(number) == "CT"


def _missing(case: str) -> SubmissionFault:
    return SubmissionFault(case=case, file=f"{case}{ENDING}", kind="missing", message="this image has no prediction")


def _extra(case: str, path: Path, task: int | None) -> SubmissionFault:
    if task == 1 and not _is_ct(case):
        message = "an MR case does not belong to task 1"
    elif case.endswith("_0000"):
        message = "predictions are named without _0000"
    else:
        message = "no image has this name"
    return SubmissionFault(case=case, file=path.name, kind="extra", message=message)


def _check(case: str, prediction: Path, image: Path) -> tuple[list[SubmissionFault], bool]:
    """All faults of one file, and whether it must be converted to uint8."""
    faults: list[SubmissionFault] = []

    def fault(kind: FaultKind, message: str) -> None:
        faults.append(SubmissionFault(case=case, file=prediction.name, kind=kind, message=message))

    try:
        image_header = read_header(image)
    except RfMedSamError as error:
        fault("unreadable", f"its image cannot be read: {error}")
        return faults, False
    try:
        volume, header = read_image(prediction)
    except RfMedSamError as error:
        fault("unreadable", str(error))
        return faults, False
    raw, image_raw = _raw(header), _raw(image_header)
    for difference in _differences(header, raw, image_header, image_raw):
        fault("geometry", difference)
    scaling = (float(raw["scl_slope"]), float(raw["scl_inter"]))
    if not _unscaled(*scaling):
        fault("scaling", f"slope and intercept are {scaling[0]:g} and {scaling[1]:g}, expected none (1 and 0)")
        return faults, False
    stored = raw.get_data_dtype()
    if stored.kind not in "iu":
        fault("dtype", f"voxels are {stored.name}, expected an integer type")
        return faults, False
    low, high = int(volume.array.min()), int(volume.array.max())
    if low < 0 or high > _HIGHEST_LABEL:
        fault("labels", f"labels run from {low} to {high}, allowed is 0 to {_HIGHEST_LABEL}")
    return faults, stored != np.uint8


def _differences(
    header: ImageHeader, raw: Nifti1Header, image_header: ImageHeader, image_raw: Nifti1Header
) -> Iterator[str]:
    """All differences between the geometry of a prediction and its image."""
    if header.channels != 1:
        yield f"it has {header.channels} channels, expected one"
    if header.grid.shape_zyx != image_header.grid.shape_zyx:
        found, expected = header.grid.shape_zyx[::-1], image_header.grid.shape_zyx[::-1]
        yield f"shape {found} against the image's {expected} (x, y, z)"
    away = np.abs(np.subtract(_affine(raw), _affine(image_raw))).max()
    if not away <= _AFFINE_TOLERANCE_MM:
        yield f"the affine differs from the image's by up to {away:.4g}"
    if not np.allclose(raw["pixdim"][1:4], image_raw["pixdim"][1:4], atol=_AFFINE_TOLERANCE_MM, rtol=0):
        yield f"spacing {raw['pixdim'][1:4].tolist()} against the image's {image_raw['pixdim'][1:4].tolist()} mm"
    for form in ("qform_code", "sform_code"):
        if int(raw[form]) != int(image_raw[form]):
            yield f"{form} is {int(raw[form])}, the image's is {int(image_raw[form])}"


def _raw(header: ImageHeader) -> Nifti1Header:
    # `listed` accepts only NIfTI names, and the reader returns the header block of every NIfTI file
    block = b"" if header.nifti is None else header.nifti.block
    kind = Nifti1Header if len(block) == 348 else Nifti2Header
    return kind(binaryblock=block, endianness="<", check=False)


def _affine(raw: Nifti1Header) -> np.ndarray:
    return np.asarray(raw.get_best_affine(), dtype=float)


def _unscaled(slope: float, intercept: float) -> bool:
    # NIfTI: a slope of 0 or NaN means that scaling is not used
    return slope == 0 or not np.isfinite(slope) or (slope == 1 and (intercept == 0 or not np.isfinite(intercept)))


def _members(predictions: Path, report: SubmissionReport, track: Track) -> Iterator[tuple[str, bytes]]:
    for case in track(report.expected, "Packing", len(report.expected)):
        path = predictions / f"{case}{ENDING}"
        yield f"results/{path.name}", _as_uint8(path) if case in report.rewritten else path.read_bytes()


def _as_uint8(path: Path) -> bytes:
    """Write the file again with uint8 voxels and the same geometry."""
    volume, header = read_image(path)
    with tempfile.TemporaryDirectory(prefix="rfmed-") as folder:
        copy = Path(folder) / path.name
        write_label(copy, volume.array[0], header)
        return copy.read_bytes()


def _write_zip(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_STORED, strict_timestamps=True) as target:
        for name, data in members:
            member = zipfile.ZipInfo(name, date_time=_DATE)
            # the same on every system: created on Unix, rw-r--r--
            member.create_system = 3
            member.external_attr = 0o100644 << 16
            target.writestr(member, data)


def _fields(report: SubmissionReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in ("task", "expected", "faults", "rewritten", "ignored")}
