"""Images as some programs write them: MetaImage with its voxels in words, PNG with a transparent color, odd NIfTI."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from tifffile import TiffFile, TiffWriter, imwrite

from rfmedsam2.errors import ImageError
from rfmedsam2.store.formats.image_header import NotLabelsError, TruncatedImageError
from rfmedsam2.store.images import read_header, read_image, read_label, write_label

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
    ("second", "found"),
    [
        (COLORS[:3, :3, 0], "page 2 of 2, 3 x 3 pixels, uint8"),
        (COLORS, "6 x 5 pixels of 3 channels"),
        (COLORS[..., 0].astype(np.uint16) * 9, "page 2 of 2, 6 x 5 pixels, uint16"),
    ],
)
def test_pages_of_another_size_are_not_planes(tmp_path: Path, second: np.ndarray, found: str) -> None:
    first = Image.fromarray(COLORS[..., 0])
    first.save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(second)])
    with pytest.raises(
        ImageError, match=rf"not the planes of one volume.*first, 6 x 5 pixels, uint8. Found .*{found}"
    ) as caught:
        read_image(tmp_path / "a.tif")
    assert not isinstance(caught.value, TruncatedImageError)


def write_tiff(path: Path, pixels: np.ndarray, *, meaning: int, in_planes: bool = False, tiled: bool = False) -> Path:
    """A TIFF of one strip, or of one tile of 16 x 16, from (Y, X, C) or, in planes, (C, Y, X)."""
    shape = np.moveaxis(pixels, 0, -1).shape if in_planes else pixels.shape
    bytes_each, kind = pixels.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    data, parts = np.ascontiguousarray(pixels).tobytes(), shape[2] if in_planes else 1
    starts = [8 + n * (len(data) // parts) for n in range(parts)]
    where = {324: starts, 325: [len(data)], 322: [16], 323: [16]} if tiled else {273: starts, 278: [shape[0]]}
    where |= {} if tiled else {279: [len(data) // parts] * parts}
    tags = {256: [shape[1]], 257: [shape[0]], 258: [8 * bytes_each] * shape[2], 259: [1], 262: [meaning]}
    tags |= {277: [shape[2]], 284: [1 + in_planes], 339: [kind] * shape[2]} | where
    extra, entries, end = b"", b"", 8 + len(data)
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            extra, packed = extra + packed, struct.pack("<I", end + len(extra))
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    head = struct.pack("<2sHI", b"II", 42, end + len(extra))
    path.write_bytes(head + data + extra + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


@pytest.mark.parametrize("axes", [{"T": 2, "Z": 3}, {"Z": 3, "C": 2}, {"C": 2}])
@pytest.mark.parametrize("program", ["imagej", "ome", "tifffile"])
def test_channels_and_moments_are_no_planes(tmp_path: Path, program: str, axes: dict[str, int]) -> None:
    def save(name: str, pixels: np.ndarray, letters: str) -> Path:
        more = {} if program == "tifffile" else {program: True, "metadata": {"axes": letters}}
        imwrite(tmp_path / name, pixels, photometric="rgb" if letters.endswith("S") else "minisblack", **more)
        return tmp_path / name

    shape = (*axes.values(), 8, 9)
    pixels = np.arange(math.prod(shape), dtype=np.uint16).reshape(shape)
    if program != "tifffile" or len(axes) > 1:  # tifffile itself writes lengths alone
        with pytest.raises(ImageError, match=r"not the planes of one volume.*one channel at one moment.*Found .* 2"):
            read_image(save("a.tif", pixels, "".join(axes) + "YX"))
    volume = pixels.reshape(-1, 8, 9)
    assert np.array_equal(read_image(save("b.tif", volume, "ZYX"))[0].array[0], volume)
    colors = np.stack([volume.astype(np.uint8)] * 3, -1)
    assert read_image(save("c.tif", colors, "ZYXS"))[0].array.shape == (3, *volume.shape)


def test_planes_that_are_noted_as_channels_are_planes_where_their_spacing_is_given(tmp_path: Path) -> None:
    """tifffile notes the planes of a volume for ImageJ as channels, unless it is given their axes."""
    planes = np.arange(6 * 8 * 9, dtype=np.uint16).reshape(6, 8, 9)
    imwrite(tmp_path / "c_0000.tif", planes, imagej=True)
    with pytest.raises(ImageError, match=r'Found channels 6.*if these are planes, write {"spacing".*to c\.json'):
        read_image(tmp_path / "c_0000.tif")
    (tmp_path / "c.json").write_text('{"spacing": [2.5, 0.8, 0.7]}')
    volume, _ = read_image(tmp_path / "c_0000.tif")
    assert np.array_equal(volume.array[0], planes)
    assert volume.grid.spacing_zyx_mm == (2.5, 0.8, 0.7)


_OME = '<OME><Image ID="Image:0"><Pixels SizeX="9" SizeY="8" SizeZ="{}" SizeC="1" SizeT="1"/></Image></OME>'


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, {"truncate": True}),
        (1, {"imagej": True, "truncate": True, "metadata": {"axes": "ZYX"}}),
        (3, {"description": _OME.format(7), "metadata": None}),
        (3, {"description": "ImageJ=1.53t\nimages=7\nslices=7\n", "metadata": None}),
    ],
)
def test_pages_that_the_description_counts_but_the_file_lacks_are_missed(
    tmp_path: Path, count: int, options: dict[str, Any]
) -> None:
    """Stacks with one page for all planes, and files that are one of several, would be volumes of fewer planes."""
    stored = 3 if count == 3 else 7
    imwrite(tmp_path / "a.tif", np.ones((stored, 8, 9), np.uint8), photometric="minisblack", **options)
    with pytest.raises(ImageError, match=rf"another number of pages.*a\.tif.*Expected 7 pages.*Found {count}\."):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("text", ["ImageJ=1.53t\nmin=0\nmax=3\n", '{"shape": [64, 64]}', "a note", _OME.format(3)])
def test_descriptions_that_say_nothing_else_are_no_hindrance(tmp_path: Path, text: str) -> None:
    planes = np.arange(3 * 8 * 9, dtype=np.uint8).reshape(3, 8, 9)
    imwrite(tmp_path / "a.tif", planes, photometric="minisblack", description=text, metadata=None)
    assert np.array_equal(read_image(tmp_path / "a.tif")[0].array[0], planes)


@pytest.mark.parametrize("bits", [2, 4])
def test_labels_of_few_bits_are_the_stored_ones(tmp_path: Path, bits: int) -> None:
    """As tifffile and nnU-Net read them; Pillow stretches them to 8 bits, so that label 1 would be 85 or 17."""
    planes = (np.arange(3 * 8 * 9).reshape(3, 8, 9) % 2**bits).astype(np.uint8)
    for kind in ("minisblack", "miniswhite"):
        imwrite(tmp_path / f"{kind}.tif", planes, photometric=kind, bitspersample=bits)
        assert np.array_equal(read_label(tmp_path / f"{kind}.tif")[0].array[0], planes)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_values_of_a_tiff_are_the_stored_ones(tmp_path: Path, dtype: str, channels: int) -> None:
    """Pillow makes 8 bits of colors of 16, and shows low values white where the file asks for it."""
    pixels = (np.arange(5 * 6 * channels).reshape(5, 6, channels) * (500 if dtype == "uint16" else 2)).astype(dtype)
    for meaning in (0, 1) if channels == 1 else (2,):
        path = write_tiff(tmp_path / f"{meaning}.tif", pixels, meaning=meaning)
        volume, header = read_image(path)
        assert volume.array.dtype == header.dtype == read_header(path).dtype == dtype
        assert np.array_equal(volume.array[:, 0], np.moveaxis(pixels, -1, 0))


@pytest.mark.parametrize(
    ("pixels", "layout", "found"),
    [
        (np.ones((5, 6, 2), np.uint16), {"meaning": 1}, "2 channel.s. of integers of 16 bits"),
        (np.ones((5, 6, 1), np.float16), {"meaning": 1}, "1 channel.s. of floating-point numbers of 16 bits"),
        (np.ones((5, 6, 1), np.float64), {"meaning": 1}, "floating-point numbers of 64 bits"),
        (np.ones((3, 5, 6), np.uint16), {"meaning": 2, "in_planes": True}, "of 16 bits, in planes of one color"),
        (np.ones((4, 5, 6), np.uint16), {"meaning": 1, "in_planes": True}, "4 channel.s..*in planes of one color"),
        (np.ones((16, 16, 3), np.uint16), {"meaning": 2, "tiled": True}, "3 channel.s..*of 16 bits, in tiles"),
        (np.ones((5, 6, 3), np.uint8), {"meaning": 1}, "3 channel.s..*of 8 bits, in gray"),
        (np.ones((5, 6, 4), np.uint16), {"meaning": 1}, "4 channel.s..*of 16 bits, in gray"),
        (np.ones((5, 6, 4), np.uint8), {"meaning": 5}, "4 channel.s..*of 8 bits, in CMYK"),
        (np.ones((5, 6, 3), np.uint8), {"meaning": 6}, "3 channel.s..*of 8 bits, in YCbCr"),
        (np.ones((5, 6, 3), np.uint8), {"meaning": 8}, "3 channel.s..*of 8 bits, in CIELab"),
    ],
)
def test_kinds_of_tiff_that_no_reader_knows_are_sentences(
    tmp_path: Path, pixels: np.ndarray, layout: dict[str, Any], found: str
) -> None:
    """ITK reads halves as integers, leaves out channels of gray, and makes 8 bits or RGB of other colors."""
    path = write_tiff(tmp_path / "a.tif", pixels, **layout)
    for read in (read_header, read_image):
        with pytest.raises(
            ImageError, match=rf"This kind of TIFF is not supported.*{found}.*Save each channel"
        ) as caught:
            read(path)
        assert not isinstance(caught.value, TruncatedImageError)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_turned_tiff_is_refused(tmp_path: Path, orientation: int, dtype: str, channels: int) -> None:
    """Pillow and ITK turn what nnU-Net's reader takes as stored, and label maps do not say so."""
    extra = [(274, 3, 1, orientation, True)]
    pixels = np.arange(5 * 6 * channels).reshape(5, 6, channels).astype(dtype)
    pixels, meaning = (pixels[..., 0], "minisblack") if channels == 1 else (pixels, "rgb")
    imwrite(tmp_path / "a.tif", pixels, photometric=meaning, metadata=None, extratags=extra)
    for read in (read_header, read_image, read_label):
        with pytest.raises(ImageError, match=rf"not stored as they are shown.*Found orientation {orientation}"):
            read(tmp_path / "a.tif")


def test_planes_that_lie_in_one_page_are_not_left_out(tmp_path: Path) -> None:
    pixels = np.arange(2 * 16 * 16, dtype=np.uint8).reshape(2, 16, 16)
    imwrite(tmp_path / "a.tif", pixels, volumetric=True, tile=(2, 16, 16), photometric="minisblack", metadata=None)
    with pytest.raises(ImageError, match=r"not stored as they are shown.*Found 2 planes a page"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_colors_are_not_divided_by_their_transparency(tmp_path: Path, kind: int, dtype: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 6, 4)).astype(dtype)
    imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=[kind], metadata=None)
    assert np.array_equal(read_image(tmp_path / "a.tif")[0].array[:, 0], np.moveaxis(pixels, -1, 0))


@pytest.mark.parametrize("kind", ["gray 8", "gray 16", "color 8", "color 16"])
def test_values_of_a_png_are_not_shifted_to_the_bits_that_count(tmp_path: Path, kind: str) -> None:
    """The note sBIT (12 of 16 bits, say) makes ITK shift values, so that those of labels vanish."""
    color, bits = kind.split()
    pixels = np.arange(90).reshape(5, 6, 3).astype(f"uint{bits}") * (2 if bits == "8" else 700)
    pixels = pixels if color == "color" else pixels[..., 0]
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=color == "color"), str(tmp_path / "a.png"))
    plain = (tmp_path / "a.png").read_bytes()
    expected = read_image(tmp_path / "a.png")[0].array
    note = b"sBIT" + bytes([int(bits) - 3] * (3 if color == "color" else 1))
    chunk = struct.pack(">I", len(note) - 4) + note + struct.pack(">I", zlib.crc32(note))
    (tmp_path / "a.png").write_bytes(plain[:33] + chunk + plain[33:])  # behind the header
    if kind == "color 16":
        with pytest.raises(ImageError, match=r"colors of 16 bits, with fewer bits that count \(sBIT\)"):
            read_image(tmp_path / "a.png")
        return
    volume, header = read_image(tmp_path / "a.png")
    assert np.array_equal(volume.array, expected)
    assert header.dtype == volume.array.dtype == f"uint{bits}"


@pytest.mark.parametrize("shape", [(1, 2, 40000), (40000, 2, 2)])
def test_labels_of_a_long_axis_are_written_as_nifti_2(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """NIfTI-1 counts to 32767."""
    labels = np.arange(math.prod(shape)).reshape(shape).astype(np.uint8) % 3
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / "a.nrrd"))
    _, header = read_image(tmp_path / "a.nrrd")
    write_label(tmp_path / "b.nii.gz", labels, header)
    assert np.array_equal(read_label(tmp_path / "b.nii.gz")[0].array[0], labels)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "b.nii.gz").dataobj).T, labels)


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


@pytest.mark.parametrize("packed", [False, True])
def test_a_nifti_of_twice_the_voxels_is_refused(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    image = nib.Nifti1Image(ARRAY.astype(np.int16), np.eye(4))
    content = image.to_bytes()
    for more, read in ((b"\0" * 16, True), (bytes(ARRAY.astype(np.int16).nbytes), False)):
        path.write_bytes(gzip.compress(content + more) if packed else content + more)
        if read:
            assert np.array_equal(read_image(path)[0].array[0].T, ARRAY)
        else:
            with pytest.raises(ImageError, match=r"at least twice the voxels.*48 bytes. Found 96 bytes"):
                read_image(path)


def test_a_page_that_is_a_copy_is_not_a_plane(tmp_path: Path) -> None:
    planes = np.stack([COLORS[..., 0], COLORS[..., 1], COLORS[..., 2]])
    for last, name in ((0, "a.tif"), (2, "b.tif"), (1, "c.tif"), (1, "d.tif")):
        with TiffWriter(tmp_path / name) as file:
            for number, plane in enumerate(planes):
                file.write(plane, subfiletype=last if number == 2 else 0, metadata=None, contiguous=False)
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(read_image(tmp_path / name)[0].array[0], planes)
    with TiffFile(tmp_path / "d.tif", mode="r+") as file:
        file.pages[2].tags[254].overwrite(4)  # tifffile writes masks of one bit alone
    for name in ("c.tif", "d.tif"):
        with pytest.raises(ImageError, match=r"page 3 of 3, .*says that it is a smaller copy or a mask"):
            read_image(tmp_path / name)
