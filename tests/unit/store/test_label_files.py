"""Label maps whose format disguises their values: palettes, Slicer's segmentations, scaled integers."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from rfmedsam2.errors import ImageError
from rfmedsam2.store.case_files import file_stem
from rfmedsam2.store.formats.image_header import NotLabelsError
from rfmedsam2.store.formats.label_values import segment_values
from rfmedsam2.store.images import read_image, read_label, write_label

PLANE = np.array([[0, 1, 2], [3, 4, 200]], dtype=np.uint8)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_labels_of_a_palette_image_are_its_indices(tmp_path: Path, ending: str) -> None:
    image = Image.fromarray(PLANE, "P")
    rng = np.random.default_rng(7)
    image.putpalette(rng.integers(0, 256, 768).tolist())
    image.save(tmp_path / f"a{ending}")
    label, header = read_label(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(label.array[0, 0], PLANE)
    write_label(tmp_path / f"b{ending}", label.array[0], header)
    np.testing.assert_array_equal(read_label(tmp_path / f"b{ending}")[0].array, label.array)


def test_a_palette_image_that_is_not_a_label_is_in_color(tmp_path: Path) -> None:
    image = Image.fromarray(PLANE, "P")
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0].array[:, 0, 0, 0], [10, 20, 30])


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_labels_of_one_bit_are_0_and_1(tmp_path: Path, ending: str) -> None:
    Image.fromarray(PLANE > 2).save(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(read_label(tmp_path / f"a{ending}")[0].array[0, 0], PLANE > 2)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_gray_labels_stay_as_they_are(tmp_path: Path, ending: str) -> None:
    Image.fromarray(PLANE).save(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(read_label(tmp_path / f"a{ending}")[0].array[0, 0], PLANE)


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_labels_of_few_bits_are_the_stored_values(tmp_path: Path, bits: int) -> None:
    """Readers scale them up to 255, for display."""
    labels = (np.arange(24).reshape(4, 6) % 2**bits).astype(np.uint8)
    few = (labels[..., None] >> np.arange(bits - 1, -1, -1)) & 1  # the highest bit first
    rows = [np.packbits(row.ravel()).tobytes() for row in few]
    write_png(tmp_path / "a.png", [b"\0" + row for row in rows], 6, bits)
    for meaning in (0, 1):
        write_tiff(tmp_path / f"{meaning}.tif", b"".join(rows), (4, 6), bits=bits, meaning=meaning)
    for name in ("a.png", "0.tif", "1.tif"):
        np.testing.assert_array_equal(read_label(tmp_path / name)[0].array[0, 0], labels)


def test_labels_of_one_bit_are_as_stored_where_0_is_white(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", b"\x50\xa0", (2, 4), bits=1, meaning=0)
    labels = [[0, 1, 0, 1], [1, 0, 1, 0]]
    np.testing.assert_array_equal(read_label(tmp_path / "a.tif")[0].array[0, 0], labels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0].array[0, 0], labels)


def test_palette_stacks_keep_all_planes(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(PLANE, n, 1), "P") for n in range(4)]
    for frame in frames:
        frame.putpalette(list(range(255, -1, -1)) * 3)
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    expected = np.stack([np.roll(PLANE, n, 1) for n in range(4)])
    np.testing.assert_array_equal(read_label(tmp_path / "a.tif")[0].array[0], expected)


def write_png(path: Path, rows: Sequence[bytes], width: int, bits: int) -> None:
    """A gray PNG."""
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(rows)),
        b"IEND": b"",
    }
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts.items())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def write_tiff(path: Path, data: bytes, size: tuple[int, int], *, bits: int, meaning: int) -> None:
    """A gray TIFF of one strip; meaning 0: 0 is white."""
    tags = {256: size[1], 257: size[0], 258: bits, 259: 1, 262: meaning, 273: 8, 277: 1, 278: size[0], 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))


# --- Slicer -----------------------------------------------------------------------------------------------------------


def slicer(path: Path, layers: np.ndarray, *segments: tuple[str, int | None, int | None]) -> Path:
    """A .seg.nrrd as 3D Slicer writes it; layers (L,Z,Y,X), segments (name, value, layer)."""
    several = len(layers) > 1
    image = sitk.GetImageFromArray(np.moveaxis(layers, 0, -1) if several else layers[0], isVector=several)
    image.SetSpacing((0.5, 0.75, 2))
    for number, (name, value, layer) in enumerate(segments):
        image.SetMetaData(f"Segment{number}_ID", f"Segment_{number}")
        image.SetMetaData(f"Segment{number}_Name", name)
        if value is not None:
            image.SetMetaData(f"Segment{number}_LabelValue", str(value))
        if layer is not None:
            image.SetMetaData(f"Segment{number}_Layer", str(layer))
    sitk.WriteImage(image, str(path), useCompression=True)
    return path


LAYERS = np.zeros((2, 4, 5, 6), np.uint8)
LAYERS[0, 1:3, 1:3] = 1
LAYERS[0, 3, 3] = 2
LAYERS[1, 0, 4] = 3


def test_a_slicer_segmentation_of_one_layer_is_a_label_map(tmp_path: Path) -> None:
    path = slicer(tmp_path / "a.seg.nrrd", LAYERS[:1], ("liver", 1, 0), ("spleen", 2, 0))
    label, header = read_label(path)
    np.testing.assert_array_equal(label.array[0], LAYERS[0])
    assert header.grid.spacing_zyx_mm == (2, 0.75, 0.5)


def test_layers_that_do_not_overlap_are_merged(tmp_path: Path) -> None:
    path = slicer(tmp_path / "a.seg.nrrd", LAYERS, ("liver", 1, 0), ("spleen", 2, 0), ("lesion", 3, 1))
    label, _ = read_label(path)
    np.testing.assert_array_equal(label.array[0], LAYERS.max(0))


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_the_header_that_slicer_itself_writes(tmp_path: Path, encoding: str) -> None:
    """Layers as the first axis of kind list; a header far longer than 64 kB, with colons in it."""
    segments = "".join(
        f"Segment{number}_Color:=0.5 0.7 0.4\nSegment{number}_ID:=Segment_{number}\n"
        f"Segment{number}_LabelValue:={number + 1}\nSegment{number}_Layer:={0 if number < 2 else 1}\n"
        f"Segment{number}_Name:=organ {number}\n"
        f"Segment{number}_Tags:=Segmentation.Status:inprogress|TerminologyEntry: Tissue{'^' * 700}|\n"
        for number in range(120)
    )
    header = (
        "NRRD0004\n# Complete NRRD file format specification at:\n# http://teem.sourceforge.net/nrrd/format.html\n"
        "type: unsigned char\ndimension: 4\nspace: left-posterior-superior\nsizes: 2 6 5 4\n"
        "space directions: none (0.5,0,0) (0,0.75,0) (0,0,2)\nkinds: list domain domain domain\n"
        f"encoding: {encoding}\nspace origin: (1,2,3)\nmeasurement frame: (1,0,0) (0,1,0) (0,0,1)\n{segments}"
        "Segmentation_MasterRepresentation:=Binary labelmap\nSegmentation_ReferenceImageExtentOffset:=0 0 0\n\n"
    )
    voxels = np.ascontiguousarray(np.moveaxis(LAYERS, 0, -1)).tobytes()
    path = tmp_path / "a.seg.nrrd"
    path.write_bytes(header.encode() + (gzip.compress(voxels) if encoding == "gzip" else voxels))
    label, found = read_label(path)
    np.testing.assert_array_equal(label.array[0], LAYERS.max(0))
    assert found.grid.spacing_zyx_mm == (2, 0.75, 0.5)
    assert found.grid.origin_xyz_mm == (1, 2, 3)


def test_layers_beside_their_header_are_merged(tmp_path: Path) -> None:
    path = slicer(tmp_path / "a.seg.nhdr", LAYERS, ("liver", 1, 0), ("spleen", 2, 0), ("lesion", 3, 1))
    np.testing.assert_array_equal(read_label(path)[0].array[0], LAYERS.max(0))
    assert segment_values(path) == {"liver": 1, "spleen": 2, "lesion": 3}
    assert file_stem(path, None) == file_stem(path, ".nhdr") == "a"


def test_segments_that_overlap_are_named(tmp_path: Path) -> None:
    layers = LAYERS.copy()
    layers[1, 1, 1, :2] = 3
    path = slicer(tmp_path / "a.seg.nrrd", layers, ("liver", 1, 0), ("spleen", 2, 0), ("lesion", 3, 1))
    with pytest.raises(
        NotLabelsError, match=r"3D Slicer is not one label map.*liver and lesion that overlap in 2 voxels"
    ):
        read_label(path)


def test_segments_of_one_value_are_named(tmp_path: Path) -> None:
    path = slicer(tmp_path / "a.seg.nrrd", np.minimum(LAYERS, 1), ("liver", 1, 0), ("lesion", 1, 1))
    with pytest.raises(NotLabelsError, match=r"liver and lesion, which both have the value 1"):
        read_label(path)
    path = slicer(tmp_path / "b.seg.nrrd", np.minimum(LAYERS, 1), ("liver", None, None), ("lesion", None, None))
    with pytest.raises(NotLabelsError, match=r"liver and lesion"):  # as Slicer wrote them before 4.11
        read_label(path)


def test_channels_that_are_not_segments_are_not_a_label_map(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="several channels"):
        read_label(slicer(tmp_path / "a.nrrd", LAYERS))


def test_the_id_of_a_slicer_segmentation_lacks_seg() -> None:
    assert file_stem(Path("case1.seg.nrrd"), ".nrrd") == "case1"
    assert file_stem(Path("case1.seg.nrrd"), None) == "case1"
    assert file_stem(Path("case1.nrrd"), ".nrrd") == "case1"
    assert file_stem(Path("a.seg.nii.gz"), ".nii.gz") == "a.seg"


# --- scaled integers --------------------------------------------------------------------------------------------------


def scaled_by_nibabel(path: Path, labels: np.ndarray, dtype: str) -> Path:
    """What nibabel makes of labels as floats, saved with the header of integers: multiples of a slope."""
    image = nib.Nifti1Image(labels.astype(np.float64), np.eye(4))
    image.set_data_dtype(dtype)
    nib.save(image, path)
    assert nib.load(path).dataobj.slope != 1
    return path


@pytest.mark.parametrize(
    ("highest", "dtype"), [(1, "uint8"), (5, "uint8"), (117, "uint8"), (2035, "int16"), (60000, "uint16")]
)
def test_labels_that_nibabel_scaled_are_restored(tmp_path: Path, highest: int, dtype: str) -> None:
    labels = np.random.default_rng(7).integers(0, highest + 1, (6, 7, 8))
    labels[0, 0, 0] = highest
    labels[0, 0, 1] = 0
    path = scaled_by_nibabel(tmp_path / "a.nii.gz", labels, dtype)
    np.testing.assert_array_equal(read_label(path)[0].array[0], labels.T)


def test_labels_that_scaling_has_mixed_up_are_refused_with_the_slope(tmp_path: Path) -> None:
    labels = np.arange(400).reshape(4, 10, 10)
    path = scaled_by_nibabel(tmp_path / "a.nii.gz", labels, "uint8")
    with pytest.raises(NotLabelsError, match=r"multiplies stored values by 1\.56471 \(scl_slope\)"):
        read_label(path)


def test_labels_that_scaling_may_have_made_background_are_refused(tmp_path: Path) -> None:
    """Of 0, 1 and 1000 in 8 bits nibabel keeps 0 and 1000, which look like labels."""
    labels = np.array([0, 1, 1000])[np.arange(60).reshape(3, 4, 5) % 3]
    with pytest.raises(NotLabelsError, match=r"may have lost small labels.*by 3\.92157 \(scl_slope\)"):
        read_label(scaled_by_nibabel(tmp_path / "a.nii.gz", labels, "uint8"))


def test_scaled_probabilities_are_not_labels(tmp_path: Path) -> None:
    values = np.random.default_rng(7).uniform(0, 1, (6, 7, 8))
    path = scaled_by_nibabel(tmp_path / "a.nii.gz", values, "uint8")
    with pytest.raises(NotLabelsError, match="scl_slope"):
        read_label(path)
