"""Arrays and spacings equal those of nnU-Net's readers on real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from PIL import Image

from rfmedsam2.store.images import read_channels, read_header, read_image, read_label, write_label
from rfmedsam2.store.orientation import reoriented
from rfmedsam2.store.raw import open_dataset, read_case

SAMPLES = [
    "nifti/FLAIR.nii.gz",
    "nrrd/FLAIR.nrrd",
    "nrrd/brain1_image.nrrd",
    "nrrd/prostate_phantom_image.nrrd",
    "mha/mha.mha",
    "mha/10000_1000000_adc.mha",
    "mha/10000_1000000_prostate_seg.nii.gz",
    "dicom_ct_totalseg20_seg.nii.gz",
]
DATASETS = [
    "hippocampus/Dataset004_Hippocampus",
    "ct-organs-totalsegmentator/Dataset110_TSAbdomenCT",
    "brats-like-4ch/Dataset114_BraTSlike4ch",
    "ivadomed-samples/Dataset113_SpinalCord3ch",
]


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_equals_simpleitkio(data_root: Path, name: str) -> None:
    path = data_root / "format-samples" / name
    expected, properties = SimpleITKIO().read_images((str(path),))
    volume, _ = read_image(path)
    np.testing.assert_array_equal(volume.array, expected)
    assert list(volume.grid.spacing_zyx_mm) == properties["spacing"]
    np.testing.assert_allclose(volume.grid.origin_xyz_mm, properties["sitk_stuff"]["origin"], atol=1e-4)
    np.testing.assert_allclose(np.ravel(volume.grid.direction), properties["sitk_stuff"]["direction"], atol=1e-6)


@pytest.mark.parametrize("name", DATASETS)
def test_cases_equal_simpleitkio(data_root: Path, name: str) -> None:
    dataset = open_dataset(data_root / name)
    for case in dataset.training[:3]:
        expected, properties = SimpleITKIO().read_images([str(p) for p in case.images])
        volume, _ = read_case(case, channels=len(dataset.json.channels))
        np.testing.assert_array_equal(volume.array, expected)
        assert list(volume.grid.spacing_zyx_mm) == properties["spacing"]
        assert case.label is not None
        label, _ = SimpleITKIO().read_seg(str(case.label))
        np.testing.assert_array_equal(read_label(case.label)[0].array, label)


@pytest.mark.parametrize("name", [s for s in SAMPLES if s.endswith(".nii.gz")])
def test_reoriented_equals_nibabelio_with_reorient(data_root: Path, name: str, tmp_path: Path) -> None:
    path = data_root / "format-samples" / name
    reader = NibabelIOWithReorient()
    expected, properties = reader.read_images((str(path),))
    volume, turn = reoriented(read_image(path)[0], "RAS")
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_allclose(volume.grid.spacing_zyx_mm, properties["spacing"], rtol=1e-6)
    # the way back: both writers put the same voxel into the file
    labels = (volume.array[0] > np.median(volume.array)).astype(np.uint8)
    reader.write_seg(labels, str(tmp_path / "theirs.nii.gz"), properties)
    write_label(tmp_path / "ours.nii.gz", turn.undo(labels), read_image(path)[1])
    ours, theirs = read_label(tmp_path / "ours.nii.gz")[0], read_label(tmp_path / "theirs.nii.gz")[0]
    np.testing.assert_array_equal(ours.array, theirs.array)
    assert ours.grid.mismatch(theirs.grid) is None


@pytest.mark.parametrize("name", ["nrrd/FLAIR.nrrd", "nrrd/prostate_phantom_image.nrrd", "mha/10000_1000000_adc.mha"])
def test_reoriented_equals_simpleitkio_with_reorient(data_root: Path, name: str) -> None:
    path = data_root / "format-samples" / name
    expected, properties = SimpleITKIOWithReorient().read_images((str(path),))
    volume, _ = reoriented(read_image(path)[0], "RAS")
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_allclose(volume.grid.spacing_zyx_mm, properties["spacing"], rtol=1e-12)


def test_two_files_of_one_case_equal_simpleitkio(data_root: Path) -> None:
    paths = [data_root / "format-samples" / "mha" / f"10000_1000000_{m}.mha" for m in ("adc", "hbv")]
    expected, _ = SimpleITKIO().read_images([str(p) for p in paths])
    volume, header = read_channels(paths)
    np.testing.assert_array_equal(volume.array, expected)
    assert header.channels == 1


def test_tiff_stacks_equal_tiff3dio_both_ways(tmp_path: Path) -> None:
    array = np.random.default_rng(7).integers(0, 4, (5, 12, 16)).astype(np.uint8)
    properties = {"spacing": [2.5, 0.8, 0.7]}
    Tiff3DIO().write_seg(array, str(tmp_path / "c.tif"), properties)
    label, header = read_label(tmp_path / "c.tif")
    np.testing.assert_array_equal(label.array[0], array)
    assert list(header.grid.spacing_zyx_mm) == properties["spacing"]
    (tmp_path / "c.tif").rename(tmp_path / "c_0000.tif")
    expected, found = Tiff3DIO().read_images([str(tmp_path / "c_0000.tif")])
    volume, header = read_image(tmp_path / "c_0000.tif")
    np.testing.assert_array_equal(volume.array, expected)
    assert list(header.grid.spacing_zyx_mm) == list(found["spacing"])
    (tmp_path / "out").mkdir()
    write_label(tmp_path / "out" / "c.tif", array, header)
    theirs, found = Tiff3DIO().read_seg(str(tmp_path / "out" / "c.tif"))
    np.testing.assert_array_equal(theirs[0], array)
    assert list(found["spacing"]) == properties["spacing"]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_flat_images_equal_naturalimage2dio(tmp_path: Path, mode: str, ending: str) -> None:
    if (ending, mode) in ((".bmp", "RGBA"), (".bmp", "I;16"), (".tif", "P"), (".tif", "1"), (".png", "1")):
        pytest.skip("not written by Pillow, or read as indices by nnU-Net's reader of this format only")
    pixels = np.random.default_rng(7).integers(0, 256, (12, 16, 4)).astype(np.uint8)
    image = {
        "L": lambda: Image.fromarray(pixels[..., 0]),
        "RGB": lambda: Image.fromarray(pixels[..., :3]),
        "RGBA": lambda: Image.fromarray(pixels),
        "P": lambda: Image.fromarray(pixels[..., :3]).quantize(16),
        "1": lambda: Image.fromarray(pixels[..., 0] > 99),
        "I;16": lambda: Image.fromarray(pixels[..., 0].astype(np.uint16) * 200),
    }[mode]()
    path = tmp_path / f"c_0000{ending}"
    image.save(path)
    expected, properties = NaturalImage2DIO().read_images([str(path)])
    volume, header = read_image(path)
    np.testing.assert_array_equal(volume.array, expected)
    assert header.grid.spacing_zyx_mm == properties["spacing"]


def test_two_axes_equal_simpleitkio(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(7).random((12, 16), dtype=np.float32))
    image.SetSpacing((0.5, 0.7))
    for name in ("a.nii.gz", "a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
        expected, properties = SimpleITKIO().read_images([str(tmp_path / name)])
        volume, header = read_image(tmp_path / name)
        np.testing.assert_array_equal(volume.array, expected)
        np.testing.assert_allclose(header.grid.spacing_zyx_mm, properties["spacing"], rtol=1e-6)


KINDS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "bool", "rgb"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("planes", [1, 5])
@pytest.mark.parametrize("how", [{"tile": (16, 16)}, {}, {"compression": "zlib"}, {"byteorder": ">"}])
def test_tiff_of_any_kind_equals_nnunets_readers(tmp_path: Path, kind: str, planes: int, how: dict) -> None:
    """ITK takes tiled ones and single bits for colored images."""
    rng = np.random.default_rng(7)
    shape = (planes, 40, 50, 3) if kind == "rgb" else (planes, 40, 50)
    array = rng.integers(0, 100 if kind == "int8" else 250, shape).astype("uint8" if kind in ("rgb", "bool") else kind)
    array = array > 99 if kind == "bool" else array
    if kind.startswith("int"):
        array = array - 100 if kind == "int8" else array * (-1) ** np.arange(array.size).reshape(shape).astype(kind)
    elif kind == "uint32":
        array = array + np.uint32(4_000_000_000)
    how = {} if kind == "bool" else how
    path = tmp_path / "c_0000.tif"
    tifffile.imwrite(
        path, array if planes > 1 else array[0], photometric="rgb" if kind == "rgb" else "minisblack", **how
    )
    volume, header = read_image(path)
    assert header == read_header(path)
    if planes == 1:
        expected, _ = NaturalImage2DIO().read_images([str(path)])
    elif kind == "rgb":
        expected = np.moveaxis(array, -1, 0)
    else:
        expected, _ = Tiff3DIO().read_images([str(path)])
    np.testing.assert_array_equal(volume.array.astype(np.float32), np.asarray(expected, np.float32))
    if kind not in ("bool", "rgb"):
        assert volume.array.dtype == kind
        np.testing.assert_array_equal(volume.array[0], array)
