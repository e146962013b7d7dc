"""Which files an image consists of, what may be opened at all, and what is found out before anything is read."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from rfmedsam2.errors import DatasetError, GeometryError, ImageError, RecordError, UsageError
from rfmedsam2.pipeline.datasets.splits import read_splits
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.report import Evaluation
from rfmedsam2.store.case_files import Case, list_images
from rfmedsam2.store.formats.image_header import TruncatedImageError, grids_differ, header_of_lengths, require_memory
from rfmedsam2.store.images import digest_of, image_files, read_header, read_image, read_label, write_label
from rfmedsam2.store.input_discovery import find_cases
from rfmedsam2.system.atomic import read_record

ARRAY = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)  # z, y, x


def image_of(array: np.ndarray = ARRAY) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.75, 2.0))
    return image


# --- detached headers -------------------------------------------------------------------------------------------------


def detached(folder: Path, kind: str) -> list[Path]:
    """An image whose voxels are in other files: header first, then the data files."""
    planes = [folder / f"slice{n:03d}.raw" for n in (1, 2, 3)]
    if kind == "nhdr pattern down":  # the last plane has the smallest number
        planes.reverse()
    if kind in ("mhd", "nhdr", "nhdr gzip"):
        path = folder / f"a.{kind.split()[0]}"
        sitk.WriteImage(image_of(), str(path), useCompression="gzip" in kind)
        (data,) = (file for file in folder.iterdir() if file != path)
        return [path, data]
    for plane, values in zip(planes, ARRAY, strict=True):
        plane.write_bytes(values.tobytes())
    names = "\n".join(plane.name for plane in planes)
    meta = "ObjectType = Image\nNDims = 3\nDimSize = 5 4 3\nElementSpacing = 0.5 0.75 2\nElementType = MET_UCHAR\n"
    nrrd = (
        "NRRD0005\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: 5 4 3\nencoding: raw\n"
        "space directions: (0.5,0,0) (0,0.75,0) (0,0,2)\nkinds: domain domain domain\n"
    )
    text = {
        "mhd list": meta + f"ElementDataFile = LIST\n{names}\n",
        "mhd pattern": meta + "ElementDataFile = slice%03d.raw 1 3 1\n",
        "nhdr list": nrrd + f"data file: LIST\n{names}\n",
        "nhdr pattern": nrrd + "data file: slice%03d.raw 1 3 1\n",
        "nhdr pattern down": nrrd + "data file: slice%03d.raw 3 1 -1\n",
    }[kind]
    path = folder / f"a.{kind.split()[0]}"
    path.write_text(text)
    return [path, *planes]


KINDS = ["mhd", "nhdr", "nhdr gzip", "mhd list", "mhd pattern", "nhdr list", "nhdr pattern", "nhdr pattern down"]


@pytest.mark.parametrize("kind", KINDS)
def test_data_files_belong_to_the_image_and_its_digest(tmp_path: Path, kind: str) -> None:
    files = detached(tmp_path, kind)
    assert image_files(files[0]) == files
    volume, header = read_image(files[0])
    np.testing.assert_array_equal(volume.array[0], ARRAY)
    assert header.grid.spacing_zyx_mm == (2, 0.75, 0.5)
    before = digest_of([files[0]])
    for file in files[1:]:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert digest_of([files[0]]) != before
        content[-1] ^= 1
        file.write_bytes(content)
    assert digest_of([files[0]]) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_data_file_is_named(tmp_path: Path, kind: str) -> None:
    files = detached(tmp_path, kind)
    files[-1].unlink()
    for read in (read_image, lambda path: digest_of([path])):
        with pytest.raises(ImageError, match=files[-1].name):
            read(files[0])


def test_files_of_an_image_with_voxels_inside(tmp_path: Path) -> None:
    for name in ("a.mha", "a.nrrd", "a.nii.gz", "a.png"):
        sitk.WriteImage(image_of(ARRAY[0]) if name == "a.png" else image_of(), str(tmp_path / name))
        assert image_files(tmp_path / name) == [tmp_path / name]
    assert digest_of([tmp_path / "a.mha"]) == hashlib.sha256((tmp_path / "a.mha").read_bytes()).digest()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["mhd list", "mhd pattern"])
def test_a_list_of_too_few_or_too_many_planes_is_refused(tmp_path: Path, kind: str, count: int) -> None:
    """ITK leaves the planes that are missing undefined."""
    files = detached(tmp_path, kind)
    (tmp_path / "slice004.raw").write_bytes(bytes(20))
    text = files[0].read_text()
    if kind == "mhd pattern":
        files[0].write_text(text.replace("1 3 1", f"1 {count} 1"))
    else:
        names = [f"slice{n:03d}.raw" for n in range(1, count + 1)]
        files[0].write_text(text.split("LIST")[0] + "LIST\n" + "\n".join(names) + "\n")
    with pytest.raises(TruncatedImageError, match=rf"{count} data files for 5 x 4 x 3"):
        read_image(files[0])


@pytest.mark.parametrize("kind", ["mhd", "mhd list", "mhd pattern"])
def test_a_data_file_that_is_too_short_is_named(tmp_path: Path, kind: str) -> None:
    files = detached(tmp_path, kind)
    files[-1].write_bytes(files[-1].read_bytes()[:-3])
    with pytest.raises(TruncatedImageError, match=rf"{files[-1].name}.*bytes of voxels"):
        read_image(files[0])


def test_a_list_of_one_volume_is_read(tmp_path: Path) -> None:
    """ITK returns undefined voxels."""
    path, data = detached(tmp_path, "mhd")
    path.write_text(path.read_text().replace(data.name, f"LIST 3\n{data.name}"))
    np.testing.assert_array_equal(read_image(path)[0].array[0], ARRAY)


def test_a_pattern_without_end_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.mhd").write_text("NDims = 3\nElementDataFile = s%d.raw 1 999999999 1\n")
    with pytest.raises(ImageError, match="too many data files"):
        image_files(tmp_path / "a.mhd")


@pytest.mark.parametrize(("unit", "found"), [("mm", None), ("um", "um"), ("cm", "cm"), (None, None)])
def test_a_unit_that_itk_does_not_convert_is_known(tmp_path: Path, unit: str | None, found: str | None) -> None:
    for kind in ("mhd list", "nhdr list"):
        path = detached(tmp_path, kind)[0]
        text = path.read_text()
        if unit is not None and kind.startswith("mhd"):
            path.write_text(f"DistanceUnits = {unit}\n{text}")
        elif unit is not None:
            path.write_text(text.replace("kinds:", f'space units: "{unit}" "{unit}" "{unit}"\nkinds:'))
        header = read_header(path)
        assert header.ignored_unit == found
        assert header.grid.spacing_zyx_mm == (2, 0.75, 0.5)


# --- TIFF stacks ------------------------------------------------------------------------------------------------------


def stack(path: Path, array: np.ndarray = ARRAY) -> Path:
    planes = [Image.fromarray(plane) for plane in array]
    path.parent.mkdir(exist_ok=True, parents=True)
    planes[0].save(path, save_all=True, append_images=planes[1:])
    return path


def spacing(path: Path, values: object = (2.5, 0.8, 0.7)) -> Path:
    path.write_text(json.dumps({"spacing": values, "note": "other fields do not matter"}))
    return path


def test_the_spacing_of_a_stack_is_in_nnunets_json(tmp_path: Path) -> None:
    image, label = stack(tmp_path / "images" / "c_0000.tif"), stack(tmp_path / "labels" / "c.tif")
    assert read_header(image).grid.spacing_zyx_mm == (1, 1, 1)  # as nnU-Net without the file
    assert not read_header(image).spacing_known
    beside = spacing(tmp_path / "images" / "c.json")
    assert grids_differ(read_header(image), read_header(label)) is None  # the label does not say
    spacing(tmp_path / "labels" / "c.json", (5, 0.8, 0.7))
    assert "spacing" in str(grids_differ(read_header(image), read_header(label)))
    spacing(tmp_path / "labels" / "c.json")
    volume, header = read_image(image)
    np.testing.assert_array_equal(volume.array[0], ARRAY)
    assert header.grid.spacing_zyx_mm == (2.5, 0.8, 0.7)
    assert grids_differ(header, read_label(label)[1]) is None
    assert image_files(image) == [image, beside]
    before = digest_of([image])
    spacing(beside, (3, 1, 1))
    assert digest_of([image]) != before
    assert read_header(image).grid.spacing_zyx_mm == (3, 1, 1)


def test_two_files_with_different_spacings_of_a_stack_are_refused(tmp_path: Path) -> None:
    """nnU-Net reads CASE.json alone."""
    image = stack(tmp_path / "c_0000.tif")
    own, of_case = spacing(tmp_path / "c_0000.json"), spacing(tmp_path / "c.json")
    assert read_header(image).grid.spacing_zyx_mm == (2.5, 0.8, 0.7)
    spacing(of_case, (5, 0.8, 0.7))
    with pytest.raises(GeometryError, match=r"different spacings.*c_0000\.tif.*5.0, 0.8, 0.7\) in c\.json"):
        read_header(image)
    own.unlink()
    assert read_header(image).grid.spacing_zyx_mm == (5, 0.8, 0.7)


def test_labels_of_a_stack_are_written_with_their_spacing(tmp_path: Path) -> None:
    spacing(tmp_path / "c_0000.json")
    header = read_header(stack(tmp_path / "c_0000.tif"))
    write_label(tmp_path / "out" / "c.tif", ARRAY % 3, header)
    assert json.loads((tmp_path / "out" / "c.json").read_text())["spacing"] == [2.5, 0.8, 0.7]
    label, found = read_label(tmp_path / "out" / "c.tif")
    np.testing.assert_array_equal(label.array[0], ARRAY % 3)
    assert found.grid == header.grid


def test_a_json_that_is_something_else_is_not_overwritten(tmp_path: Path) -> None:
    header = read_header(stack(tmp_path / "c_0000.tif"))
    (tmp_path / "d.json").write_text('{"notes": "by hand"}')
    with pytest.raises(UsageError, match=r"holds something else.*d\.json"):
        write_label(tmp_path / "d.tif", ARRAY % 3, header)
    assert (tmp_path / "d.json").read_text() == '{"notes": "by hand"}'
    assert not (tmp_path / "d.tif").exists()


@pytest.mark.parametrize("values", [(1, 2), (1, 0, 1), (1, -1, 1), "1 1 1", None, (1, float("nan"), 1)])
def test_a_json_without_three_spacings_is_a_sentence(tmp_path: Path, values: object) -> None:
    spacing(tmp_path / "c.json", values)
    with pytest.raises((RecordError, GeometryError), match=r"c\.json"):
        read_header(stack(tmp_path / "c_0000.tif"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # Pillow warns before it fails
def test_a_damaged_stack_ends_in_a_sentence_or_in_an_image_that_agrees_with_its_header(tmp_path: Path) -> None:
    """ITK hung on some of these."""
    path = stack(tmp_path / "c_0000.tif")
    content, rng, refused = path.read_bytes(), np.random.default_rng(7), 0
    for _ in range(150):
        broken = bytearray(content)
        for position in rng.integers(0, len(broken), rng.integers(1, 5)):
            broken[position] = rng.integers(256)
        path.write_bytes(broken)
        try:
            volume, header = read_image(path)
            assert volume.array.shape == (header.channels, *header.grid.shape_zyx)
        except (ImageError, GeometryError):
            refused += 1
    assert 20 < refused < 140


def test_a_single_plane_needs_no_spacing(tmp_path: Path) -> None:
    Image.fromarray(ARRAY[0]).save(tmp_path / "c_0000.tif")
    header = read_header(tmp_path / "c_0000.tif")
    assert header.grid.spacing_zyx_mm == (999, 1, 1)
    write_label(tmp_path / "out" / "c.tif", ARRAY[:1] % 3, header)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["c.tif"]


@pytest.mark.parametrize("kind", ["gray", "colors of 16 bits"])
def test_a_single_plane_has_the_spacing_of_its_json(tmp_path: Path, kind: str) -> None:
    """Colors of 16 bits are read by ITK, others by Pillow."""
    image, label = tmp_path / "images" / "c_0000.tif", tmp_path / "labels" / "c.tif"
    image.parent.mkdir()
    if kind == "gray":
        Image.fromarray(ARRAY[0]).save(image)
    else:
        colors = np.stack([ARRAY[0].astype(np.uint16) * 300] * 3, -1)
        sitk.WriteImage(sitk.GetImageFromArray(colors, isVector=True), str(image))
    stack(label, ARRAY[:1] % 3)
    beside = spacing(tmp_path / "images" / "c.json")
    header = read_header(image)
    assert header.grid.spacing_zyx_mm == read_image(image)[0].grid.spacing_zyx_mm == (2.5, 0.8, 0.7)
    silent = read_header(label)
    for one, other in ((header, silent), (silent, header)):
        assert grids_differ(one, other) is None  # the label does not say
        assert header_of_lengths(one, other) is header
    spacing(tmp_path / "labels" / "c.json", (2.5, 0.8, 0.9))
    assert "spacing" in str(grids_differ(header, read_header(label)))
    write_label(tmp_path / "out" / "c.tif", ARRAY[:1] % 3, header)
    written, found = read_label(tmp_path / "out" / "c.tif")
    np.testing.assert_array_equal(written.array[0], ARRAY[:1] % 3)
    assert found.grid == header.grid
    beside.write_text('{"version": "5.4", "shapes": [{"label": "a", "points": [[1, 2], [3, 4]]}]}')  # of LabelMe
    assert read_header(image).grid.spacing_zyx_mm == (999, 1, 1)


# --- what cannot be read, before it is read ---------------------------------------------------------------------------


def special(folder: Path, kind: str, name: str) -> Path:
    """A path that is neither a file nor a folder."""
    path = folder / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mgz", "a.png", "a.tif", "a.dcm", "a"])
def test_what_is_not_a_file_is_not_opened(
    tmp_path: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = special(Path(), kind, name)
    for read in (read_header, read_image, read_label, lambda p: digest_of([p])):
        with pytest.raises(ImageError, match="a pipe, a socket or a device"):
            read(path)
    with pytest.raises(ImageError, match="a pipe, a socket or a device"):
        find_cases(path, channels=1, file_ending=None)


def test_a_pipe_among_slices_or_beside_a_header_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    special(tmp_path / "series", "pipe", "1.dcm")
    assert list_images(tmp_path, None) == []
    files = detached(tmp_path, "mhd list")
    files[1].unlink()
    special(tmp_path, "pipe", files[1].name)
    with pytest.raises(ImageError, match=rf"a device, not an ordinary file\): .*{files[1].name}"):
        read_image(files[0])
    special(tmp_path, "pipe", "dataset.json")
    with pytest.raises(RecordError, match="a pipe, a socket or a device"):
        read_record(tmp_path / "dataset.json", DatasetJson)
    special(tmp_path, "device", "splits_final.json")
    with pytest.raises(RecordError, match="a pipe, a socket or a device"):
        read_splits(tmp_path / "splits_final.json")
    special(tmp_path, "pipe", "list.txt")
    with pytest.raises(ImageError, match="pipe"):
        find_cases(tmp_path / "list.txt", channels=1, file_ending=None)


def test_a_header_that_promises_more_than_its_file_holds_is_refused_by_the_header_alone(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz"):
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / name)
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[42:48] = np.array([3000, 3000, 3], "<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(TruncatedImageError, match="a header that promises 27000000 bytes"):
        read_header(tmp_path / "a.nii")
    assert read_header(tmp_path / "a.nii.gz").grid.shape_zyx == (4, 4, 4)


def sparse(path: Path) -> Path:
    """An image of 20000 x 20000 x 20000 bytes, none of them on the disk."""
    n = 20000
    meta = f"NDims = 3\nDimSize = {n} {n} {n}\nElementSpacing = 1 1 1\nElementType = MET_UCHAR\nElementDataFile = "
    nrrd = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: {n} {n} {n}\nspacings: 1 1 1\nencoding: raw\n"
    nifti = nib.Nifti1Header(endianness="<")
    nifti.set_data_shape((n, n, n))
    nifti["vox_offset"], nifti["magic"], nifti["datatype"], nifti["bitpix"] = 352, b"n+1", 2, 8
    mgh = struct.pack(">7i", 1, n, n, n, 1, 0, 0) + struct.pack(
        ">h15f", 1, 1, 1, 1, -1, 0, 0, 0, 0, -1, 0, 1, 0, 0, 0, 0
    )
    head, data = {
        ".nii": (nifti.binaryblock + bytes(4), path),
        ".mha": (f"{meta}LOCAL\n".encode(), path),
        ".mhd": (f"{meta}a.raw\n".encode(), path.with_name("a.raw")),
        ".nrrd": (f"{nrrd}\n".encode(), path),
        ".nhdr": (f"{nrrd}data file: a.raw\n".encode(), path.with_name("a.raw")),
        ".mgh": (mgh.ljust(284, b"\0"), path),
    }[path.suffix]
    path.write_bytes(head)
    data.touch()
    os.truncate(data, n**3 + (len(head) if data == path else 0))
    return path


def test_a_record_or_list_beyond_reason_is_refused_before_it_is_read(tmp_path: Path) -> None:
    size = r"its 25\.1 GiB are more than such a file can have"
    for name in ("metrics.json", "splits_final.json", "list.csv"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 27 * 10**9)
    with pytest.raises(RecordError, match=rf"The evaluation file cannot be read \({size}\): .*metrics\.json"):
        Evaluation.load(tmp_path / "metrics.json")
    with pytest.raises(RecordError, match=rf"The splits file cannot be read \({size}\): .*splits_final\.json"):
        read_splits(tmp_path / "splits_final.json", ["a"])
    with pytest.raises(DatasetError, match=rf"The list of inputs cannot be read \({size}\): .*list\.csv"):
        find_cases(tmp_path / "list.csv", channels=1, file_ending=None)


@pytest.mark.parametrize("ending", [".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".mgh"])
def test_voxels_that_do_not_fit_into_memory_are_refused_before_the_file_is_read(tmp_path: Path, ending: str) -> None:
    path = sparse(tmp_path / f"a{ending}")
    with pytest.raises(ImageError, match=r"not enough memory.*7450\.6 GiB of voxels"):
        require_memory(path, read_header(path))
    with pytest.raises(ImageError, match=r"not enough memory"):
        read_image(path)
    assert find_cases(path, channels=1, file_ending=None)[0] == Case(id="a", images=(path,))


def test_a_gray_png_with_a_channel_of_transparency_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "gray.png"
    Image.fromarray(np.arange(63, dtype=np.uint8).reshape(9, 7)).convert("LA").save(path)
    with pytest.raises(ImageError, match=r"kind of pixels is not supported.*without transparency"):
        read_image(path)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("", None),
        ("ElementToIntensityFunctionSlope = 1\nElementToIntensityFunctionOffset = 0\n", None),
        ("ElementToIntensityFunctionSlope = 2\nElementToIntensityFunctionOffset = -1024\n", "slope 2, offset -1024"),
    ],
)
def test_an_intensity_function_that_itk_does_not_apply_is_known(tmp_path: Path, lines: str, found: str | None) -> None:
    path = detached(tmp_path, "mhd")[0]
    path.write_text(lines + path.read_text())
    assert read_header(path).ignored_scaling == found
    np.testing.assert_array_equal(read_image(path)[0].array[0], ARRAY)
