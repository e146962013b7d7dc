"""MetaImage and NRRD headers in the spellings that their libraries allow, and what they leave unsaid."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from rfmedsam2.errors import GeometryError, ImageError
from rfmedsam2.store.formats.image_header import assumptions
from rfmedsam2.store.images import image_files, read_header, read_image

ARRAY = np.arange(60, dtype="<i2").reshape(3, 4, 5) - 9
_META = "ObjectType = Image\nNDims = 3\nDimSize = 5 4 3\nElementSpacing = .5 .75 2\nElementType = MET_SHORT\n"
_NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 5 4 3\nendian: little\n"
_PLACED = "space: left-posterior-superior\nspace directions: (.5,0,0) (0,.75,0) (0,0,2)\n"


def meta(
    path: Path, lines: str = "", voxels: bytes | None = None, *, head: str = _META, data: str = " = LOCAL"
) -> Path:
    path.write_bytes(f"{head}{lines}ElementDataFile{data}\n".encode() + (ARRAY.tobytes() if voxels is None else voxels))
    return path


def nrrd(path: Path, lines: str = "", *, head: str = _NRRD + _PLACED, packed: bool = False) -> Path:
    voxels = gzip.compress(ARRAY.tobytes()) if packed else ARRAY.tobytes()
    path.write_bytes(f"{head}encoding: {'gzip' if packed else 'raw'}\n{lines}\n".encode() + voxels)
    return path


def assert_read(path: Path) -> None:
    volume, header = read_image(path)
    np.testing.assert_array_equal(volume.array[0], ARRAY)
    assert header.grid.spacing_zyx_mm == (2, 0.75, 0.5)


@pytest.mark.parametrize("yes", ["True", "true", "T", "t", "1"])
def test_a_metaimage_field_is_true_by_its_first_letter(tmp_path: Path, yes: str) -> None:
    swapped = ARRAY.astype(">i2").tobytes()
    for field in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"):
        lines = f"{field} = {yes}\n"
        assert_read(meta(tmp_path / "a.mha", lines, swapped))
        assert_read(meta(tmp_path / "b.mha", f"{lines}CompressedData = {yes}\n", zlib.compress(swapped)))


@pytest.mark.parametrize("no", ["False", "F", "0"])
def test_a_metaimage_field_is_false_else(tmp_path: Path, no: str) -> None:
    words = " ".join(map(str, ARRAY.ravel())).encode()
    assert_read(meta(tmp_path / "a.mha", f"BinaryData = {no}\nCompressedData = {no}\n", words))


def test_a_colon_may_stand_for_the_equals_sign_of_metaimage(tmp_path: Path) -> None:
    lines = "CompressedData : True\nDistanceUnits : um\n"
    for data in (" : LOCAL", ": LOCAL"):
        head = _META.replace(" =", ":")
        path = meta(tmp_path / "a.mha", lines, zlib.compress(ARRAY.tobytes()), head=head, data=data)
        assert_read(path)
        assert read_header(path).ignored_unit == "um"
    (tmp_path / "b.raw").write_bytes(ARRAY.tobytes())
    path = meta(tmp_path / "b.mhd", voxels=b"", data=": b.raw")
    assert image_files(path) == [path, tmp_path / "b.raw"]
    assert_read(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spelling", [str, str.title, str.upper, lambda name: name.replace(" ", "")])
def test_names_of_nrrd_fields_have_any_case_and_need_no_blanks(tmp_path: Path, packed: bool, spelling) -> None:
    def spelled(text: str) -> str:
        fields = [line.split(": ", 1) for line in text.splitlines()]
        return "".join(f"{spelling(name)}: {value}\n" for name, value in fields)

    units = 'space units: "um" "um" "um"\n'
    head = "NRRD0004\n" + spelled(_NRRD.split("\n", 1)[1] + _PLACED)
    path = nrrd(tmp_path / "a.nrrd", spelled(units), head=head, packed=packed)
    assert_read(path)
    assert read_header(path).ignored_unit == "um"
    (tmp_path / "b.raw").write_bytes(gzip.compress(ARRAY.tobytes()) if packed else ARRAY.tobytes())
    lines = spelled(f"encoding: {'gzip' if packed else 'raw'}\ndata file: b.raw\n")
    (tmp_path / "b.nhdr").write_text(head + lines + "\n")  # a blank line, as before voxels
    assert_read(tmp_path / "b.nhdr")


@pytest.mark.parametrize("name", ["vö.raw", "v\udcf6.raw"])
def test_data_files_have_any_name(tmp_path: Path, name: str) -> None:
    """In UTF-8 or, with a byte that is not, in another encoding."""
    (tmp_path / name).write_bytes(ARRAY.tobytes())
    text = f"{_META}ElementDataFile = {name}\n", f"{_NRRD}{_PLACED}encoding: raw\ndata file: {name}\n"
    for path, header in zip((tmp_path / "a.mhd", tmp_path / "a.nhdr"), text, strict=True):
        path.write_bytes(header.encode(errors="surrogateescape"))
        assert image_files(path) == [path, tmp_path / name]
        assert_read(path)


@pytest.mark.parametrize(
    ("head", "known"),
    [
        (_NRRD + _PLACED, True),
        (_NRRD + "spacings: .5 .75 2\n", True),
        (_NRRD, False),
        (_NRRD + "spacings: .5 .75 nan\n", False),
        (_NRRD + "axis mins: 0 0 0\naxis maxs: 2 3 6\n", False),
        (_META, True),
        (_META.replace("Spacing", "Size"), True),
        (_META.replace("ElementSpacing = .5 .75 2\n", ""), False),
    ],
)
def test_a_header_without_spacing_is_known(tmp_path: Path, head: str, known: bool) -> None:
    path = nrrd(tmp_path / "a.nrrd", head=head) if head.startswith("NRRD") else meta(tmp_path / "a.mha", head=head)
    header = read_header(path)
    assert header.spacing_known == known
    assert list(assumptions(header)) == ([] if known else ["no-spacing"])


def test_channels_of_an_nrrd_have_no_spacing(tmp_path: Path) -> None:
    head = _NRRD.replace("dimension: 3\nsizes: 5 4 3", "dimension: 4\nsizes: 5 4 3 1\nkinds: domain domain domain list")
    assert read_header(nrrd(tmp_path / "a.nrrd", head=head + "spacings: .5 .75 2 nan\n")).spacing_known


def test_a_direction_whose_axes_are_not_of_length_1_is_refused(tmp_path: Path) -> None:
    """Else positions would be twice as far apart as the spacing says."""
    assert_read(meta(tmp_path / "a.mha", "TransformMatrix = 0.9999 0 0 0 1 0 0 0 1\n"))
    path = meta(tmp_path / "b.mha", "TransformMatrix = 2 0 0 0 2 0 0 0 2\n")
    for read in (read_image, read_header):
        with pytest.raises(GeometryError, match=r"not unit vectors.*b\.mha.*Found lengths 2, 2, 2"):
            read(path)


@pytest.mark.parametrize("kind", ["MET_LONG", "MET_ULONG"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_long_voxels_of_eight_bytes_are_not_read_as_twice_as_many(
    tmp_path: Path, kind: str, packed: bool, apart: bool
) -> None:
    """ITK's have four bytes everywhere; a program of a 64-bit system wrote what C calls long there."""
    path = tmp_path / ("a.mhd" if apart else "a.mha")
    head = _META.replace("MET_SHORT", kind) + ("CompressedData = True\n" if packed else "")
    for dtype in ("<i4", "<i8"):
        voxels = (ARRAY + 9).astype(dtype).tobytes()
        voxels = zlib.compress(voxels) if packed else voxels
        (tmp_path / "a.raw").write_bytes(voxels)
        meta(path, voxels=b"" if apart else voxels, head=head, data=" = a.raw" if apart else " = LOCAL")
        if dtype == "<i4":
            np.testing.assert_array_equal(read_image(path)[0].array[0], ARRAY + 9)
        else:
            with pytest.raises(ImageError, match=r"at least twice the voxels.*240 bytes. Found 480 bytes"):
                read_image(path)


@pytest.mark.parametrize("packed", [False, True])
def test_an_nrrd_of_twice_the_voxels_is_refused(tmp_path: Path, packed: bool) -> None:
    voxels = np.repeat(ARRAY.ravel(), 2).tobytes()
    path = nrrd(tmp_path / "a.nrrd", packed=packed)
    header = path.read_bytes().split(b"\n\n")[0] + b"\n\n"
    path.write_bytes(header + (gzip.compress(voxels) if packed else voxels))
    with pytest.raises(ImageError, match="at least twice the voxels"):
        read_image(path)
    some = ARRAY.tobytes() + b"\n"  # ends of lines after the voxels do no harm
    path.write_bytes(header + (gzip.compress(some) if packed else some))
    assert_read(path)


def test_headers_that_share_a_data_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(ARRAY.tobytes() + (ARRAY + 7).tobytes())
    for n in (0, 1):
        path = meta(tmp_path / "a.mhd", f"HeaderSize = {n * ARRAY.nbytes}\n", b"", data=" = a.raw")
        np.testing.assert_array_equal(read_image(path)[0].array[0], ARRAY + 7 * n)


@pytest.mark.parametrize("centers", ["cell", "node"])
def test_the_place_of_an_nrrd_with_axis_mins_is_itks(tmp_path: Path, centers: str) -> None:
    lines = f"spacings: .5 .75 2\ncenters: {' '.join([centers] * 3)}\naxis mins: 5 6 7\n"
    path = nrrd(tmp_path / "a.nrrd", lines, head=_NRRD)
    assert_read(path)
    expected = (5.25, 6.375, 8) if centers == "cell" else (5, 6, 7)
    assert read_header(path).grid.origin_xyz_mm == expected == sitk.ReadImage(str(path)).GetOrigin()
