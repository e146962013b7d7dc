"""DICOM series and multi-frame files whose voxels and positions are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    generate_uid,
)

from _harness.inputs import ORIGIN, SHAPE, SPACING, Input, affine_of

RAW = np.random.default_rng(1).integers(0, 3000, SHAPE).astype(np.uint16)
PLAIN = RAW.astype(np.float64) - 1024
TILT = [0.96, 0.28, 0.0, -0.28, 0.96, 0.0]
Edit = Callable[[Dataset, int], None]


def dicom_slice(
    raw: np.ndarray, z: int, series: str, *, slope: Any = 1, intercept: Any = -1024, signed: bool = False
) -> Dataset:
    """One CT slice at 2.5 mm times z."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = (
        series,
        f"{series[:60]}.1",
        f"{series[:60]}.2",
    )
    data.Modality, data.PatientID, data.PatientName, data.InstanceNumber = "CT", "phantom", "phantom", z + 1
    data.Rows, data.Columns = raw.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, int(signed)
    data.PixelSpacing, data.SliceThickness = [SPACING[1], SPACING[2]], SPACING[0]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + SPACING[0] * z]
    if slope is not None:
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
    data.PixelData = raw.astype(np.int16 if signed else np.uint16).tobytes()
    return data


def series(folder: Path) -> Iterator[Input]:
    """Folders with one file for each slice."""

    def written(name: str, values: np.ndarray | None, make: Callable[[int, str], Dataset], **options: Any) -> Input:
        place = folder / name.replace(" ", "_")
        write_series(place, make, **options)
        affine = affine_of()
        return Input(
            name=f"dicom/{name}",
            path=place,
            array=None if values is None else values[None],
            affine_lps=affine,
            spacing_zyx=SPACING,
        )

    def edited(edit: Edit, **fields: Any) -> Callable[[int, str], Dataset]:
        def make(z: int, uid: str) -> Dataset:
            data = dicom_slice(RAW[z], z, uid, **fields)
            edit(data, z)
            return data

        return make

    def scaled(
        slopes: Sequence[float], intercepts: Sequence[float], kind: str | None = None
    ) -> Callable[[int, str], Dataset]:
        def make(z: int, uid: str) -> Dataset:
            data = dicom_slice(RAW[z], z, uid, slope=slopes[z], intercept=intercepts[z])
            if kind is not None:
                data.Modality = "PT" if kind == PositronEmissionTomographyImageStorage else "MR"
                data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = kind
            return data

        return make

    def each(slopes: Sequence[float], intercepts: Sequence[float]) -> np.ndarray:
        return np.stack([RAW[z] * float(slopes[z]) + intercepts[z] for z in range(len(RAW))])

    yield written("plain", PLAIN, edited(unchanged))
    yield written("names against positions", PLAIN, edited(unchanged), file_name=lambda z: f"{len(RAW) - z}.IMA")
    yield written("without ending", PLAIN, edited(unchanged), file_name=lambda z: f"{z:08X}")
    yield written("implicit VR", PLAIN, edited(lambda data, _: _syntax(data, ImplicitVRLittleEndian)))
    yield written("deflated", PLAIN, edited(lambda data, _: _syntax(data, DeflatedExplicitVRLittleEndian)))
    yield written("RLE", PLAIN, edited(lambda data, _: data.compress(RLELossless, generate_instance_uid=False)))
    yield written("no preamble", PLAIN, edited(unchanged), preamble=False)
    zeros, same = [0] * 5, [-1024] * 5
    for name, slopes, intercepts in (
        ("intercepts differ", [1] * 5, [-1024, -2047, -1024, 0, -1]),
        ("first intercept 0", [1] * 5, [0, *same[1:]]),
        ("whole slopes differ", [1, 30, 2, 40, 3], zeros),
        ("fractional slopes differ", [0.5, 1.25, 2.0, 0.125, 1.0], zeros),
        ("fractional intercept", [1] * 5, [-0.5] * 5),
        ("negative slope", [-1] * 5, [3000] * 5),
    ):
        yield written(name, each(slopes, intercepts), scaled(slopes, intercepts))
    fractions = [0.5, 1.25, 2.0, 0.125, 1.0]
    for kind, name in ((PositronEmissionTomographyImageStorage, "PET"), (MRImageStorage, "MR")):
        yield written(f"{name}, slopes differ", each(fractions, zeros), scaled(fractions, zeros, kind))
    mixed = np.stack([RAW[z] - (1024.0 if z % 2 else 0.0) for z in range(len(RAW))])
    yield written(
        "signedness differs",
        mixed,
        lambda z, uid: dicom_slice(mixed[z].astype(int), z, uid, slope=1, intercept=0, signed=bool(z % 2)),
    )
    yield written("no rescale", RAW.astype(float), edited(unchanged, slope=None))
    yield written("empty rescale", RAW.astype(float), edited(_empty_rescale, slope=None))
    yield written(
        "MONOCHROME1", PLAIN, edited(lambda data, _: setattr(data, "PhotometricInterpretation", "MONOCHROME1"))
    )
    yield written("modality LUT", ((RAW % 256).astype(float) ** 2 // 32), _with_lut)
    yield written("12 bits, others not clear", PLAIN, _twelve_bits)
    yield written(
        "SpacingBetweenSlices contradicts", PLAIN, edited(lambda data, _: setattr(data, "SpacingBetweenSlices", 5.0))
    )
    yield written(
        "spacing rounded", PLAIN, edited(lambda data, z: setattr(data, "PixelSpacing", [0.9 + 1e-4 * z, 0.8]))
    )
    yield written("a slice missing", None, edited(unchanged), without=2)
    yield written(
        "gantry tilted", None, edited(lambda data, z: setattr(data, "ImagePositionPatient", [0, 0.6 * z, 2.5 * z]))
    )
    yield written("a localizer among them", None, edited(_localizer))
    yield written(
        "two series",
        None,
        edited(lambda data, z: setattr(data, "SeriesInstanceUID", f"{data.SeriesInstanceUID[:60]}.{z % 2}")),
    )
    yield written(
        "a position twice", None, edited(lambda data, z: setattr(data, "ImagePositionPatient", [0, 0, 2.5 * (z // 2)]))
    )
    turned = np.array([TILT[:3], TILT[3:], [0, 0, 1.0]]).T
    oblique = written("oblique", PLAIN, edited(lambda data, _: setattr(data, "ImageOrientationPatient", TILT)))
    yield Input(
        name=oblique.name, path=oblique.path, array=PLAIN[None], affine_lps=affine_of(turned), spacing_zyx=SPACING
    )


def write_series(
    place: Path,
    make: Callable[[int, str], Dataset],
    *,
    file_name: Callable[[int], str] = lambda z: f"IM{z:03d}.dcm",
    preamble: bool = True,
    without: int | None = None,
) -> None:
    """Write one file for each slice."""
    place.mkdir()
    uid = generate_uid()
    for z in range(len(RAW)):
        if z == without:
            continue
        data = make(z, uid)
        if preamble:
            data.save_as(place / file_name(z), enforce_file_format=True)
        else:
            del data.file_meta
            pydicom.dcmwrite(
                place / file_name(z), data, implicit_vr=True, little_endian=True, enforce_file_format=False
            )


def unchanged(_data: Dataset, _z: int) -> None:
    """A slice as it is."""


def _syntax(data: Dataset, uid: str) -> None:
    data.file_meta.TransferSyntaxUID = uid


def _empty_rescale(data: Dataset, _z: int) -> None:
    data.RescaleSlope = data.RescaleIntercept = None


def _localizer(data: Dataset, z: int) -> None:
    if z == 0:
        data.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def _with_lut(z: int, uid: str) -> Dataset:
    data = dicom_slice(RAW[z] % 256, z, uid, slope=None)
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [256, 0, 16], "HU"
    table.add_new(0x00283006, "OW", (np.arange(256) ** 2 // 32).astype(np.uint16).tobytes())
    data.ModalityLUTSequence = Items([table])
    return data


def _twelve_bits(z: int, uid: str) -> Dataset:
    data = dicom_slice(RAW[z] | 0xF000, z, uid)
    data.BitsStored, data.HighBit = 12, 11
    return data


def single_files(folder: Path) -> Iterator[Input]:
    """Multi-frame files, and a single slice."""
    order, zeros = list(range(len(RAW))), [0.0] * len(RAW)
    for name, slopes, intercepts, frames in (
        ("shared transform", None, None, order),
        ("frames shuffled", None, None, [3, 0, 1, 4, 2]),
        ("slopes differ", [1, 30, 2, 40, 3], zeros, order),
        ("intercepts differ", [1] * 5, [-1024, -2047, -1024, 0, -1], order),
        ("fractional slopes differ", [0.5, 1.25, 2.0, 0.125, 1.0], zeros, order),
    ):
        data = _enhanced(slopes, intercepts, frames)
        path = folder / f"{name.replace(' ', '_')}.dcm"
        data.save_as(path, enforce_file_format=True)
        values = PLAIN
        if slopes is not None and intercepts is not None:
            values = np.stack([RAW[z] * float(slopes[z]) + intercepts[z] for z in order])
        yield Input(
            name=f"dicom/enhanced, {name}", path=path, array=values[None], affine_lps=affine_of(), spacing_zyx=SPACING
        )
    one = dicom_slice(RAW[0], 0, generate_uid())
    one.save_as(folder / "one.dcm", enforce_file_format=True)
    yield Input(
        name="dicom/one slice",
        path=folder / "one.dcm",
        array=PLAIN[None, :1],
        affine_lps=affine_of(),
        spacing_zyx=SPACING,
    )
    flat = _enhanced(None, None, order)
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        delattr(flat, name)
    whole = dicom_slice(RAW[0], 0, generate_uid())
    whole.NumberOfFrames, whole.SpacingBetweenSlices = len(RAW), SPACING[0]
    whole.PixelData = RAW.tobytes()
    whole.save_as(folder / "no_groups.dcm", enforce_file_format=True)
    yield Input(
        name="dicom/multi-frame without groups",
        path=folder / "no_groups.dcm",
        array=PLAIN[None],
        affine_lps=affine_of(),
        spacing_zyx=SPACING,
    )
    bare = dicom_slice(RAW[0], 0, generate_uid())
    del bare.ImagePositionPatient, bare.ImageOrientationPatient
    bare.save_as(folder / "no_position.dcm", enforce_file_format=True)
    yield Input(name="dicom/secondary capture without position", path=folder / "no_position.dcm", array=None)
    big = dicom_slice(RAW[0], 0, generate_uid())
    big.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    big.PixelData = RAW[0].astype(">u2").tobytes()
    big.save_as(folder / "big.dcm", enforce_file_format=True, little_endian=False, implicit_vr=False)
    yield Input(
        name="dicom/big-endian",
        path=folder / "big.dcm",
        array=PLAIN[None, :1],
        affine_lps=affine_of(),
        spacing_zyx=SPACING,
    )


def _enhanced(slopes: Sequence[float] | None, intercepts: Sequence[float] | None, frames: Sequence[int]) -> Dataset:
    data = dicom_slice(RAW[0], 0, generate_uid(), slope=None)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    data.NumberOfFrames, data.PixelData = len(frames), b"".join(RAW[z].tobytes() for z in frames)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(data, name)
    shared = Dataset()
    shared.PixelMeasuresSequence = Items([_dataset(PixelSpacing=[SPACING[1], SPACING[2]], SliceThickness=SPACING[0])])
    shared.PlaneOrientationSequence = Items([_dataset(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])])
    if slopes is None or intercepts is None:
        shared.PixelValueTransformationSequence = _transform(1, -1024)
    data.SharedFunctionalGroupsSequence = Items([shared])
    groups = []
    for z in frames:
        group = Dataset()
        place = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + SPACING[0] * z]
        group.PlanePositionSequence = Items([_dataset(ImagePositionPatient=place)])
        if slopes is not None and intercepts is not None:
            group.PixelValueTransformationSequence = _transform(slopes[z], intercepts[z])
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence = Items(groups)
    return data


def _transform(slope: float, intercept: float) -> Items:
    return Items([_dataset(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")])


def _dataset(**fields: Any) -> Dataset:
    data = Dataset()
    for name, value in fields.items():
        setattr(data, name, value)
    return data
