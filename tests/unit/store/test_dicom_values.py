"""DICOM voxels: every slice and frame by its own transform, in a type that holds them all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
)
from support.dicom_series import STORED, ct_slice, enhanced, frames, item, save, save_series

from rfmedsam2.errors import ImageError
from rfmedsam2.store.images import read_header, read_image

TRUE = STORED.astype(np.int64)


def voxels(path: Path) -> np.ndarray:
    """Voxels (Z,Y,X) of a series; header and array agree."""
    volume, header = read_image(path)
    assert read_header(path) == header
    assert header.dtype == volume.array.dtype.name
    assert header.channels == len(volume.array)
    return volume.array[0]


def per_slice(values: list[float]) -> np.ndarray:
    return np.reshape(values, (-1, 1, 1))


TRANSFORMS = {
    "first intercept 0": ([1, 1, 1, 1], [0, -1024, -1024, -1024], "int32"),
    "intercepts differ": ([1, 1, 1, 1], [-1024, -2047, -1024, -2048], "int32"),
    "whole slopes": ([1, 30, 2, 40], [0, 0, 0, 0], "uint32"),
    "first slope whole": ([2, 0.5, 1.25, 3.3], [0, 0, 1, 0], "float32"),
    "negative slope": ([-1, 1, -1, 1], [4095, 0, 4095, 0], "int32"),
    "fraction in the last": ([1, 1, 1, 1], [0, 0, 0, 0.5], "float32"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("sop", ["classic", "MR", "PET", "enhanced"])
def test_every_slice_has_its_own_transform(tmp_path: Path, name: str, sop: str) -> None:
    slopes, intercepts, kind = TRANSFORMS[name]
    if sop == "enhanced":
        save(tmp_path / "s" / "all", enhanced(list(zip(slopes, intercepts, strict=True)), order=[2, 0, 3, 1]))
    else:
        changes = {
            "MR": {"SOPClassUID": MRImageStorage, "Modality": "MR"},
            "PET": {"SOPClassUID": PositronEmissionTomographyImageStorage, "Modality": "PT"},
        }.get(sop, {})
        save_series(
            tmp_path / "s",
            lambda z: ct_slice(z, RescaleSlope=slopes[z], RescaleIntercept=intercepts[z], **changes),
        )
    found = voxels(tmp_path / "s")
    np.testing.assert_array_equal(found, (TRUE * per_slice(slopes) + per_slice(intercepts)).astype(kind))
    assert found.dtype == kind


def test_signed_and_unsigned_slices_in_one_series(tmp_path: Path) -> None:
    def make(z: int):
        stored = STORED[z] if z % 2 else STORED[z].astype(np.int16) - 2000
        return ct_slice(z, stored=stored, RescaleIntercept=0)

    found = voxels(save_series(tmp_path / "s", make))
    np.testing.assert_array_equal(found, TRUE - per_slice([2000, 0, 2000, 0]))


def test_slices_of_8_and_16_bits_in_one_series(tmp_path: Path) -> None:
    def make(z: int):
        return ct_slice(z, stored=(STORED[z] % 256).astype(np.uint8)) if z % 2 else ct_slice(z)

    found = voxels(save_series(tmp_path / "s", make))
    np.testing.assert_array_equal(found[0], TRUE[0] - 1024)
    np.testing.assert_array_equal(found[1], TRUE[1] % 256 - 1024)


def test_slope_times_the_largest_value_does_not_wrap(tmp_path: Path) -> None:
    stored = np.full((9, 7), 65535, np.uint16)
    folder = save_series(tmp_path / "s", lambda z: ct_slice(z, stored=stored, RescaleSlope=40, RescaleIntercept=-7))
    assert np.unique(voxels(folder)).tolist() == [40 * 65535 - 7]
    wide = save_series(tmp_path / "w", lambda z: ct_slice(z, stored=stored.astype(np.uint32) * 65537, RescaleSlope=-3))
    assert np.unique(voxels(wide)).tolist() == [-3 * (2**32 - 1) - 1024]


def test_12_stored_bits_fit_int16_after_rescaling(tmp_path: Path) -> None:
    found = voxels(save_series(tmp_path / "s", lambda z: ct_slice(z, BitsStored=12, HighBit=11)))
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, TRUE - 1024)


def test_bits_that_do_not_belong_to_the_value_are_left_out(tmp_path: Path) -> None:
    make = {
        "overlay above": lambda z: ct_slice(z, stored=STORED[z] | 0xF000, BitsStored=12, HighBit=11),
        "high bit 15": lambda z: ct_slice(z, stored=(STORED[z] << 4) | 5, BitsStored=12, HighBit=15),
        "sign not extended": lambda z: ct_slice(
            z, stored=(STORED[z] - 1500) & 0xFFF, BitsStored=12, HighBit=11, PixelRepresentation=1
        ),
    }
    for name, one in make.items():
        found = voxels(save_series(tmp_path / name, one))
        np.testing.assert_array_equal(found, TRUE - 1024 - (1500 if "sign" in name else 0), err_msg=name)


@pytest.mark.parametrize("missing", ["absent", "empty", "empty slope"])
def test_missing_or_empty_slope_and_intercept_change_nothing(tmp_path: Path, missing: str) -> None:
    def make(z: int):
        data = ct_slice(z)
        if missing == "absent":
            del data.RescaleSlope, data.RescaleIntercept
        else:
            data.add_new("RescaleSlope", "DS", None)
        if missing == "empty":
            data.add_new("RescaleIntercept", "DS", None)
        return data

    found = voxels(save_series(tmp_path / "s", make))
    np.testing.assert_array_equal(found, TRUE - (1024 if missing == "empty slope" else 0))


def test_slope_of_0_is_refused_unless_nothing_is_stored(tmp_path: Path) -> None:
    folder = save_series(tmp_path / "s", lambda z: ct_slice(z, RescaleSlope=0 if z == 1 else 1))
    with pytest.raises(ImageError, match=r"RescaleSlope .* is 0.*98\.dcm.*stored values from"):
        read_image(folder)
    empty = np.zeros((9, 7), np.uint16)
    folder = save_series(tmp_path / "e", lambda z: ct_slice(z, stored=empty, RescaleSlope=0, RescaleIntercept=0))
    assert not voxels(folder).any()


def test_monochrome1_keeps_its_values_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_series(tmp_path / "s", lambda z: ct_slice(z, PhotometricInterpretation="MONOCHROME1"))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(voxels(folder), TRUE - 1024)
    (record,) = caplog.records
    assert "MONOCHROME1" in record.getMessage()


def lut(values: np.ndarray, *, first: int = 0, bits: int = 16, vr: str = "OW", kind: str = "<u2") -> Items:
    table = item(LUTDescriptor=[len(values), first, bits], ModalityLUTType="HU")
    table.add_new("LUTData", vr, values.astype(kind).tobytes() if vr == "OW" else [int(v) for v in values])
    return Items([table])


def test_modality_lookup_table(tmp_path: Path) -> None:
    squares = np.arange(256) ** 2 // 32
    variants = {
        "words": ({}, 0),
        "US": ({"vr": "US"}, 0),
        "12 bits": ({"bits": 12}, 0),
        "first value 100": ({"first": 100}, 100),
    }
    for name, (form, first) in variants.items():
        folder = save_series(
            tmp_path / name,
            lambda z, form=form: ct_slice(
                z, RescaleSlope=None, RescaleIntercept=None, ModalityLUTSequence=lut(squares, **form)
            ),
        )
        expected = squares[np.clip(TRUE - first, 0, 255)]
        np.testing.assert_array_equal(voxels(folder), expected, err_msg=name)


def test_modality_lookup_table_of_bytes_and_signed_values(tmp_path: Path) -> None:
    table = np.arange(255, -1, -1)
    folder = save_series(
        tmp_path / "s",
        lambda z: ct_slice(
            z,
            stored=STORED[z].astype(np.int16) - 1000,
            RescaleSlope=None,
            RescaleIntercept=None,
            ModalityLUTSequence=lut(table, first=-100, bits=8, kind="<u1"),
        ),
    )
    np.testing.assert_array_equal(voxels(folder), table[np.clip(TRUE - 900, 0, 255)])


def test_real_world_values_are_not_applied(tmp_path: Path) -> None:
    mapping = item(RealWorldValueIntercept=5.0, RealWorldValueSlope=3.0)
    make = {
        sop: lambda z, sop=sop: ct_slice(z, SOPClassUID=sop, RealWorldValueMappingSequence=Items([mapping]))
        for sop in (MRImageStorage, "1.2.840.10008.5.1.4.1.1.2")
    }
    for sop, one in make.items():
        np.testing.assert_array_equal(voxels(save_series(tmp_path / sop, one)), TRUE - 1024)


# --- how pixels are stored --------------------------------------------------------------------------------------------


def rle(z: int):
    data = ct_slice(z)
    data.compress(RLELossless)
    return data


STORAGE: dict[str, Callable] = {
    "implicit": lambda z: ct_slice(z, syntax=ImplicitVRLittleEndian),
    "big endian": lambda z: ct_slice(z, syntax=ExplicitVRBigEndian, PixelData=STORED[z].byteswap().tobytes()),
    "deflated": lambda z: ct_slice(z, syntax=DeflatedExplicitVRLittleEndian),
    "RLE of an odd number of pixels": rle,
    "too many bytes": lambda z: ct_slice(z, PixelData=STORED[z].tobytes() + bytes(64)),
    "mixed": lambda z: rle(z) if z % 2 else ct_slice(z, syntax=ImplicitVRLittleEndian),
}


@pytest.mark.parametrize("name", STORAGE)
def test_transfer_syntaxes(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(voxels(save_series(tmp_path / "s", STORAGE[name])), TRUE - 1024)


@pytest.mark.parametrize("codec", ["JPEG2000", "JPEG"])
@pytest.mark.parametrize("kind", ["uint16", "int16"])
def test_compressed_slices_with_their_own_intercepts(tmp_path: Path, codec: str, kind: str) -> None:
    stored = np.tile(STORED, (1, 4, 4)).astype(kind) - (1500 if kind == "int16" else 0)
    packed = tmp_path / "packed.dcm"
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(packed))
    writer.UseCompressionOn()
    writer.SetCompressor(codec)

    def make(z: int):
        writer.Execute(sitk.GetImageFromArray(stored[z]))
        source = pydicom.dcmread(packed)
        assert source.file_meta.TransferSyntaxUID in (JPEG2000Lossless, JPEGLosslessSV1)
        data = ct_slice(
            z,
            stored=stored[z],
            syntax=source.file_meta.TransferSyntaxUID,
            RescaleIntercept=-1000 * (z % 2),
            PhotometricInterpretation="MONOCHROME1",
        )
        data["PixelData"] = source["PixelData"]
        return data

    found = voxels(save_series(tmp_path / "s", make))
    np.testing.assert_array_equal(found, stored.astype(np.int64) - per_slice([0, 1000, 0, 1000]))


PYDICOM_FILES = [  # with the values that pydicom or the writer of the file states
    ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
    ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
    ("MR_small_RLE.dcm", "MR_small.dcm"),
    ("MR_small_bigendian.dcm", "MR_small.dcm"),
    ("MR_small_implicit.dcm", "MR_small.dcm"),
    ("MR_small_padded.dcm", "MR_small.dcm"),
]


@pytest.mark.parametrize(("name", "same"), PYDICOM_FILES)
def test_one_slice_in_many_encodings(name: str, same: str) -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    expected = pydicom.dcmread(folder / same).pixel_array
    np.testing.assert_array_equal(voxels(folder / name)[0], expected)


@pytest.mark.parametrize("name", ["SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm", "SC_rgb_rle_2frame.dcm"])
def test_run_lengths_of_colors(tmp_path: Path, name: str) -> None:
    data = pydicom.dcmread(Path(pydicom.__file__).parent / "data" / "test_files" / name)
    expected = data.pixel_array.reshape(-1, 100, 100, 3)
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SpacingBetweenSlices = [1, 1], 2
    data.save_as(tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "a.dcm")[0].array, np.moveaxis(expected, -1, 0))


@pytest.mark.parametrize("kind", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_pixels(tmp_path: Path, kind: str) -> None:
    values = STORED.astype(np.float32 if kind == "FloatPixelData" else np.float64) / 7
    changes = {"PixelRepresentation": None, "BitsStored": None, "HighBit": None, "PixelData": None}
    folder = save_series(
        tmp_path / "s",
        lambda z: ct_slice(
            z, **changes, BitsAllocated=8 * values.itemsize, RescaleIntercept=1, **{kind: values[z].tobytes()}
        ),
    )
    np.testing.assert_array_equal(voxels(folder), (values.astype(np.float64) + 1).astype(np.float32))


def test_color_slices_and_palettes_have_three_channels(tmp_path: Path) -> None:
    rgb = np.random.default_rng(2).integers(0, 256, (4, 9, 8, 3)).astype(np.uint8)
    changes = {"RescaleSlope": None, "RescaleIntercept": None}
    color = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    folder = save_series(
        tmp_path / "rgb",
        lambda z: ct_slice(z, stored=rgb[z, ..., 0], **changes, **color, PixelData=rgb[z].tobytes()),
    )
    volume, header = read_image(folder)
    np.testing.assert_array_equal(volume.array, np.moveaxis(rgb, -1, 0))
    assert (header.channels, header.dtype) == (3, "uint8")
    assert read_header(folder) == header
    table = np.random.default_rng(3).integers(0, 65536, (3, 256)).astype(np.uint16)
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, column in zip(("Red", "Green", "Blue"), table, strict=True):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = column.tobytes()
    folder = save_series(tmp_path / "p", lambda z: ct_slice(z, stored=rgb[z, ..., 0], **changes, **palette))
    volume, header = read_image(folder)
    np.testing.assert_array_equal(volume.array, table[:, rgb[..., 0]] >> 8)
    assert read_header(folder) == header


def test_dose_of_several_frames_is_scaled_by_its_grid(tmp_path: Path) -> None:
    dose = {"Modality": "RTDOSE", "DoseGridScaling": "0.002", "GridFrameOffsetVector": [0, 2.5, 5, 7.5]}
    path = save(tmp_path / "d.dcm", frames(RescaleSlope=None, RescaleIntercept=None, **dose))
    np.testing.assert_array_equal(voxels(path), (TRUE * 0.002).astype(np.float32))


@pytest.mark.parametrize("series", ["unsigned 12", "unsigned 16", "signed 16", "fraction", "no rescaling"])
def test_ordinary_series_equal_simpleitk(tmp_path: Path, series: str) -> None:
    changes = {
        "unsigned 12": {"BitsStored": 12, "HighBit": 11},
        "signed 16": {"stored": "int16", "RescaleIntercept": 0},
        "fraction": {"RescaleSlope": 0.731, "RescaleIntercept": -3.5},
        "no rescaling": {"RescaleSlope": None, "RescaleIntercept": None},
    }.get(series, {})
    if changes.pop("stored", None):
        folder = save_series(tmp_path, lambda z: ct_slice(z, stored=STORED[z].astype(np.int16) - 1500, **changes))
    else:
        folder = save_series(tmp_path, lambda z: ct_slice(z, **changes))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    theirs, ours = sitk.GetArrayFromImage(image), voxels(folder)
    np.testing.assert_array_equal(ours, theirs.astype(np.float32) if series == "fraction" else theirs)
    assert ours.dtype == ("float32" if series == "fraction" else theirs.dtype)
    grid = read_header(folder).grid
    np.testing.assert_allclose(grid.spacing_zyx_mm[::-1], image.GetSpacing(), rtol=1e-12)
    np.testing.assert_allclose(grid.origin_xyz_mm, image.GetOrigin(), rtol=1e-12)
