"""Label maps in the formats of other programs, read back by those programs' libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree as ET

import highdicom as hd
import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from support.dicom_series import whole_series

from rfmedsam2.choices import LabelFormat
from rfmedsam2.errors import GeometryError, ImageError, MissingPackageError, UsageError
from rfmedsam2.geometry import Grid
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.exchange import dicom_segmentation
from rfmedsam2.store.exchange.codes import segments_of
from rfmedsam2.store.exchange.formats import (
    ENDINGS,
    LabelSource,
    exchange_path,
    require_exchangeable,
    turned_to,
    write_exchange,
)
from rfmedsam2.store.formats.image_header import NotLabelsError
from rfmedsam2.store.images import read_header, read_image, read_label

LABELS = LabelSet(names={"background": 0, "liver": 6, "left_kidney": 3, "a & b <c>": 300})


@pytest.fixture
def series(tmp_path: Path) -> Path:
    return whole_series(tmp_path / "series")


@pytest.fixture
def source(series: Path) -> LabelSource:
    """Planes 1 and 2 hold labels, plane 0 and 3 none."""
    labels = np.zeros((4, 9, 7), np.uint16)
    labels[1, 2:6, 1:4] = 6
    labels[1, 6:8, 4:6] = 3
    labels[2, 0:2, 0:3] = 6
    labels[2, 8, 6] = 300
    return LabelSource(
        labels_zyx=labels, header=read_header(series), segments=segments_of(LABELS, (0, 6)), series=series
    )


@pytest.fixture(params=["dicom-seg", "dicom-seg-labelmap"])
def dicom(request, source: LabelSource, tmp_path: Path) -> tuple[Path, bool]:
    path = exchange_path(tmp_path / "out", "a", request.param)
    write_exchange(path, source, format=request.param)
    return path, request.param == "dicom-seg-labelmap"


def test_choices_are_the_formats_that_are_written() -> None:
    assert get_args(LabelFormat) == tuple(ENDINGS)


@pytest.mark.parametrize("format", ENDINGS)
def test_every_format_is_read_again_to_the_voxel_in_its_place(source, tmp_path, format) -> None:
    path = exchange_path(tmp_path / "out", "a", format)
    write_exchange(path, source, format=format)
    labels, header = read_label(path)
    np.testing.assert_array_equal(labels.array[0], source.labels_zyx)
    assert source.header.grid.mismatch(header.grid) is None
    assert read_header(path).grid == header.grid
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_nifti_has_a_label_table_for_workbench(source, tmp_path) -> None:
    write_exchange(tmp_path / "a.nii.gz", source, format="nifti")
    image = nib.load(tmp_path / "a.nii.gz")
    (extension,) = image.header.extensions
    assert extension.get_code() == 30
    rows = ET.fromstring(extension.content.rstrip(b"\0")).iter("Label")
    table = {int(row.get("Key")): (row.text, round(255 * float(row.get("Red")))) for row in rows}
    assert table[6] == ("liver", 221)
    assert table[300][0] == "a & b <c>"
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, source.labels_zyx)


@pytest.mark.parametrize("format", ["nrrd", "mha"])
def test_nrrd_and_mha_hold_the_labels_as_json(source, tmp_path, format) -> None:
    path = exchange_path(tmp_path, "a", format)
    write_exchange(path, source, format=format)
    image = sitk.ReadImage(str(path))
    rows = json.loads(image.GetMetaData("labels"))
    code = {"scheme": "SCT", "value": "64033007", "meaning": "Kidney"}
    assert rows[0] == {"value": 3, "name": "left_kidney", "color": [185, 102, 83], "code": code, "side": "Left"}
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), source.labels_zyx)


def test_slicers_fields_by_pynrrd(source, tmp_path) -> None:
    write_exchange(tmp_path / "a.seg.nrrd", source, format="seg.nrrd")
    array, fields = nrrd.read(str(tmp_path / "a.seg.nrrd"))
    np.testing.assert_array_equal(array.T, source.labels_zyx)
    assert (fields["Segment0_Name"], fields["Segment0_LabelValue"], fields["Segment0_Layer"]) == (
        "left_kidney",
        "3",
        "0",
    )
    assert fields["Segment0_Color"].split() == ["0.72549", "0.4", "0.32549"]
    terms = "~SCT^91723000^Anatomical Structure~SCT^64033007^Kidney~SCT^7771000^Left~"
    assert terms in fields["Segment0_Tags"]
    assert fields["Segment0_Extent"] == "0 6 0 8 0 3"


def test_dicom_by_highdicom(source, dicom) -> None:
    path, labelmap = dicom
    seg = hd.seg.segread(path)
    assert seg.segmentation_type.value == ("LABELMAP" if labelmap else "BINARY")
    volume = seg.get_volume(combine_segments=True)
    numbers = [s.SegmentNumber for s in seg.SegmentSequence if s.SegmentNumber]
    expected = np.zeros_like(source.labels_zyx)
    for number, segment in zip(numbers, source.segments, strict=True):
        expected[source.labels_zyx == segment.value] = number
    # planes without labels are left out; highdicom begins with the last
    np.testing.assert_array_equal(volume.array, expected[2:0:-1])
    last = source.header.grid.affine_lps @ (0, 0, 2, 1)
    np.testing.assert_allclose(volume.affine[:3, 3], last[:3], atol=1e-3)
    np.testing.assert_allclose(volume.spacing, (2.5, 0.8, 0.7))
    first = next(v for v in seg.SegmentSequence if v.SegmentNumber)
    kind = first.SegmentedPropertyTypeCodeSequence[0]
    assert (first.SegmentLabel, kind.CodeValue, kind.CodeMeaning) == ("left_kidney", "64033007", "Kidney")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"


def test_dicom_refers_to_its_series(series, dicom) -> None:
    path, _ = dicom
    data = pydicom.dcmread(path)
    slices = {p: pydicom.dcmread(p) for p in series.iterdir()}
    (referenced,) = data.ReferencedSeriesSequence
    one = next(iter(slices.values()))
    assert (data.FrameOfReferenceUID, data.StudyInstanceUID) == (one.FrameOfReferenceUID, one.StudyInstanceUID)
    assert referenced.SeriesInstanceUID == one.SeriesInstanceUID
    uids = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
    assert uids == {s.SOPInstanceUID for s in slices.values()}
    by_place = {tuple(s.ImagePositionPatient): s.SOPInstanceUID for s in slices.values()}
    for frame in data.PerFrameFunctionalGroupsSequence:
        place = tuple(frame.PlanePositionSequence[0].ImagePositionPatient)
        derived = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert by_place[place] == derived


def test_empty_frames_are_kept_if_wanted(source, dicom, tmp_path) -> None:
    path, labelmap = dicom
    format = "dicom-seg-labelmap" if labelmap else "dicom-seg"
    write_exchange(tmp_path / "b.dcm", source, format=format, keep_empty=True)
    count = 1 if labelmap else 3
    assert pydicom.dcmread(tmp_path / "b.dcm").NumberOfFrames == 4 * count
    assert pydicom.dcmread(path).NumberOfFrames == (2 if labelmap else 4)
    np.testing.assert_array_equal(read_label(tmp_path / "b.dcm")[0].array[0], source.labels_zyx)


def without_grid(path: Path) -> None:
    data = pydicom.dcmread(path)
    for element in [e.tag for e in data if e.tag.group == 0x0071]:
        del data[element]
    data.save_as(path)


def test_a_file_of_another_program_gets_the_grid_of_a_series_beside_it(source, series, dicom) -> None:
    path, _ = dicom
    without_grid(path)
    np.testing.assert_array_equal(read_label(path)[0].array[0], source.labels_zyx[1:3])
    beside = path.rename(series / "z.dcm")
    labels, header = read_label(beside)
    np.testing.assert_array_equal(labels.array[0], source.labels_zyx)
    assert source.header.grid.mismatch(header.grid) is None


def test_overlapping_segments_are_refused(source, tmp_path) -> None:
    write_exchange(tmp_path / "a.dcm", source, format="dicom-seg")
    data = pydicom.dcmread(tmp_path / "a.dcm")
    for frame in data.PerFrameFunctionalGroupsSequence:
        frame.PlanePositionSequence = data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    bits = np.ones(data.NumberOfFrames * 63, np.uint8)
    packed = np.packbits(bits, bitorder="little").tobytes()
    data.PixelData = packed + bytes(len(packed) % 2)
    data.save_as(tmp_path / "a.dcm")
    with pytest.raises(NotLabelsError, match="overlaps another of 3 segments"):
        read_label(tmp_path / "a.dcm")


def test_a_segmentation_is_not_an_image(dicom) -> None:
    with pytest.raises(ImageError, match="read as a label map, not as an image"):
        read_image(dicom[0])


def test_maps_with_other_axes_are_turned_to_the_series() -> None:
    rng = np.random.default_rng(3)
    affine = np.array([[0.0, 0, 2, 5], [0.7, 0, 0, 6], [0, -0.8, 0, 7], [0, 0, 0, 1]])
    grid = Grid.from_affine_lps(affine, (3, 4, 5))
    array = rng.integers(0, 9, (3, 4, 5))
    flipped = affine.copy()
    flipped[:3, 3] += affine[:3, 0] * 4  # x runs backwards
    flipped[:3, 0] *= -1
    target = Grid.from_affine_lps(flipped[:, [2, 0, 1, 3]], (4, 5, 3))  # x, y, z are z, x, y
    turned = turned_to(array, grid, target)
    np.testing.assert_array_equal(turned, array[:, :, ::-1].transpose(1, 2, 0))
    moved = flipped.copy()
    moved[:3, 3] += 3
    assert turned_to(array, grid, Grid.from_affine_lps(moved, (3, 4, 5))) is None


def test_what_cannot_be_written_is_refused_in_sentences(source, series, tmp_path, monkeypatch) -> None:
    alone = LabelSource(labels_zyx=source.labels_zyx, header=source.header, segments=source.segments)
    with pytest.raises(UsageError, match="needs the DICOM series"):
        require_exchangeable(alone, ["nifti", "dicom-seg"])
    small = LabelSource(labels_zyx=source.labels_zyx[:2], header=source.header, segments=source.segments, series=series)
    with pytest.raises(GeometryError, match="not on the grid of its DICOM series"):
        write_exchange(tmp_path / "a.dcm", small, format="dicom-seg")
    for path in series.iterdir():
        data = pydicom.dcmread(path)
        del data.FrameOfReferenceUID
        data.save_as(path)
    with pytest.raises(ImageError, match="Found no FrameOfReferenceUID"):
        write_exchange(tmp_path / "a.dcm", source, format="dicom-seg")
    monkeypatch.setattr(dicom_segmentation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"rfmedsam2\[dicom\]"):
        write_exchange(tmp_path / "a.dcm", source, format="dicom-seg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["series"]
