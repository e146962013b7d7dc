"""DICOM slices of known values, with whatever a scanner may write into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

STORED = np.random.default_rng(1).integers(0, 3000, (4, 9, 7)).astype(np.uint16)
"""Values (z, y, x) of the series; an odd number of pixels per slice."""


def item(**elements: Any) -> Dataset:
    """A dataset with these elements."""
    data = Dataset()
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    return data


def ct_slice(z: int = 0, *, stored: np.ndarray | None = None, syntax: str = ExplicitVRLittleEndian, **elements: Any):
    """Slice z at 30 + 2.5 z mm, stored values `STORED[z]` unless given; elements set to None are left out."""
    values = STORED[z] if stored is None else stored
    bits = 8 * values.dtype.itemsize
    data = item(
        SOPClassUID=CTImageStorage,
        SOPInstanceUID=generate_uid(),
        Modality="CT",
        SeriesInstanceUID="1.2.3",
        SeriesDescription="abdomen",
        InstanceNumber=z + 1,
        Rows=values.shape[-2],
        Columns=values.shape[-1],
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=bits,
        BitsStored=bits,
        HighBit=bits - 1,
        PixelRepresentation=int(values.dtype.kind == "i"),
        PixelSpacing=[0.8, 0.7],
        SliceThickness=2.5,
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        ImagePositionPatient=[-10, -20, 30 + 2.5 * z],
        RescaleSlope=1,
        RescaleIntercept=-1024,
        PixelData=values.tobytes() + bytes(values.nbytes % 2),
    )
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = UID(syntax)
    for keyword, value in elements.items():
        if value is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    return data


def frames(*, stored: np.ndarray = STORED, **elements: Any) -> Dataset:
    """All slices as the frames of one file, without functional groups."""
    return ct_slice(stored=stored, **{"NumberOfFrames": len(stored), "PixelData": stored.tobytes(), **elements})


def enhanced(transforms: Sequence[tuple[float, float]], order: Sequence[int] | None = None) -> Dataset:
    """All slices as frames with functional groups, each with its own slope and intercept."""
    order = list(range(len(STORED))) if order is None else list(order)
    data = frames(stored=STORED[order])
    for keyword in ("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient"):
        delattr(data, keyword)
    del data.PixelSpacing
    shared = item(
        PixelMeasuresSequence=Items([item(PixelSpacing=[0.8, 0.7], SliceThickness=2.5)]),
        PlaneOrientationSequence=Items([item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
    )
    data.SharedFunctionalGroupsSequence = Items([shared])
    groups = []
    for z in order:
        slope, intercept = transforms[z]
        scale = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
        place = item(ImagePositionPatient=[-10, -20, 30 + 2.5 * z])
        groups.append(item(PlanePositionSequence=Items([place]), PixelValueTransformationSequence=Items([scale])))
    data.PerFrameFunctionalGroupsSequence = Items(groups)
    return data


def save(path: Path, data: Dataset) -> Path:
    """Write one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def save_series(folder: Path, make: Callable[[int], Dataset], count: int = len(STORED)) -> Path:
    """Write `count` slices; names run against the positions."""
    for z in range(count):
        save(folder / f"{99 - z}.dcm", make(z))
    return folder


def whole_series(folder: Path, *, row: Sequence[float] = (0.6, 0.8, 0.0), column: Sequence[float] = (0, 0, -1)) -> Path:
    """A folder with the four slices and all elements of a CT, oblique, names in another order than places."""
    folder.mkdir(parents=True)
    normal = np.cross(row, column)
    study, series, place = generate_uid(), generate_uid(), generate_uid()
    for z in range(len(STORED)):
        position = np.array([-10.0, -20.0, 30.0]) + 2.5 * z * normal
        data = ct_slice(
            z,
            SeriesInstanceUID=series,
            StudyInstanceUID=study,
            FrameOfReferenceUID=place,
            PatientID="p1",
            PatientName="A^B",
            PatientBirthDate="",
            PatientSex="",
            StudyDate="20260101",
            StudyTime="120000",
            AccessionNumber="",
            StudyID="1",
            ReferringPhysicianName="",
            SeriesNumber=1,
            Manufacturer="m",
            PositionReferenceIndicator="",
            ImageOrientationPatient=[*row, *column],
            ImagePositionPatient=[round(float(v), 4) for v in position],
        )
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.save_as(folder / f"{9 - z}.dcm", enforce_file_format=True)
    return folder
