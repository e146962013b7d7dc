"""The dataset fingerprint: shapes, spacings and intensity statistics that planning needs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.records.case import SourceFile


class CaseFingerprint(Record):
    """One training case. Axes z, y, x of the file as read."""

    id: str
    shape_zyx: tuple[int, int, int]
    shape_after_crop_zyx: tuple[int, int, int]
    spacing_zyx_mm: tuple[float, float, float]
    voxels_by_label: dict[int, int]
    """Label value -> number of voxels, without background and absent labels."""
    files: dict[str, SourceFile] | None = None
    """Name -> file that was read; None in fingerprints of version 0.1."""

    @property
    def relative_size_after_crop(self) -> float:
        """Fraction of voxels that remain after the crop to non-zero."""
        z, y, x = self.shape_zyx
        a, b, c = self.shape_after_crop_zyx
        return (a * b * c) / (z * y * x)


class IntensityStatistics(Record):
    """Foreground intensities of one channel over the training set; every case has equal weight (as in nnU-Net)."""

    mean: float
    median: float
    std: float
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


class Fingerprint(VersionedRecord):
    """Fingerprint of a dataset, computed by `rfmed_plan_and_preprocess`."""

    format: Literal[1] = 1
    dataset: str
    """Folder name, for instance Dataset004_Hippocampus."""
    digest: str
    """SHA-256 of dataset.json and of all files' names and contents, to detect stale fingerprints.

    In version 0.1 of names, sizes and modification times.
    """
    cases: tuple[CaseFingerprint, ...]
    intensities: tuple[IntensityStatistics, ...]
    """One per channel."""
    median_relative_size_after_crop: float
    left_out: dict[str, str] = Field(default_factory=dict)
    """Training case -> errors for which it was left out (`--skip-faulty`)."""
    skip_unlabeled: bool = False
    """Whether voxels of the ignore label are left out of `intensities`; nnU-Net counts them as foreground."""
