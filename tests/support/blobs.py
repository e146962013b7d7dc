"""A dataset that a small network learns in seconds, in nnU-Net's raw layout."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

NAME = "Dataset001_Blobs"


def write_blobs(folder: Path, cases: int = 6) -> None:
    """A dataset of bright boxes and balls in noise, anisotropic, in nnU-Net's raw layout."""
    draw = np.random.default_rng(0)
    z, y, x = np.mgrid[:20, :36, :32]
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in range(cases):
        center, corner = draw.uniform([5, 8, 8], [14, 16, 24]), draw.integers([3, 20, 4], [10, 26, 20])
        label = (((z - center[0]) * 2) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 < 45).astype(np.uint8)
        low, high = corner, corner + np.array([6, 8, 9])
        label[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 2
        image = draw.normal(100, 20, label.shape) + np.array([0, 90, -70])[label]
        affine = np.diag([1.0, 1.0, 2.0, 1.0])
        nib.save(nib.Nifti1Image(image.T.astype(np.float32), affine), folder / f"imagesTr/blob_{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label.T, affine), folder / f"labelsTr/blob_{case}.nii.gz")
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "ball": 1, "box": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def images_of(root: Path, cases: int = 2) -> list[Path]:
    """The first images of the dataset below root/raw."""
    return [root / "raw" / NAME / "imagesTr" / f"blob_{case}_0000.nii.gz" for case in range(cases)]


def labels_of(path: Path) -> np.ndarray:
    """The values of a label map, z, y, x."""
    return np.asarray(nib.load(path).dataobj).T
