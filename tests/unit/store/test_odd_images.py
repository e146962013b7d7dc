"""Images as some programs write them: MetaImage with its voxels in words, PNG with a transparent color, odd NIfTI."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from rfmedsam2.errors import ImageError
from rfmedsam2.store.formats.image_header import NotLabelsError, TruncatedImageError
from rfmedsam2.store.images import read_header, read_image, read_label

ARRAY = np.arange(24).reshape(2, 3, 4) - 7
COLORS = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)


def write_words(path: Path, words: str, *, kind: str = "MET_SHORT", data: str = "LOCAL") -> Path:
    header = f"ObjectType = Image\nNDims = 3\nBinaryData = False\nDimSize = 4 3 2\nElementType = {kind}\n"
    path.write_text(f"{header}ElementSpacing = 1 2 3\nElementDataFile = {data}\n" + (words if data == "LOCAL" else ""))
    if data != "LOCAL":
        path.with_name(data).write_text(words)
    return path


@pytest.mark.parametrize("data", ["LOCAL", "voxels.txt"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("MET_SHORT", "int16"), ("MET_FLOAT", "float32"), ("MET_DOUBLE", "float32")]
)
def test_voxels_in_words_are_numbers(tmp_path: Path, kind: str, dtype: str, data: str) -> None:
    """The last word needs no line break, without which ITK refuses the file."""
    numbers = ARRAY if dtype == "int16" else ARRAY + 0.25
    volume, header = read_image(
        write_words(tmp_path / "a.mha", " ".join(map(str, numbers.ravel())), kind=kind, data=data)
    )
    assert (volume.array.dtype, header.dtype) == (np.dtype(dtype), dtype)
    assert np.array_equal(volume.array[0], numbers.astype(dtype))
    assert volume.grid.spacing_zyx_mm == (3, 2, 1)
    with_breaks = "\n".join(map(str, numbers.ravel())) + "\n"
    assert np.array_equal(read_image(write_words(tmp_path / "b.mhd", with_breaks, kind=kind))[0].array, volume.array)


def test_words_that_are_missing_or_no_numbers_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(TruncatedImageError, match="Found 3 of 24 numbers"):
        read_image(write_words(tmp_path / "short.mha", "1 2 3"))
    words = "1 " * 23
    with pytest.raises(ImageError, match="voxels are not numbers of their type"):
        read_image(write_words(tmp_path / "letters.mha", words + "x"))
    with pytest.raises(ImageError, match="voxels are not numbers of their type"):
        read_image(write_words(tmp_path / "fraction.mha", words + "0.5"))


@pytest.mark.parametrize("kind", ["color", "gray", "palette"])
def test_a_transparent_color_of_a_png_is_no_channel(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    plain = Image.fromarray(COLORS if kind != "gray" else COLORS[..., 0])
    plain = plain.quantize(8) if kind == "palette" else plain
    plain.save(path, transparency={"color": (1, 2, 3), "gray": 7, "palette": 0}[kind])
    plain.save(tmp_path / "plain.png")
    volume, header = read_image(path)
    expected, without = read_image(tmp_path / "plain.png")
    assert header == without == read_header(path)
    assert header.channels == (1 if kind == "gray" else 3)
    assert np.array_equal(volume.array, expected.array)


def test_an_animation_is_not_an_image(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((5, 6, 3), level, np.uint8)) for level in (0, 90, 180)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    for read in (read_header, read_image):
        with pytest.raises(ImageError, match=r"PNG is an animation.*Expected one image. Found 3 images"):
            read(tmp_path / "a.png")
    frames[0].save(tmp_path / "one.png", save_all=True, append_images=[])
    assert read_image(tmp_path / "one.png")[0].array.shape == (3, 1, 5, 6)


@pytest.mark.parametrize(
    ("second", "found"), [(COLORS[:3, :3, 0], "page 2 of 2, 3 x 3 pixels"), (COLORS, "6 x 5 pixels of 3 channels")]
)
def test_pages_of_another_size_are_not_planes(tmp_path: Path, second: np.ndarray, found: str) -> None:
    first = Image.fromarray(COLORS[..., 0])
    first.save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(second)])
    with pytest.raises(
        ImageError, match=rf"not the planes of one volume.*first, 6 x 5 pixels. Found .*{found}"
    ) as caught:
        read_image(tmp_path / "a.tif")
    assert not isinstance(caught.value, TruncatedImageError)


def test_a_fourth_axis_of_nothing_is_not_used(tmp_path: Path) -> None:
    """dim[4] = 0, which ITK and the reference library read as 1."""
    raw = bytearray(nib.Nifti1Image(ARRAY.T.astype(np.int16), np.eye(4)).to_bytes())
    raw[40:42], raw[48:50] = (4).to_bytes(2, "little"), bytes(2)
    (tmp_path / "a.nii").write_bytes(raw)
    assert np.array_equal(read_image(tmp_path / "a.nii")[0].array[0], ARRAY)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii"))), ARRAY)
    raw[46:48] = bytes(2)
    (tmp_path / "b.nii").write_bytes(raw)
    with pytest.raises(ImageError, match=r"shape of the image is not supported.*Check what wrote the file"):
        read_image(tmp_path / "b.nii")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_labels_that_are_not_finite_are_counted(tmp_path: Path, value: float) -> None:
    labels = np.zeros((2, 3, 4), np.float32)
    labels[0, 1, 2] = labels[1, 1, 1] = value
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / "a.nii.gz"))
    with pytest.raises(NotLabelsError, match=r"holds NaN or infinity.*Found 2 such voxels"):
        read_label(tmp_path / "a.nii.gz")


def test_a_folder_of_images_is_not_taken_for_dicom(tmp_path: Path) -> None:
    for folder, found in (
        ("images", r"images such as a\.nii\.gz. Give the files of one case"),
        ("none", "no DICOM file"),
    ):
        (tmp_path / folder).mkdir()
        if folder == "images":
            nib.save(nib.Nifti1Image(ARRAY.T.astype(np.int16), np.eye(4)), tmp_path / folder / "a.nii.gz")
        with pytest.raises(ImageError, match=f"no (DICOM|image) series.*Found {found}"):
            read_image(tmp_path / folder)
    with pytest.raises(ImageError, match=r"system refuses this path \(File name too long\)"):
        read_image(tmp_path / ("x" * 300 + ".nii.gz"))
