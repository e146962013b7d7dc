"""Reading and writing single image files: geometry, types, damage."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from rfmedsam2.errors import GeometryError, ImageError, StoreError, UsageError
from rfmedsam2.store import images
from rfmedsam2.store.formats import decompression
from rfmedsam2.store.formats.image_header import (
    ChangedWhileReadingError,
    NotLabelsError,
    TruncatedImageError,
    readers_differ,
)
from rfmedsam2.store.images import read_channels, read_header, read_image, read_label, write_label
from rfmedsam2.store.orientation import reoriented
from rfmedsam2.volume import Volume

ARRAY = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)  # z, y, x


def nifti(path: Path, array_zyx: np.ndarray = ARRAY, affine: np.ndarray | None = None, **header) -> Path:
    image = nib.Nifti1Image(array_zyx.T, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def patched(path: Path, offset: int, values: np.ndarray) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + values.nbytes] = values.tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
def test_voxels_types_and_spacing_are_those_of_the_file(tmp_path: Path, ending: str, dtype: str) -> None:
    path = tmp_path / f"a{ending}"
    image = sitk.GetImageFromArray(ARRAY.astype(dtype))
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(path))
    volume, header = read_image(path)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, ARRAY[None].astype(dtype))
    assert volume.grid.spacing_zyx_mm == (3.0, 2.0, 1.0)
    assert read_header(path) == header
    assert volume.array.flags.c_contiguous


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_double_precision_becomes_float32(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY / 7.0), str(path), useCompression=True)
    volume, header = read_image(path)
    assert volume.array.dtype == np.float32
    assert header.dtype == "float32"
    np.testing.assert_array_equal(volume.array[0], (ARRAY / 7.0).astype(np.float32))


def test_scaled_nifti_is_float32_with_the_values_nibabel_gives(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii")
    patched(path, 112, np.array([0.37, -1024.5], dtype="<f4"))
    volume, header = read_image(path)
    expected = np.asarray(nib.load(path).dataobj).T.astype(np.float32)
    assert header.dtype == "float32"
    np.testing.assert_array_equal(volume.array[0], expected)


def test_big_endian_nifti_gives_native_integers(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    image = nib.Nifti1Image(ARRAY.T, np.eye(4), header=header)
    nib.save(image, tmp_path / "a.nii.gz")
    volume, _ = read_image(tmp_path / "a.nii.gz")
    assert volume.array.dtype == np.int16
    assert volume.array.dtype.isnative
    np.testing.assert_array_equal(volume.array[0], ARRAY)


@pytest.mark.parametrize("shape_xyz", [(4, 3, 2, 5), (4, 3, 2, 1, 5)])
def test_nifti_with_several_volumes_gives_channels(tmp_path: Path, shape_xyz: tuple[int, ...]) -> None:
    data = np.random.default_rng(0).integers(0, 99, shape_xyz).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    volume, header = read_image(tmp_path / "a.nii.gz")
    assert header.channels == 5
    np.testing.assert_array_equal(volume.array, data.reshape(4, 3, 2, 5).transpose(3, 2, 1, 0))


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("compressed", [True, False])
def test_vector_and_four_dimensional_files_give_channels(tmp_path: Path, ending: str, compressed: bool) -> None:
    data = np.random.default_rng(0).integers(0, 99, (2, 3, 4, 5)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(data, isVector=True), str(tmp_path / f"v{ending}"), compressed)
    np.testing.assert_array_equal(read_image(tmp_path / f"v{ending}")[0].array, np.moveaxis(data, -1, 0))
    sitk.WriteImage(sitk.GetImageFromArray(data, isVector=False), str(tmp_path / f"t{ending}"), compressed)
    np.testing.assert_array_equal(read_image(tmp_path / f"t{ending}")[0].array, data)


def test_two_dimensional_picture_has_one_plane_and_nnunets_spacing(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY[0].astype(np.uint8)), str(tmp_path / "a.png"))
    volume, header = read_image(tmp_path / "a.png")
    assert volume.array.shape == (1, 1, 3, 4)
    assert header.grid.spacing_zyx_mm == (999.0, 1.0, 1.0)
    write_label(tmp_path / "b.png", ARRAY[:1], header)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png")[0].array[0], ARRAY[:1])


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("compressed", [True, False])
def test_truncated_file_is_refused_by_name(tmp_path: Path, ending: str, compressed: bool) -> None:
    path = tmp_path / f"cut{ending}"
    data = np.random.default_rng(0).integers(0, 9999, (20, 20, 20)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(data), str(path), compressed)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(TruncatedImageError, match=r"truncated or damaged: .*cut"):
        read_image(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_flipped_bytes_in_compressed_file_are_noticed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"bad{ending}"
    data = np.random.default_rng(0).integers(0, 9999, (20, 20, 20)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(data), str(path), useCompression=True)
    packed = bytearray(path.read_bytes())
    middle = len(packed) // 2
    packed[middle : middle + 40] = bytes(40)
    path.write_bytes(packed)
    with pytest.raises(TruncatedImageError):
        read_image(path)


def test_wrong_gzip_checksum_is_noticed_although_all_voxels_are_there(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz")
    packed = bytearray(path.read_bytes())
    packed[-6] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(TruncatedImageError, match="incorrect data check"):
        read_image(path)


def test_gzip_of_several_members_is_read_whole(tmp_path: Path) -> None:
    data = nifti(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(data[:360]) + gzip.compress(data[360:]))
    np.testing.assert_array_equal(read_image(path)[0].array[0], ARRAY)


def test_gzip_members_may_end_anywhere_in_the_chunks_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The magic bytes of a member may lie in two chunks."""
    data = nifti(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(b"".join(gzip.compress(data[at : at + 50]) for at in range(0, len(data), 50)))
    for size in range(2, 90):
        monkeypatch.setattr(decompression, "CHUNK", size)
        np.testing.assert_array_equal(read_image(path)[0].array[0], ARRAY)


@pytest.mark.parametrize("offset", [0, 100, 347])
def test_voxels_within_the_header_are_refused(tmp_path: Path, offset: int) -> None:
    """ITK would read from the end of the header on, nibabel from the offset."""
    path = nifti(tmp_path / "a.nii")
    assert np.array_equal(read_image(path)[0].array[0], ARRAY)
    patched(path, 108, np.array([offset], dtype="<f4"))
    with pytest.raises(ImageError, match=rf"voxels begin within it.*a\.nii.*352 or more.*Found {offset}"):
        read_image(path)


def test_header_that_promises_far_more_than_the_file_holds_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii")
    patched(path, 42, np.array([30000, 30000, 30000], dtype="<i2"))
    with pytest.raises(TruncatedImageError):
        read_image(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mgz", "a.dcm", "a.png"])
@pytest.mark.parametrize("content", [b"", b"not an image at all" * 50])
def test_file_that_is_no_image_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=name):
        read_image(tmp_path / name)


DAMAGED = ["a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.mgh", "a.mgz", "dicom"]


def image_to_damage(folder: Path, name: str) -> Path:
    if name == "dicom":
        return next(dicom_series(folder / "s", [(0, 0, 0.0)]).iterdir())
    if ".mg" in name:
        nib.save(nib.freesurfer.MGHImage(ARRAY.T.astype(np.int32), np.eye(4)), folder / name)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(ARRAY), str(folder / name), useCompression=True)
    return folder / name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # the parsers warn before they fail
@pytest.mark.parametrize("name", DAMAGED)
def test_a_cut_file_is_refused_or_loses_nothing(tmp_path: Path, name: str) -> None:
    path = image_to_damage(tmp_path, name)
    content, (sound, _) = path.read_bytes(), read_image(path)
    refused = 0
    for length in np.random.default_rng(7).integers(1, len(content), 40):
        path.write_bytes(content[:length])
        try:
            found, _ = read_image(path)
        except (ImageError, GeometryError):
            refused += 1
            continue
        np.testing.assert_array_equal(found.array, sound.array)  # a checksum or padding alone was cut off
        assert found.grid == sound.grid
    assert refused > 20


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("name", DAMAGED)
def test_changed_bytes_end_in_a_sentence_or_in_an_image_that_agrees_with_its_header(tmp_path: Path, name: str) -> None:
    path = image_to_damage(tmp_path, name)
    content, (sound, _) = path.read_bytes(), read_image(path)
    checked = name.endswith((".gz", ".mgz"))
    rng = np.random.default_rng(7)
    for _ in range(60):
        broken = bytearray(content)
        for position in rng.integers(0, min(len(broken), 600), rng.integers(1, 6)):
            broken[position] = rng.integers(256)
        path.write_bytes(broken)
        with contextlib.suppress(ImageError, GeometryError):
            assert read_header(path).grid.shape_zyx
        with contextlib.suppress(ImageError, GeometryError):
            found, header = read_image(path)
            assert header == read_header(path)
            assert found.array.shape[1:] == found.grid.shape_zyx == header.grid.shape_zyx
            assert np.isfinite(found.grid.spacing_zyx_mm).all()
            assert min(found.grid.spacing_zyx_mm) > 0
            if checked and broken[10:] != content[10:]:  # past gzip's own header its checksum sees every change
                np.testing.assert_array_equal(found.array, sound.array)


def test_no_room_for_a_label_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(nifti(tmp_path / "a.nii"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gzip.GzipFile, "write", full)
    with pytest.raises(StoreError, match="disk is full"):
        write_label(tmp_path / "b.nii.gz", ARRAY, header)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


def test_missing_file_and_unknown_ending_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "a.nii.gz")
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(ImageError, match="no known image ending"):
        read_image(tmp_path / "a.jpg")


def test_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nifti(tmp_path / "a.nii.gz")
    original = images.read_nifti

    def slow(where: Path):
        result = original(where)
        os.utime(where, ns=(1, 1))
        return result

    monkeypatch.setattr(images, "read_nifti", slow)
    with pytest.raises(ChangedWhileReadingError, match=r"changed while it was read: .*a\.nii\.gz"):
        read_image(path)


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(1, 0, 1), (1, 1, float("nan"))])
def test_impossible_spacing_is_refused(tmp_path: Path, spacing: tuple[float, ...]) -> None:
    path = nifti(tmp_path / "a.nii", affine=np.eye(4))
    patched(path, 80, np.array(spacing, dtype="<f4"))
    patched(path, 252, np.array([1, 0], dtype="<i2"))  # a qform, no sform that could say it better
    with pytest.raises(GeometryError, match="spacing is not positive"):
        read_image(path)


def test_negative_metaimage_spacing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY), str(path))
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 -1 1"))
    with pytest.raises(GeometryError, match="spacing is not positive"):
        read_image(path)


def sheared(degrees: float) -> np.ndarray:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    angle = np.radians(degrees)
    affine[:3, 2] = 2 * np.array([0.0, np.sin(angle), np.cos(angle)])
    return affine


def sform_only(path: Path, affine: np.ndarray) -> Path:
    image = nib.Nifti1Image(ARRAY.T, affine)
    image.set_qform(None, code=0)
    image.set_sform(affine, code=1)
    nib.save(image, path)
    return path


def test_small_skew_is_repaired_reported_and_written_back_as_it_was(tmp_path: Path) -> None:
    path = sform_only(tmp_path / "a.nii.gz", sheared(0.5))
    volume, header = read_image(path)
    assert header.skew_degrees == pytest.approx(0.5, abs=1e-4)
    assert volume.grid.skew_degrees < 1e-6
    write_label(tmp_path / "b.nii.gz", ARRAY, header)
    np.testing.assert_array_equal(nib.load(tmp_path / "b.nii.gz").affine, nib.load(path).affine)


def test_large_skew_is_refused_with_its_angle(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match=r"not perpendicular.*15\.00 degrees"):
        read_image(sform_only(tmp_path / "a.nii", sheared(15)))


def test_rigid_qform_serves_where_the_sform_is_an_affine_alignment(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ARRAY.T, np.diag([1.0, 2.0, 3.0, 1.0]))
    image.set_qform(np.diag([1.0, 2.0, 3.0, 1.0]), code=1)
    image.set_sform(sheared(12), code=4)
    image.header["pixdim"][1:4] = [1, 2, 3]
    nib.save(image, tmp_path / "a.nii")
    volume, header = read_image(tmp_path / "a.nii")
    assert volume.grid.spacing_zyx_mm == (3.0, 2.0, 1.0)
    assert header.skew_degrees == 0
    assert "sform (code 4) and qform (code 1) disagree" in str(readers_differ(header))


def test_nifti_whose_affine_and_pixdim_disagree_is_refused(tmp_path: Path) -> None:
    path = patched(sform_only(tmp_path / "a.nii", np.diag([2.0, 2.0, 2.0, 1.0])), 80, np.array([1, 1, 3], "<f4"))
    with pytest.raises(GeometryError, match="two different spacings"):
        read_image(path)


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    one = nifti(tmp_path / "a_0000.nii.gz")
    two = nifti(tmp_path / "a_0001.nii.gz", affine=np.diag([1.0, 2.0, 4.0, 1.0]))
    with pytest.raises(GeometryError, match=r"a_0001.*spacing"):
        read_channels([one, two])
    three = nifti(tmp_path / "a_0002.nii.gz", ARRAY[:1])
    with pytest.raises(GeometryError, match=r"a_0002.*shape"):
        read_channels([one, three])


def test_channels_of_different_types_become_their_common_type_but_never_double(tmp_path: Path) -> None:
    one = nifti(tmp_path / "a_0000.nii.gz", ARRAY.astype(np.int32))
    two = nifti(tmp_path / "a_0001.nii.gz", ARRAY.astype(np.float32) / 2)
    volume, _ = read_channels([one, two])
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, np.stack([ARRAY, ARRAY / 2]))


# --- labels -----------------------------------------------------------------------------------------------------------


def test_label_comes_in_the_smallest_unsigned_type(tmp_path: Path) -> None:
    assert read_label(nifti(tmp_path / "a.nii", ARRAY.astype(np.int32)))[0].array.dtype == np.uint8
    assert read_label(nifti(tmp_path / "b.nii", ARRAY.astype(np.float32)))[0].array.dtype == np.uint8
    assert read_label(nifti(tmp_path / "c.nii", ARRAY + 250))[0].array.dtype == np.uint16


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan, np.inf, 70000.0])
def test_values_that_are_no_labels_are_refused(tmp_path: Path, value: float) -> None:
    array = ARRAY.astype(np.float32)
    array[1, 1, 1] = value
    with pytest.raises(NotLabelsError):
        read_label(nifti(tmp_path / "a.nii", array))


def test_nifti_label_keeps_affine_codes_pixdim_and_units(tmp_path: Path) -> None:
    affine = nib.affines.from_matvec(np.diag([-1.0, 2.0, 3.0]), [10, -20, 30])
    image = nib.Nifti1Image(ARRAY.T, affine)
    image.set_qform(affine, code=2)
    image.set_sform(affine, code=4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"secret"
    nib.save(image, tmp_path / "a.nii.gz")
    write_label(tmp_path / "b.nii.gz", ARRAY, read_header(tmp_path / "a.nii.gz"))
    source, label = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "b.nii.gz")
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b"):
        np.testing.assert_array_equal(label.header[field], source.header[field], err_msg=field)
    assert label.get_data_dtype() == np.uint8
    assert label.header["descrip"] == b""
    np.testing.assert_array_equal(np.asarray(label.dataobj).T, ARRAY)


def test_values_above_255_are_written_as_uint16(tmp_path: Path) -> None:
    header = read_header(nifti(tmp_path / "a.nii"))
    write_label(tmp_path / "b.nii.gz", ARRAY + 250, header)
    assert nib.load(tmp_path / "b.nii.gz").get_data_dtype() == np.uint16


def test_same_labels_give_the_same_bytes(tmp_path: Path) -> None:
    header = read_header(nifti(tmp_path / "a.nii"))
    write_label(tmp_path / "b.nii.gz", ARRAY, header)
    write_label(tmp_path / "c.nii.gz", ARRAY, header)
    assert (tmp_path / "b.nii.gz").read_bytes() == (tmp_path / "c.nii.gz").read_bytes()


def test_labels_of_another_shape_or_format_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    header = read_header(nifti(tmp_path / "a.nii"))
    with pytest.raises(GeometryError, match="shape of the labels differs"):
        write_label(tmp_path / "b.nii.gz", ARRAY[:1], header)
    with pytest.raises(UsageError, match="cannot be written"):
        write_label(tmp_path / "b.jpg", ARRAY, header)
    with pytest.raises(NotLabelsError):
        write_label(tmp_path / "b.nii.gz", ARRAY - 5, header)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.parametrize(
    "ending", [".NII.GZ", ".NII", ".NRRD", ".MHA", ".MHD", ".MGZ", ".MGH", ".SEG.NRRD", ".TIF", ".tiff"]
)
def test_endings_in_capitals_are_written_and_read(tmp_path: Path, ending: str) -> None:
    header = read_header(nifti(tmp_path / "a.nii"))
    write_label(tmp_path / f"b{ending}", ARRAY % 3, header)
    label, _ = read_label(tmp_path / f"b{ending}")
    np.testing.assert_array_equal(label.array[0], ARRAY % 3)
    packed = (tmp_path / f"b{ending}").read_bytes().startswith(b"\x1f\x8b")
    assert packed == (ending in (".NII.GZ", ".MGZ"))


@pytest.mark.parametrize("ending", [".png", ".bmp", ".PNG"])
def test_a_volume_is_not_written_as_its_first_plane(tmp_path: Path, ending: str) -> None:
    header = read_header(nifti(tmp_path / "a.nii"))
    with pytest.raises(UsageError, match="2 planes"):
        write_label(tmp_path / f"b{ending}", ARRAY % 3, header)
    write_label(tmp_path / f"c{ending}", ARRAY[:1] % 3, read_header(nifti(tmp_path / "d.nii", ARRAY[:1])))
    np.testing.assert_array_equal(read_label(tmp_path / f"c{ending}")[0].array[0], ARRAY[:1] % 3)


def test_label_into_a_place_that_is_a_file_is_a_store_error(tmp_path: Path) -> None:
    header = read_header(nifti(tmp_path / "a.nii"))
    with pytest.raises(StoreError):
        write_label(tmp_path / "a.nii" / "b.nii.gz", ARRAY, header)


# --- DICOM ------------------------------------------------------------------------------------------------------------


def dicom_series(folder: Path, positions: list[tuple[float, float, float]], *, series: str | None = None, **changes):
    """A CT series: slice i holds the value i, stored as i + 1024; file names run against the positions."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = series or generate_uid()
    for i, position in enumerate(positions):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID = uid, generate_uid()
        data.Modality, data.SeriesDescription, data.InstanceNumber = "CT", f"series {uid[-4:]}", i + 1
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 3, 4, 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 0
        data.ImagePositionPatient = list(position)
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [2.0, 1.0], 5.0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        for key, value in changes.items():
            setattr(data, key, value)
        data.PixelData = np.full((3, 4), i + 1024, dtype="<u2").tobytes()
        data.save_as(folder / f"{uid[-4:]}_{99 - i:03d}", enforce_file_format=True)
    return folder


def test_dicom_slices_are_stacked_by_position_and_rescaled(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "s", [(0, 0, 6.0), (0, 0, 0.0), (0, 0, 3.0)])
    volume, header = read_image(folder)
    assert volume.array[0, :, 0, 0].tolist() == [1, 2, 0]
    assert volume.grid.spacing_zyx_mm == (3.0, 2.0, 1.0)
    assert header.dtype == volume.array.dtype.name
    assert read_header(folder) == header


def test_dicom_label_is_written_in_the_geometry_of_the_series(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "s", [(-7, 5, 6.0), (-7, 5, 0.0), (-7, 5, 3.0)])
    header = read_header(folder)
    labels = np.zeros((3, 3, 4), np.uint8)
    labels[0, 2, 3] = 1
    for ending in (".nii.gz", ".nrrd"):
        write_label(tmp_path / f"l{ending}", labels, header)
        image = sitk.ReadImage(str(tmp_path / f"l{ending}"))
        assert image.GetPixel(3, 2, 0) == 1
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((3, 2, 0)), (-4, 9, 0), atol=1e-5)


def test_missing_dicom_slice_is_refused_with_its_place(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "s", [(0, 0, z) for z in (0.0, 2.0, 4.0, 8.0, 10.0)])
    with pytest.raises(GeometryError, match=r"lacks 1 slice.*2 mm.*after .*_097 \(4 mm\)"):
        read_image(folder)


def test_tilted_gantry_is_refused_with_its_angle(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "s", [(0, z * np.tan(np.radians(10)), z) for z in (0.0, 2.0, 4.0)])
    with pytest.raises(GeometryError, match=r"gantry was tilted.*10\.00 degrees"):
        read_image(folder)


@pytest.mark.parametrize("aside", [(0, 0, 5, 0, 0), (0, 0, 0, 5, 5), (5, 0, 0, 0, 0), (0, 0.6, -0.6, 0.6, 0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_slices_shifted_within_their_planes_are_refused(tmp_path: Path, aside: tuple[float, ...], axis: int) -> None:
    """Readers that take the first position for all would put the contents of the others elsewhere."""
    places = [(2.0 * x, 0, 3.0 * z) if axis == 0 else (0, 2.0 * x, 3.0 * z) for z, x in enumerate(aside)]
    folder = dicom_series(tmp_path / "s", places)
    for read in (read_header, read_image):
        with pytest.raises(GeometryError, match=r"shifted against each other.*_0\d\d, [\d.]+ mm beside the line"):
            read(folder)


def test_positions_rounded_within_half_a_pixel_are_a_straight_line(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "s", [(0.4 * (z % 2), 0.1 * (z % 3), 3.0 * z) for z in range(7)])
    assert read_image(folder)[0].array[0, :, 0, 0].tolist() == [*range(7)]


def test_thin_slices_whose_positions_were_rounded_are_even(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "s", [(0, 0, round(-30 + 0.625 * z, 1)) for z in range(9)])
    volume, _ = read_image(folder)
    assert volume.array[0, :, 0, 0].tolist() == [*range(9)]
    assert volume.grid.spacing_zyx_mm == pytest.approx((0.625, 2, 1))


@pytest.mark.parametrize("further", [[3.0] * 20 + [3.12] * 20, [3.0 + 0.006 * z for z in range(40)]])
def test_distances_that_grow_little_by_little_are_refused(tmp_path: Path, further: list[float]) -> None:
    """Each is nearly the usual one, but slices would be drawn more than a millimeter from their places."""
    heights = np.concatenate([[0], np.cumsum(further)]).round(4)
    folder = dicom_series(tmp_path / "s", [(0, 0, float(z)) for z in heights])
    with pytest.raises(GeometryError, match=r"unevenly spaced.*Found 3 to 3\.\d+ mm, so that .* is [\d.]+ mm away"):
        read_image(folder)


def test_several_image_series_in_one_folder_are_listed(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "s", [(0, 0, 0.0), (0, 0, 1.0)], series="1.2.3.1111")
    dicom_series(folder, [(0, 0, 0.0), (0, 0, 1.0), (0, 0, 2.0)], series="1.2.3.2222")
    with pytest.raises(ImageError, match=r"2 DICOM image series.*series 1111, 2 slices.*series 2222, 3 slices"):
        read_image(folder)


def test_several_volumes_in_one_series_are_refused(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "s", [(0, 0, 0.0), (0, 0, 1.0), (0, 0, 0.0), (0, 0, 1.0)])
    with pytest.raises(ImageError, match="same position"):
        read_image(folder)


def test_fractional_slope_gives_float32(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "s", [(0, 0, 0.0), (0, 0, 1.0)], RescaleSlope="0.5", RescaleIntercept="0")
    volume, header = read_image(folder)
    assert volume.array.dtype == np.float32
    assert header.dtype == "float32"
    assert volume.array[0, :, 0, 0].tolist() == [512.0, 512.5]


# --- real files -------------------------------------------------------------------------------------------------------


def test_folder_with_an_image_series_and_a_segmentation_gives_the_image(data_root: Path) -> None:
    volume, _ = read_image(data_root / "format-samples" / "dicom_ct3slice")
    label, _ = read_label(data_root / "format-samples" / "dicom_ct3slice" / "liver_seg.nrrd")
    assert volume.array.shape == (1, 3, 512, 512)
    assert volume.grid.mismatch(label.grid) is None
    liver = volume.array[0][label.array[0] > 0]
    assert 0 < np.median(liver) < 150  # Hounsfield units of liver


def test_frames_of_enhanced_dicom_follow_their_positions(data_root: Path) -> None:
    path = data_root / "format-samples" / "dicom_enhanced" / "enh.dcm"
    data = pydicom.dcmread(path)
    heights = [f.PlanePositionSequence[0].ImagePositionPatient[2] for f in data.PerFrameFunctionalGroupsSequence]
    volume, _ = read_image(path)
    np.testing.assert_array_equal(volume.array[0], data.pixel_array[np.argsort(heights)])


def test_mgz_agrees_with_nibabel_and_is_written_back(data_root: Path, tmp_path: Path) -> None:
    path = data_root / "format-samples" / "mgz" / "wm.mgz"
    volume, header = read_image(path)
    source = nib.load(path)
    np.testing.assert_array_equal(volume.array[0], np.asarray(source.dataobj).T)
    write_label(tmp_path / "l.mgz", volume.array[0], header)
    np.testing.assert_allclose(nib.load(tmp_path / "l.mgz").affine, source.affine, atol=1e-4)
    write_label(tmp_path / "l.nii.gz", volume.array[0], header)
    np.testing.assert_allclose(nib.load(tmp_path / "l.nii.gz").affine, source.affine, atol=1e-4)


def test_label_with_opposite_y_direction_falls_on_the_ct_once_both_are_turned(data_root: Path) -> None:
    samples = data_root / "format-samples"
    ct, _ = read_image(samples / "dicom_ct_totalseg20")
    label, _ = read_label(samples / "dicom_ct_totalseg20_seg.nii.gz")
    assert ct.grid.mismatch(label.grid) is not None
    turned_ct, _ = reoriented(ct, "RAS")
    turned_label, _ = reoriented(label, "RAS")
    assert turned_ct.grid.mismatch(turned_label.grid) is None
    inside = turned_ct.array[turned_label.array > 0]
    assert np.mean(inside > -200) > 0.8  # organs, not air


def test_same_brain_as_nifti_and_nrrd_reads_the_same(data_root: Path) -> None:
    samples = data_root / "format-samples"
    one, _ = read_image(samples / "nifti" / "FLAIR.nii.gz")
    two, _ = read_image(samples / "nrrd" / "FLAIR.nrrd")
    np.testing.assert_array_equal(one.array, two.array)
    assert one.grid.mismatch(two.grid) is None


def test_turning_needs_no_copy() -> None:
    from rfmedsam2.geometry import Grid

    volume = Volume(array=ARRAY[None], grid=Grid(shape_zyx=(2, 3, 4), spacing_zyx_mm=(3.0, 2.0, 1.0)))
    turned, _ = reoriented(volume, "RAS")
    assert np.shares_memory(turned.array, volume.array)
