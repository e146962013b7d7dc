"""Result of predicting one volume: labels on the image's grid, with volumes, conversions and saving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name

from rfmedsam2.arguments import path_of
from rfmedsam2.geometry import Grid
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.formats.image_header import ImageHeader, repaired
from rfmedsam2.store.formats.nifti import label_header
from rfmedsam2.store.images import write_label
from rfmedsam2.volume import Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The result for one volume, for every type of input image.

    Attributes:
        labels: (Z, Y, X) uint8, or uint16 if a value exceeds 255, in the axes of the image.
        grid: the image's grid.
        classes: names of the label values.
        seconds: seconds by part: prepare, network, export.
        probabilities: (K, Z, Y, X) float16 if they were requested in memory, else None. K: background and classes
            in the order of their values (softmax), or the regions in declared order (sigmoid).
        header: header of the image file, from which `save` restores the exact geometry; None for other inputs.
    """

    labels: np.ndarray
    grid: Grid
    classes: LabelSet
    seconds: dict[str, float]
    probabilities: np.ndarray | None = None
    header: ImageHeader | None = None

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Volume of every foreground class (or region) in milliliters, by name; computed on first access."""
        counts = np.zeros(int(np.iinfo(self.labels.dtype).max) + 1, np.int64)
        for plane in self.labels:
            counts += np.bincount(plane.ravel(), minlength=len(counts))
        voxel_ml = abs(float(np.linalg.det(self.grid.affine_lps[:3, :3]))) / 1000
        return {name: int(counts[list(values)].sum()) * voxel_ml for name, values in self.classes.foreground.items()}

    def to_volume(self) -> Volume:
        """The labels as a volume of one channel."""
        return Volume(array=self.labels[None], grid=self.grid)

    def to_nibabel(self) -> nib.Nifti1Image:
        """The labels as a NIfTI image (x, y, z) with the image's affine and, for a NIfTI file, its header's codes."""
        if self.header is None or self.header.nifti is None:
            return self.to_volume().to_nibabel()
        raw = label_header(self.header, self.labels)
        voxels = self.labels[0].T if self.header.flat else self.labels.T
        return nib.Nifti1Image(voxels, raw.get_best_affine(), raw, dtype=self.labels.dtype)

    def to_sitk(self) -> sitk.Image:
        """The labels as a SimpleITK image with the image's geometry."""
        return self.to_volume().to_sitk()

    def save(self, path: str | Path) -> None:
        """Write the labels atomically; the ending selects the format.

        Raises:
            UsageError: the ending is not that of a writable format.
            StoreError: the folder cannot be written, the disk is full.
        """
        header = self.header
        if header is None:
            straight, skew = repaired(self.grid, where=path)
            header = ImageHeader(
                grid=straight,
                source_grid=self.grid,
                channels=1,
                dtype=self.labels.dtype.name,
                format="nifti",
                skew_degrees=skew,
            )
        write_label(path_of(path, "path"), self.labels, header)
