"""The dataset fingerprint: what planning needs to know about the data, nothing else."""

from __future__ import annotations

from typing import Literal

from rfmedsam2.records.base import Record, VersionedRecord


class CaseFingerprint(Record):
    """One training case. Axes z, y, x of the file as read."""

    id: str
    shape_zyx: tuple[int, int, int]
    shape_after_crop_zyx: tuple[int, int, int]
    spacing_zyx_mm: tuple[float, float, float]
    voxels_by_label: dict[int, int]
    """Label value -> number of voxels, background and absent labels left out."""

    @property
    def relative_size_after_crop(self) -> float:
        """Voxels that remain after the crop to non-zero, as a share of all."""
        z, y, x = self.shape_zyx
        a, b, c = self.shape_after_crop_zyx
        return (a * b * c) / (z * y * x)


class IntensityStatistics(Record):
    """Foreground intensities of one channel over the training set, every case weighted equally (as nnU-Net samples)."""

    mean: float
    median: float
    std: float
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


class Fingerprint(VersionedRecord):
    """What `rfmed_plan_and_preprocess` found out about a dataset."""

    format: Literal[1] = 1
    dataset: str
    """Folder name, for instance Dataset004_Hippocampus."""
    digest: str
    """SHA-256 over dataset.json and every file's name, size and modification time: stale fingerprints are noticed."""
    cases: tuple[CaseFingerprint, ...]
    intensities: tuple[IntensityStatistics, ...]
    """One per channel."""
    median_relative_size_after_crop: float
