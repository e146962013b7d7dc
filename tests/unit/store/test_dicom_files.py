"""DICOM files as scanners and other programs write them: encodings, places of slices, and what is not an image."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    UltrasoundImageStorage,
)
from support.dicom_series import STORED, ct_slice, enhanced, frames, item, save, save_series

from rfmedsam2.errors import GeometryError, ImageError
from rfmedsam2.store.formats.dicom_files import is_dicom_file
from rfmedsam2.store.images import read_header, read_image, read_label
from rfmedsam2.store.input_discovery import find_cases

HU = STORED.astype(np.int64) - 1024


def read(path: Path) -> np.ndarray:
    """Voxels (Z,Y,X) of a series that lies where `ct_slice` says."""
    volume, header = read_image(path)
    assert volume.grid.spacing_zyx_mm == pytest.approx((2.5, 0.8, 0.7))
    assert volume.grid.origin_xyz_mm == pytest.approx((-10, -20, 30))
    assert np.allclose(volume.grid.direction, np.eye(3))
    assert read_header(path) == header
    return volume.array[0]


# --- without preamble -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["implicit", "explicit", "big endian", "group length", "meta"])
def test_files_without_preamble(tmp_path: Path, form: str) -> None:
    for z in range(4):
        data = ct_slice(z)
        path = tmp_path / "s" / f"IM{z}"
        path.parent.mkdir(exist_ok=True)
        if form == "meta":
            whole = save(tmp_path / "whole.dcm", data).read_bytes()
            path.write_bytes(whole[132:])
            continue
        del data.file_meta
        implicit, little = form in ("implicit", "group length"), form != "big endian"
        if not little:
            data.PixelData = STORED[z].byteswap().tobytes()
        if form == "group length":
            data.add_new(0x00080000, "UL", 300)
        pydicom.dcmwrite(path, data, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
        assert path.read_bytes()[128:132] != b"DICM"
        assert is_dicom_file(path)
    np.testing.assert_array_equal(read(tmp_path / "s"), HU)
    (case,) = find_cases(tmp_path / "s", channels=1, file_ending=".nii.gz")
    assert case.images == (tmp_path / "s",)


def test_other_files_are_not_taken_for_dicom(tmp_path: Path) -> None:
    contents = [
        b"",
        b"\x08\x00",
        np.arange(8, 200, dtype="<i4").tobytes(),
        np.array([8, 4, 1, 7, 7, 7], "<i4").tobytes(),
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"II*\x00\x08\x00\x00\x00" + bytes(40),
        b"\x00\x05\x16\x07\x00\x02\x00\x00" + bytes(120),
        b"{}" * 100,
    ]
    for number, content in enumerate(contents):
        path = tmp_path / str(number)
        path.write_bytes(content)
        assert not is_dicom_file(path)


# --- files that do not belong to the volume ---------------------------------------------------------------------------


def test_other_objects_in_the_folder_are_left_out(tmp_path: Path) -> None:
    folder = save_series(tmp_path / "s", ct_slice)
    others: dict[str, dict[str, Any]] = {
        "screen": {"Modality": "OT", "ImagePositionPatient": None, "ImageOrientationPatient": None},
        "report": {"Modality": "SR", "Rows": None, "PixelData": None},
        "segments": {"Modality": "SEG"},
    }
    for name, changes in others.items():
        save(folder / f"{name}.dcm", ct_slice(SeriesInstanceUID="1.9", **changes))
    dose = {"Modality": "RTDOSE", "SeriesInstanceUID": "1.8", "GridFrameOffsetVector": [0, 1, 2, 3]}
    save(folder / "dose.dcm", frames(DoseGridScaling=0.1, **dose))
    (folder / "._99.dcm").write_bytes(b"\x00\x05\x16\x07")
    (folder / "Thumbs.db").write_bytes(b"junk")
    np.testing.assert_array_equal(read(folder), HU)


def test_copies_of_slices_are_read_once(tmp_path: Path) -> None:
    folder = save_series(tmp_path / "s", ct_slice)
    for path in list(folder.iterdir()):
        shutil.copy(path, folder / f"{path.stem} (1).dcm")
    np.testing.assert_array_equal(read(folder), HU)
    other = ct_slice(1, stored=STORED[2])
    other.SOPInstanceUID = pydicom.dcmread(folder / "98.dcm").SOPInstanceUID
    save(folder / "98 (1).dcm", other)
    with pytest.raises(ImageError, match="same position"):
        read_image(folder)


def test_slices_that_all_have_one_sop_instance_uid_are_kept(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(save_series(tmp_path, lambda z: ct_slice(z, SOPInstanceUID="1.2.3.4"))), HU)


@pytest.mark.parametrize(("numbers", "warned"), [("1212", True), ("1221", True), ("1122", False), ("1234", False)])
def test_acquisitions_that_alternate_are_a_warning(tmp_path: Path, caplog, numbers: str, warned: bool) -> None:
    """Two volumes half a slice apart, or one that was taken in two passes: the files do not say which."""
    folder = save_series(tmp_path, lambda z: ct_slice(z, AcquisitionNumber=int(numbers[z])))
    np.testing.assert_array_equal(read(folder), HU)
    assert ("Slices of acquisitions 1, 2 alternate" in caplog.text) is warned


@pytest.mark.parametrize("numbers", [["", "1", "", "1"], ["", "", "1", "1"], [""] * 4])
def test_slices_without_a_number_of_acquisition_are_no_second_one(tmp_path: Path, caplog, numbers: list) -> None:
    folder = save_series(tmp_path, lambda z: ct_slice(z, AcquisitionNumber=numbers[z]))
    np.testing.assert_array_equal(read(folder), HU)
    assert "acquisitions" not in caplog.text


@pytest.mark.parametrize("plain", [{}, {2}, {0, 1, 3}, {0, 1, 2, 3}])
def test_slices_of_a_ct_that_alone_are_not_rescaled_are_a_warning(tmp_path: Path, caplog, plain: set[int]) -> None:
    """Each slice by its own transform; but a CT of which some slices lack it has lost something."""
    folder = save_series(tmp_path, lambda z: ct_slice(z, RescaleIntercept="0" if z in plain else "-1024"))
    heights = np.diff(
        np.asarray(read(folder), dtype=np.float64).reshape(4, -1).mean(axis=1) - HU.reshape(4, -1).mean(axis=1)
    )
    assert [round(float(step)) for step in heights] == [1024 * ((z + 1 in plain) - (z in plain)) for z in range(3)]
    assert (f"{len(plain)} of 4 slices" in caplog.text) is (0 < len(plain) < 4)


@pytest.mark.parametrize("slices", [1, 4])
def test_a_mosaic_is_named_for_what_it_is(tmp_path: Path, slices: int) -> None:
    """One image with the slices as its tiles was read as one slice of four times the width."""
    kind = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    folder = save_series(tmp_path / "s", lambda z: ct_slice(z, ImageType=kind, Modality="MR"))
    for place in sorted(folder.iterdir())[slices:]:
        place.unlink()
    with pytest.raises(ImageError, match=r"is a mosaic.*dcm2niix"):
        read_image(folder)


def test_a_dcm_file_that_is_not_dicom_is_named(tmp_path: Path) -> None:
    folder = save_series(tmp_path / "s", ct_slice)
    (folder / "96.dcm").write_bytes(b"")  # the last slice: its place would not be missed
    with pytest.raises(ImageError, match=r"not a DICOM file.*96\.dcm.*0 bytes"):
        read_image(folder)
    with pytest.raises(ImageError, match=r"not a DICOM file.*96\.dcm.*0 bytes"):
        read_header(folder / "96.dcm")


def test_a_folder_of_dcm_files_that_are_not_dicom_names_them(tmp_path: Path) -> None:
    for name in ("a.dcm", "b.DCM"):
        (tmp_path / name).write_text("hello")
    with pytest.raises(ImageError, match=r"not a DICOM file.*a\.dcm.*Found 5 bytes of something else"):
        read_image(tmp_path)


def thin_slices(folder: Path, places: Sequence[float]) -> Path:
    for z, place in enumerate(places):
        save(folder / f"{z:02}.dcm", ct_slice(z, stored=STORED[0], ImagePositionPatient=[-10, -20, place]))
    return folder


@pytest.mark.parametrize("apart", [0.25, 0.33, 0.35, 0.625])
def test_thin_slices_whose_positions_were_rounded_to_tenths(tmp_path: Path, apart: float) -> None:
    places = [round(30 + apart * z, 1) for z in range(12)]
    volume, _ = read_image(thin_slices(tmp_path / "s", places))
    assert volume.grid.spacing_zyx_mm[0] == pytest.approx((places[-1] - places[0]) / 11)
    for number in (1, 5, 10):  # a missing slice stays one
        rest = [round(30 + apart * z, 1) for z in range(13) if z != number]
        with pytest.raises(GeometryError, match=r"lacks \d slice|unevenly spaced"):
            read_image(thin_slices(tmp_path / f"{number}", rest))
    hundredths = [place + 0.03 for place in places]
    hundredths[5] += 0.2 * apart + 0.0013
    with pytest.raises(GeometryError, match="unevenly spaced"):
        read_image(thin_slices(tmp_path / "uneven", hundredths))


def test_a_series_in_a_deeper_folder_is_named(tmp_path: Path) -> None:
    save_series(tmp_path / "patient" / "study" / "series", ct_slice)
    with pytest.raises(ImageError, match=r"no DICOM file\. Give the folder of the series: .*patient/study/series\."):
        read_image(tmp_path / "patient")


def test_a_slice_of_the_series_without_position_is_named(tmp_path: Path) -> None:
    folder = save_series(tmp_path / "s", ct_slice)
    save(folder / "96.dcm", ct_slice(3, ImagePositionPatient=None))
    with pytest.raises(ImageError, match=r"does not say where.*96\.dcm"):
        read_image(folder)


def test_dicom_segmentation_is_named_for_what_it_is(tmp_path: Path) -> None:
    segments = Items([item(SegmentLabel="liver"), item(SegmentLabel="left kidney ")])
    path = save(tmp_path / "case.dcm", ct_slice(Modality="SEG", SegmentSequence=segments))
    with pytest.raises(
        ImageError, match=r"segmentation \(DICOM-SEG\).*2 segment\(s\): liver, left kidney\. Give the series"
    ):
        read_image(path)
    with pytest.raises(ImageError, match=r"does not say where its frames lie.*Found 0 frame"):
        read_label(path)


@pytest.mark.parametrize("kind", ["4", "7"])
def test_segmentations_of_another_modality_are_known_by_their_class(tmp_path: Path, kind: str) -> None:
    """Masks of segments, and label maps."""
    changes = {"SOPClassUID": f"1.2.840.10008.5.1.4.1.1.66.{kind}", "Modality": "OT"}
    with pytest.raises(ImageError, match=r"segmentation \(DICOM-SEG\).*Found no segment\. Give the series"):
        read_image(save(tmp_path / "case.dcm", ct_slice(**changes)))


NOT_IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "contours": ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.3", "Modality": "RTSTRUCT"}, "RT Structure Set Storage"),
    "report": ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "Modality": "SR"}, "Basic Text SR Storage"),
    "DICOMDIR": ({"SOPClassUID": "1.2.840.10008.1.3.10", "Modality": None}, "Media Storage Directory"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_other_objects_are_named_for_what_they_are(tmp_path: Path, name: str) -> None:
    changes, kind = NOT_IMAGES[name]
    path = save(tmp_path / "x.dcm", ct_slice(Rows=None, PixelData=None, **changes))
    with pytest.raises(ImageError, match=f"holds no image.*{kind}"):
        read_image(path)


# --- multi-frame files without functional groups ----------------------------------------------------------------------


def test_frames_with_one_position_and_a_spacing(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(save(tmp_path / "a.dcm", frames(SpacingBetweenSlices=2.5))), HU)


def nuclear(**changes: Any) -> Dataset:
    detector = item(ImagePositionPatient=[-10, -20, 30], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    return frames(
        **{
            "Modality": "NM",
            "ImagePositionPatient": None,
            "ImageOrientationPatient": None,
            "DetectorInformationSequence": Items([detector]),
            "SpacingBetweenSlices": 2.5,
            "FrameIncrementPointer": 0x00540080,
            "SliceVector": [1, 2, 3, 4],
            **changes,
        }
    )


def test_frames_of_nuclear_medicine(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(save(tmp_path / "a.dcm", nuclear())), HU)
    order = [2, 0, 3, 1]
    shuffled = nuclear(SliceVector=[n + 1 for n in order], stored=STORED[order])
    np.testing.assert_array_equal(read(save(tmp_path / "b.dcm", shuffled)), HU)
    down = nuclear(SpacingBetweenSlices=-2.5)
    volume, _ = read_image(save(tmp_path / "c.dcm", down))
    np.testing.assert_array_equal(volume.array[0], HU[::-1])
    assert volume.grid.origin_xyz_mm == (-10, -20, 22.5)


@pytest.mark.parametrize("first", [30, 0])
def test_frames_of_a_secondary_capture(tmp_path: Path, first: float) -> None:
    """Locations may begin anywhere; 30 is that of the position."""
    order = [2, 0, 3, 1]
    locations = [first + 2.5 * n for n in order]
    changes = {"FrameIncrementPointer": 0x00182005, "SliceLocationVector": locations}
    capture = frames(**changes, ImagePositionPatient=[-10, -20, 35], stored=STORED[order])
    np.testing.assert_array_equal(read(save(tmp_path / "a.dcm", capture)), HU)
    lacking = frames(FrameIncrementPointer=0x00182005, SliceLocationVector=locations[1:])
    with pytest.raises(ImageError, match="frames that are not slices"):
        read_image(save(tmp_path / "b.dcm", lacking))


def test_slice_locations_that_count_against_the_normal(tmp_path: Path) -> None:
    """The location of the first frame is minus its place along the normal: scanners count either way."""
    changes = {"FrameIncrementPointer": 0x00182005, "SliceLocationVector": [-37.5, -35, -32.5, -30]}
    down = frames(**changes, ImagePositionPatient=[-10, -20, 37.5], stored=STORED[::-1])
    np.testing.assert_array_equal(read(save(tmp_path / "a.dcm", down)), HU)


@pytest.mark.parametrize("offsets", [[0, 2.5, 5, 7.5], [30, 32.5, 35, 37.5]])
def test_frames_of_a_dose(tmp_path: Path, offsets: list[float]) -> None:
    dose = frames(Modality="RTDOSE", DoseGridScaling=1, GridFrameOffsetVector=offsets)
    np.testing.assert_array_equal(read(save(tmp_path / "a.dcm", dose)), HU)


WITHOUT_PLACE = {
    "no spacing": (frames(), "without SpacingBetweenSlices"),
    "film": (
        frames(SpacingBetweenSlices=2.5, FrameIncrementPointer=0x00181063, FrameTime=40),
        "follow each other in time",
    ),
    "projections": (nuclear(FrameIncrementPointer=[0x00540010, 0x00540020]), "frames that are not slices"),
    "no position": (
        frames(SOPClassUID=UltrasoundImageStorage, ImagePositionPatient=None, ImageOrientationPatient=None),
        "4 frames, no ImagePositionPatient.*Ultrasound Image Storage",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_PLACE)
def test_frames_without_a_place_end_in_a_sentence(tmp_path: Path, name: str) -> None:
    data, found = WITHOUT_PLACE[name]
    path = save(tmp_path / "a.dcm", data)
    for call in (read_image, read_header):
        with pytest.raises(ImageError, match=f"does not say where its slices lie.*{found}"):
            call(path)


@pytest.mark.parametrize(("keyword", "value"), [("NumberOfFrames", 10**9), ("Rows", 65535)])
def test_a_header_that_states_more_pixels_than_there_are_is_refused_at_once(
    tmp_path: Path, keyword: str, value: int
) -> None:
    compressed = frames(SpacingBetweenSlices=2.5)
    compressed.compress(RLELossless)
    for name, data in (("plain", frames(SpacingBetweenSlices=2.5)), ("packed", compressed)):
        setattr(data, keyword, value)
        path = save(tmp_path / f"{name}.dcm", data)
        with pytest.raises(ImageError, match=name):
            read_image(path)


def test_compressed_pixels_under_an_uncompressed_syntax_are_refused(tmp_path: Path) -> None:
    data = ct_slice()
    data.compress(RLELossless)
    path = save(tmp_path / "a.dcm", data)
    wrong = path.read_bytes().replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.1\0", 1)
    path.write_bytes(wrong)
    with pytest.raises(ImageError, match="are compressed, but its transfer syntax is not"):
        read_image(path)


def test_cut_compressed_pixels_are_refused(tmp_path: Path) -> None:
    data = frames(SpacingBetweenSlices=2.5)
    data.compress(RLELossless)
    path = save(tmp_path / "a.dcm", data)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="End of file"), pytest.raises(ImageError, match="ends within its pixels"):
        read_image(path)


def test_number_of_functional_groups_must_be_the_number_of_frames(tmp_path: Path) -> None:
    data = enhanced([(1, 0)] * 4)
    del data.PerFrameFunctionalGroupsSequence[3]
    with pytest.raises(ImageError, match="another number of frames"):
        read_header(save(tmp_path / "a.dcm", data))


# --- elements as they come --------------------------------------------------------------------------------------------


def raw(data: Dataset, keyword: str, value: bytes, vr: str = "DS") -> Dataset:
    """Put bytes into an element as they are."""
    tag = Tag(keyword)
    data[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    return data


NUMBERS = {
    "spaces": ("RescaleIntercept", b"  -1024   "),
    "NUL": ("RescaleIntercept", b"-1024\0"),
    "exponent": ("RescaleIntercept", b"-1.024E+003 "),
    "Fortran": ("RescaleIntercept", b"-1.024D+03"),
    "comma": ("PixelSpacing", b"0,8\\0,7 "),
    "long": ("PixelSpacing", b"0.80000000000000004\\0.69999999999999996"),
    "plus": ("RescaleSlope", b"+1.0"),
    "twice": ("RescaleSlope", b"1\\1 "),
    "spaces between": ("ImagePositionPatient", None),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, when writing
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("name", NUMBERS)
def test_decimal_strings_as_scanners_write_them(tmp_path: Path, name: str, syntax: str) -> None:
    keyword, value = NUMBERS[name]

    def make(z: int) -> Dataset:
        return raw(ct_slice(z, syntax=syntax), keyword, value or f"-10 \\ -20\\ {30 + 2.5 * z} ".encode())

    np.testing.assert_array_equal(read(save_series(tmp_path, make)), HU)


def test_numbers_of_another_vr(tmp_path: Path) -> None:
    def make(z: int) -> Dataset:
        data = raw(ct_slice(z), "RescaleIntercept", np.float64(-1024).tobytes(), "FD")
        raw(data, "PixelSpacing", np.array([0.8, 0.7], "<f4").tobytes(), "FL")
        return raw(data, "ImagePositionPatient", f"-10\\-20\\{30 + 2.5 * z}".encode(), "UN")

    np.testing.assert_array_equal(read(save_series(tmp_path, make)), HU)


BAD_NUMBERS = {
    "word": ("RescaleSlope", b"one", "RescaleSlope .* not a number.*'one'"),
    "nan": ("RescaleIntercept", b"nan", "RescaleIntercept .* not a number"),
    "two": ("RescaleSlope", b"1\\2", "RescaleSlope .* several values"),
    "beyond float32": ("RescaleIntercept", b"1e300", "beyond every range.*1e\\+300"),
    "infinite place": ("ImagePositionPatient", b"0\\0\\inf", "ImagePositionPatient .* not a number"),
    "no spacing": ("PixelSpacing", b"", "PixelSpacing with two numbers.*no value"),
    "one spacing": ("PixelSpacing", b"0.8", "PixelSpacing with two numbers"),
    "zero orientation": ("ImageOrientationPatient", b"0\\0\\0\\0\\0\\0", "ImageOrientationPatient with two unit"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_what_is_no_number_is_named(tmp_path: Path, name: str) -> None:
    keyword, value, sentence = BAD_NUMBERS[name]
    folder = save_series(tmp_path / "s", lambda z: raw(ct_slice(z), keyword, value) if z == 2 else ct_slice(z))
    for call in (read_image, read_header):
        with pytest.raises((ImageError, GeometryError), match=sentence):
            call(folder)


def test_pixel_spacings_rounded_differently_are_one_volume(tmp_path: Path) -> None:
    folder = save_series(tmp_path / "s", lambda z: ct_slice(z, PixelSpacing=[0.8 + 2e-4 * z, 0.7]))
    np.testing.assert_array_equal(read_image(folder)[0].array[0], HU)
    folder = save_series(tmp_path / "t", lambda z: ct_slice(z, PixelSpacing=[0.8 + 0.1 * z, 0.7]))
    with pytest.raises(ImageError, match="differ in pixel spacing"):
        read_image(folder)


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, ExplicitVRLittleEndian])
def test_cut_pixels_are_refused(tmp_path: Path, syntax: str) -> None:
    folder = save_series(tmp_path / "s", lambda z: ct_slice(z, syntax=syntax))
    whole = (folder / "98.dcm").read_bytes()
    for length in (len(whole) - 2, len(whole) - 126):
        (folder / "98.dcm").write_bytes(whole[:length])
        with pytest.raises(ImageError, match=r"98\.dcm"):
            read_image(folder)
    save(folder / "98.dcm", ct_slice(1, PixelData=STORED[1].tobytes()[:-2]))
    with pytest.raises(ImageError, match=r"pixel data are too short.*98\.dcm.*126 bytes.*124"):
        read_image(folder)
