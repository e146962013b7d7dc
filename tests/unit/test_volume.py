"""Volumes from and to NumPy, nibabel and SimpleITK: nothing is lost on the way, and what is no volume is refused."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from rfmedsam2.errors import GeometryError, ImageError, UsageError
from rfmedsam2.geometry import Grid
from rfmedsam2.volume import Volume

DTYPES = ("uint8", "int16", "uint16", "int32", "float32", "float64")


def oblique_affine() -> np.ndarray:
    """A rotation about all three axes with three spacings, in single precision as files have it."""
    rng = np.random.default_rng(3)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn * (0.7, 1.3, 4.1)
    affine[:3, 3] = (-111.3, 42.7, 993.1)
    return affine.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 3)])
def test_nibabel_images_come_back_as_they_were(dtype: str, shape: tuple[int, ...]) -> None:
    voxels = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    image = nib.Nifti1Image(voxels, oblique_affine(), dtype=dtype)
    volume = Volume.from_nibabel(image)
    assert volume.array.shape == ((3, 7, 6, 5) if len(shape) == 4 else (1, 7, 6, 5))
    assert volume.array[0, 6, 4, 2] == voxels[(2, 4, 6, *(0,) * (len(shape) - 3))]
    back = volume.to_nibabel()
    np.testing.assert_array_equal(back.affine, image.affine)
    np.testing.assert_array_equal(np.asarray(back.dataobj), voxels)
    assert back.get_data_dtype() == dtype


def test_a_skewed_affine_is_kept() -> None:
    affine = oblique_affine()
    affine[:3, 0] += 0.5 * affine[:3, 1]
    affine = affine.astype(np.float32).astype(np.float64)
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), affine)
    np.testing.assert_array_equal(Volume.from_nibabel(image).to_nibabel().affine, affine)


def test_an_affine_of_double_precision_is_kept_to_the_last_digits() -> None:
    affine = np.diag([0.1, -0.3, 1 / 3, 1.0])
    back = Volume.from_nibabel(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), affine)).to_nibabel().affine
    np.testing.assert_allclose(back, affine, rtol=1e-15, atol=0)


@pytest.mark.parametrize("channels", [1, 2])
def test_sitk_images_come_back_as_they_were(channels: int) -> None:
    voxels = np.arange(channels * 60, dtype=np.int16).reshape(3, 4, 5, channels)
    image = sitk.GetImageFromArray(voxels if channels > 1 else voxels[..., 0], isVector=channels > 1)
    grid = Grid.from_affine_lps(oblique_affine(), (3, 4, 5))
    image.SetSpacing((0.7, 1.3, 4.1))
    image.SetOrigin((-1.1, 2.2, 1 / 3))
    image.SetDirection(np.asarray(grid.direction).ravel().tolist())
    volume = Volume.from_sitk(image)
    assert volume.array.shape == (channels, 3, 4, 5)
    assert volume.grid.spacing_zyx_mm == (4.1, 1.3, 0.7)
    back = volume.to_sitk()
    assert (back.GetSpacing(), back.GetOrigin(), back.GetDirection()) == (
        image.GetSpacing(),
        image.GetOrigin(),
        image.GetDirection(),
    )
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1000.0), ("meter", 0.001), ("mm", 1.0), ("unknown", 1.0)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_lengths_of_nibabel_images_become_mm(kind, unit: str, factor: float) -> None:
    affine = np.diag([0.5, 0.75, 2.0, 1.0])
    affine[:3, 3] = 10, 20, 30
    affine[:3] *= factor
    image = kind(np.zeros((3, 4, 5), np.uint8), affine)
    image.header.set_xyzt_units(unit)
    grid = Volume.from_nibabel(image).grid
    np.testing.assert_allclose(grid.spacing_zyx_mm, (2.0, 0.75, 0.5))
    np.testing.assert_allclose(grid.origin_xyz_mm, (-10, -20, 30))


def test_nibabel_and_sitk_read_one_file_to_the_same_grid(tmp_path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 7), np.int16), oblique_affine()), tmp_path / "x.nii")
    one, two = (
        Volume.from_nibabel(nib.load(tmp_path / "x.nii")),
        Volume.from_sitk(sitk.ReadImage(str(tmp_path / "x.nii"))),
    )
    assert one.grid.mismatch(two.grid, tolerance_mm=1e-3, tolerance_degrees=1e-2) is None


def test_arrays_come_back_as_they_were() -> None:
    flat, deep = np.zeros((2, 3, 4), np.int16), np.zeros((2, 3, 4, 5))
    assert Volume.from_numpy(flat, spacing_zyx_mm=[3, 1, 1]).to_numpy() is not None
    assert Volume.from_numpy(flat, spacing_zyx_mm=np.ones(3)).to_numpy().base is flat
    assert Volume.from_numpy(deep, spacing_zyx_mm=(1, 1, 1)).to_numpy() is deep


def test_types_that_a_format_lacks_are_widened() -> None:
    mask = Volume.from_numpy(np.eye(3, dtype=bool)[None], spacing_zyx_mm=(1, 1, 1))
    assert mask.to_nibabel().get_data_dtype() == np.uint8
    assert sitk.GetArrayFromImage(mask.to_sitk()).tolist() == [np.eye(3, dtype=int).tolist()]
    half = Volume.from_numpy(np.ones((1, 2, 3), np.float16), spacing_zyx_mm=(1, 1, 1))
    assert half.to_nibabel().get_data_dtype() == np.float32
    assert sitk.GetArrayFromImage(half.to_sitk()).dtype == np.float32
    big_endian = Volume.from_numpy(np.ones((1, 2, 3), ">i2"), spacing_zyx_mm=(1, 1, 1))
    assert big_endian.array.dtype == np.int16


@pytest.mark.parametrize(
    "spacing", [(1, 1), (1, 1, 1, 1), (1, 0, 1), (1, -1, 1), (1, float("nan"), 1), (1, float("inf"), 1), "abc", None, 1]
)
def test_an_impossible_spacing_is_a_sentence(spacing: object) -> None:
    with pytest.raises(GeometryError, match="spacing"):
        Volume.from_numpy(np.zeros((2, 3, 4)), spacing_zyx_mm=spacing)


@pytest.mark.parametrize("direction", [np.eye(2), "abc", [[1, 0, 0]], np.full((3, 3), np.nan), 1, 2 * np.eye(3)])
def test_an_impossible_direction_is_a_sentence(direction: object) -> None:
    with pytest.raises(GeometryError, match="direction"):
        Volume.from_numpy(np.zeros((2, 3, 4)), spacing_zyx_mm=(1, 1, 1), direction=direction)


@pytest.mark.parametrize("thing", [torch.arange(24.0).reshape(2, 3, 4), torch.arange(24.0).reshape(2, 3, 4).tolist()])
def test_tensors_and_nested_lists_are_volumes(thing: object) -> None:
    volume = Volume.from_numpy(thing, spacing_zyx_mm=(1, 1, 1))
    assert isinstance(volume.array, np.ndarray)
    assert (volume.array[0] == np.arange(24).reshape(2, 3, 4)).all()


@pytest.mark.parametrize("thing", [torch.zeros(2, 3, 4).bfloat16(), [[[1.0], []]], "image.nii.gz", None, 3, [["a"]]])
def test_what_is_no_array_is_a_sentence(thing: object) -> None:
    with pytest.raises(UsageError, match="not an array of numbers"):
        Volume.from_numpy(thing, spacing_zyx_mm=(1, 1, 1))


@pytest.mark.parametrize(
    "array", [np.zeros((3, 4)), np.zeros((1, 1, 3, 4, 5)), np.zeros((2, 3, 4), complex), np.array([[["a"]]])]
)
def test_arrays_that_are_no_volumes_are_sentences(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match="not a volume"):
        Volume.from_numpy(array, spacing_zyx_mm=(1, 1, 1))


def test_masked_arrays_are_refused_unless_nothing_is_masked() -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    with pytest.raises(ImageError, match=r"masked array.*3 masked elements.*array\.filled\(VALUE\)"):
        Volume.from_numpy(np.ma.masked_less(array, 3), spacing_zyx_mm=(1, 1, 1))
    with pytest.raises(ImageError, match="masked array"):
        Volume(array=np.ma.masked_less(array, 3)[None], grid=Grid(shape_zyx=(2, 3, 4), spacing_zyx_mm=(1, 1, 1)))
    whole = Volume.from_numpy(np.ma.array(array), spacing_zyx_mm=(1, 1, 1))
    assert type(whole.array) is np.ndarray
    np.testing.assert_array_equal(whole.array[0], array)


def test_other_libraries_images_are_told_apart() -> None:
    with pytest.raises(UsageError, match="not a nibabel image"):
        Volume.from_nibabel(np.zeros((2, 3, 4)))
    with pytest.raises(UsageError, match="not a SimpleITK image"):
        Volume.from_sitk(nib.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.eye(4)))
    with pytest.raises(ImageError, match="not a volume"):
        Volume.from_sitk(sitk.Image(3, 4, sitk.sitkUInt8))
    colors = nib.Nifti1Image(np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4))
    with pytest.raises(ImageError, match="not a volume"):
        Volume.from_nibabel(colors)
