"""Verification names every fault of every case in one go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from pydicom.sequence import Sequence as Items
from support.dicom_series import ct_slice, item, save_series
from support.dicom_series import save as save_dicom

from rfmedsam2.errors import DatasetError
from rfmedsam2.pipeline.datasets.verify import examine_case, verify
from rfmedsam2.records.plan import Split
from rfmedsam2.records.verify import VerifyReport
from rfmedsam2.store import images
from rfmedsam2.store.raw import open_dataset

RNG = np.random.default_rng(0)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def save(path: Path, array_xyz: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array_xyz, affine)
    image.set_qform(None, code=0)
    image.set_sform(affine, code=1)
    nib.save(image, path)
    return path


class Maker:
    """A small dataset; each case sound until something is done to it."""

    def __init__(self, folder: Path, **fields) -> None:
        self.folder = folder
        self.fields = fields
        self.ids: list[str] = []

    def add(self, case: str, *, image=None, label=None, affine=AFFINE, label_affine=AFFINE) -> None:
        image = RNG.integers(0, 99, (5, 4, 3)).astype(np.int16) if image is None else image
        label = np.eye(5, 4, dtype=np.uint8)[:, :, None].repeat(3, axis=2) if label is None else label
        self.ids.append(case)
        save(self.image(case), image, affine)
        save(self.label(case), label, label_affine)

    def image(self, case: str) -> Path:
        return self.folder / "imagesTr" / f"{case}_0000.nii.gz"

    def label(self, case: str) -> Path:
        return self.folder / "labelsTr" / f"{case}.nii.gz"

    def report(self, **options) -> VerifyReport:
        content = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "liver": 1, "spleen": 2},
            "numTraining": len(self.ids),
            "file_ending": ".nii.gz",
            **self.fields,
        }
        (self.folder / "dataset.json").write_text(json.dumps(content))
        return verify(open_dataset(self.folder), **options)


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    made = Maker(tmp_path / "Dataset001_A")
    made.add("good")
    return made


def kinds(report: VerifyReport) -> list[tuple[str, str, str]]:
    return [(f.case, f.kind, f.severity) for f in report.faults]


def test_sound_dataset_has_no_faults(maker: Maker) -> None:
    report = maker.report()
    assert report.faults == ()
    assert (report.cases, report.files, report.clean) == (1, 2, True)
    report.require_clean()


def test_all_faults_of_all_cases_come_in_one_report(maker: Maker) -> None:
    one = np.ones((5, 4, 3), np.float32)
    nan = one.copy()
    nan[0, 0, 0] = np.nan
    nan[1, 0, 0] = np.inf
    half = one * 0.5
    seven = np.zeros((5, 4, 3), np.uint8)
    seven[0, 0, :2] = 7
    maker.add("a_nan", image=nan)
    maker.add("b_half", label=half)
    maker.add("c_seven", label=seven)
    maker.add("d_shape", label=np.ones((5, 4, 2), np.uint8))
    maker.add("e_affine", label_affine=np.diag([-1.0, 1.0, 2.0, 1.0]))
    maker.add("f_cut")
    maker.image("f_cut").write_bytes(maker.image("f_cut").read_bytes()[:-20])
    maker.add("g_none")
    maker.label("g_none").unlink()
    maker.add("h_both", image=nan, label=seven)
    maker.add("i_text")
    maker.image("i_text").write_bytes(b"hello" * 200)
    report = maker.report()
    assert kinds(report) == [
        ("a_nan", "not-finite", "error"),
        ("b_half", "not-a-label", "error"),
        ("c_seven", "undeclared-label", "error"),
        ("d_shape", "shape-mismatch", "error"),
        ("e_affine", "affine-mismatch", "error"),
        ("f_cut", "truncated", "error"),
        ("g_none", "missing-label", "error"),
        ("h_both", "not-finite", "error"),
        ("h_both", "undeclared-label", "error"),
        ("i_text", "unreadable", "error"),
        # labels without liver and spleen are looked at as well
        ("c_seven", "empty-label", "warning"),
        ("h_both", "empty-label", "warning"),
    ]
    with pytest.raises(DatasetError) as caught:
        report.require_clean()
    for case in ("a_nan", "b_half", "c_seven", "d_shape", "e_affine", "f_cut", "g_none", "h_both", "i_text"):
        assert case in str(caught.value)


def test_messages_name_values_counts_and_files(maker: Maker) -> None:
    seven = np.zeros((5, 4, 3), np.uint8)
    seven[0, 0, :2] = 7
    seven[0, 1, 0] = 1
    maker.add("x", label=seven)
    (fault,) = maker.report().faults
    assert "7 (2 voxels)" in fault.message
    assert "declared are 0, 1, 2" in fault.message
    assert fault.file == str(maker.label("x"))


@pytest.mark.parametrize(
    ("segments", "wrong"),
    [
        ({"liver": 1, "spleen": 2}, None),
        ({"Liver": 1, "Segment_2": 2}, None),
        ({"spleen": 1, "liver": 2}, "spleen is 1, in dataset.json 2; liver is 2, in dataset.json 1"),
        ({"Spleen": 1}, "Spleen is 1, in dataset.json 2"),
        ({"liver": 1, "spleen": 7}, None),  # which no voxel has
        ({"liver": "one"}, None),
    ],
)
def test_segments_of_slicer_have_the_values_of_dataset_json(maker: Maker, segments: dict, wrong: str | None) -> None:
    """Slicer counts segments in the order in which they were made, which differs from case to case."""
    maker.add("x")
    label = sitk.ReadImage(str(maker.label("x")))
    label[0, 0, 0] = 2
    for number, (name, value) in enumerate(segments.items()):
        for key, text in (("ID", f"S{number}"), ("Name", name), ("LabelValue", str(value)), ("Layer", "0")):
            label.SetMetaData(f"Segment{number}_{key}", text)
    maker.label("x").unlink()
    sitk.WriteImage(label, str(maker.folder / "labelsTr" / "x.seg.nrrd"))
    report = maker.report()
    assert kinds(report) == ([] if wrong is None else [("x", "label-names", "error")])
    assert wrong is None or wrong in report.faults[0].message


def test_ignore_label_and_region_values_are_declared(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    maker = Maker(tmp_path / "d", labels=labels, regions_class_order=[1, 2])
    label = np.zeros((5, 4, 3), np.uint8)
    label[0, 0] = [1, 2, 3]
    maker.add("x", label=label)
    assert maker.report().faults == ()


def test_an_order_of_regions_that_hides_a_value_is_a_warning(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "d", labels={"background": 0, "core": [2], "whole": [1, 2]}, regions_class_order=[2, 1])
    maker.add("x")
    (fault,) = maker.report().faults
    assert (fault.kind, fault.severity, fault.case) == ("region-order", "warning", "")
    assert "1 in place of 2; 2 can never come out" in fault.message
    assert "larger regions before" in fault.remedy


def sheared(degrees: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 2] = 2 * np.array([0, np.sin(np.radians(degrees)), np.cos(np.radians(degrees))])
    return affine


def test_skewed_axes_give_their_angle_and_whether_they_were_repaired(maker: Maker) -> None:
    maker.add("little", affine=sheared(0.4), label_affine=sheared(0.4))
    maker.add("much", affine=sheared(20), label_affine=sheared(20))
    report = maker.report()
    assert set(kinds(report)) == {("little", "skewed-axes", "warning"), ("much", "bad-geometry", "error")}
    text = {f.case: f.message for f in report.faults}
    assert "0.400 degrees" in text["little"]
    assert "corrected" in text["little"]
    assert "20.00 degrees" in text["much"]


def test_small_shift_of_the_label_is_a_warning_half_a_voxel_an_error(maker: Maker) -> None:
    for case, shift in (("near", 0.2), ("far", 0.8)):
        affine = AFFINE.copy()
        affine[0, 3] = shift
        maker.add(case, label_affine=affine)
    assert kinds(maker.report()) == [("far", "affine-mismatch", "error"), ("near", "affine-mismatch", "warning")]


def test_constant_images_and_empty_labels_are_warnings(maker: Maker) -> None:
    maker.add("flat", image=np.ones((5, 4, 3), np.int16), label=np.zeros((5, 4, 3), np.uint8))
    assert kinds(maker.report()) == [("flat", "constant-image", "warning"), ("flat", "empty-label", "warning")]


def test_channels_are_compared_with_one_another_and_counted(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "d", channel_names={"0": "T1", "1": "T2"})
    for case in ("fine", "other", "lone"):
        maker.add(case)
    save(maker.folder / "imagesTr" / "fine_0001.nii.gz", RNG.integers(0, 9, (5, 4, 3)).astype(np.int16))
    save(maker.folder / "imagesTr" / "other_0001.nii.gz", RNG.integers(0, 9, (5, 4, 2)).astype(np.int16))
    maker.add("packed")
    maker.image("packed").unlink()
    save(maker.folder / "imagesTr" / "packed.nii.gz", RNG.integers(0, 9, (5, 4, 3, 3)).astype(np.int16))
    assert kinds(maker.report()) == [
        ("lone", "missing-channel", "error"),
        ("other", "shape-mismatch", "error"),
        ("packed", "extra-channel", "error"),
    ]


def test_file_that_changes_while_it_is_read_is_a_fault(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    original = images.read_nifti

    def meddling(path: Path):
        result = original(path)
        if "labels" in str(path):
            os.utime(path, ns=(1, 1))
        return result

    monkeypatch.setattr(images, "read_nifti", meddling)
    assert kinds(maker.report()) == [("good", "changed-while-reading", "error")]


def test_patients_and_cases_on_both_sides_of_a_split_are_faults(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "d", groups={"a1": "A", "a2": "A", "b1": "B"})
    for case in ("a1", "a2", "b1"):
        maker.add(case)
    assert maker.report(splits=[Split(train=("a1", "a2"), val=("b1",))]).clean
    report = maker.report(splits=[Split(train=("a1", "b1"), val=("a2", "b1", "zz"))])
    assert kinds(report) == [
        ("a2", "split-overlap", "error"),
        ("b1", "split-overlap", "error"),
        ("zz", "split-unknown", "error"),
    ]
    assert "patient A" in report.faults[0].message


def test_report_survives_json(maker: Maker) -> None:
    maker.add("flat", label=np.zeros((5, 4, 3), np.uint8))
    report = maker.report()
    assert VerifyReport.from_json(report.to_json()) == report


def test_every_file_is_read_once(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    maker.add("more")
    read: list[str] = []
    original = images.read_nifti
    monkeypatch.setattr(images, "read_nifti", lambda path: read.append(path.name) or original(path))
    report = maker.report()
    assert len(read) == len(set(read)) == report.files == 4


def test_examination_gives_what_was_read(maker: Maker) -> None:
    maker.report()
    dataset = open_dataset(maker.folder)
    found = examine_case(dataset.training[0], dataset.json)
    assert found.faults == ()
    assert found.volume is not None
    assert found.volume.array.shape == (1, 3, 4, 5)
    assert found.label is not None
    assert found.label.dtype == np.uint8
    assert found.voxels_by_label == {1: 12}


def test_test_images_are_read_too(maker: Maker) -> None:
    bad = maker.folder / "imagesTs" / "t_0000.nii.gz"
    bad.parent.mkdir()
    bad.write_bytes(b"\x1f\x8b broken")
    assert [(c, k) for c, k, _ in kinds(maker.report())] == [("t", "truncated")]


@pytest.mark.data
def test_real_datasets_are_clean(data_root: Path) -> None:
    for name in ("brats-like-4ch/Dataset114_BraTSlike4ch", "ct-organs-totalsegmentator/Dataset110_TSAbdomenCT"):
        report = verify(open_dataset(data_root / name))
        assert report.errors == ()
        assert report.files > 0


def test_file_that_is_listed_but_not_there_is_told_once(maker: Maker) -> None:
    listed = {
        "good": {"images": [str(maker.image("good"))], "label": str(maker.label("good"))},
        "lost": {"images": [str(maker.image("lost"))], "label": str(maker.label("good"))},
    }
    maker.fields["dataset"] = listed
    assert [(c, k) for c, k, s in kinds(maker.report()) if s == "error"] == [("lost", "missing-image")]


def test_dicom_segmentation_as_a_label_is_named_for_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset002_Dicom"
    save_series(folder / "imagesTr" / "a_0000", ct_slice)
    segments = Items([item(SegmentLabel="liver")])
    save_dicom(folder / "labelsTr" / "a.dcm", ct_slice(Modality="SEG", SegmentSequence=segments))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".dcm"}
    (folder / "dataset.json").write_text(json.dumps(content))
    (fault,) = verify(open_dataset(folder)).errors
    assert fault.kind == "unreadable"
    assert "DICOM segmentation does not say where its frames lie" in fault.message


def test_raw_dicom_folders_are_verified_against_their_labels(data_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Dataset002_Dicom"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    samples = data_root / "format-samples" / "dicom_ct3slice"
    (folder / "imagesTr" / "liver_0000").symlink_to(samples, target_is_directory=True)
    (folder / "labelsTr" / "liver.nrrd").symlink_to(samples / "liver_seg.nrrd")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".dcm"}
    (folder / "dataset.json").write_text(json.dumps(content))
    report = verify(open_dataset(folder))
    assert report.errors == ()
    assert report.files == 2


def test_an_image_that_programs_place_differently_is_a_warning_and_labels_of_either_fit(maker: Maker) -> None:
    """Without forms ITK and nibabel disagree on the place of every voxel."""
    for name in ("by_itk", "by_nibabel"):
        maker.add(name)
        nib.save(nib.Nifti1Image(np.asarray(nib.load(maker.image(name)).dataobj), None), maker.image(name))
    labels = np.asarray(nib.load(maker.label("good")).dataobj)
    nib.save(nib.Nifti1Image(labels, np.diag([-1.0, -1, 1, 1])), maker.label("by_itk"))
    nib.save(nib.Nifti1Image(labels, nib.load(maker.image("by_nibabel")).affine), maker.label("by_nibabel"))
    report = maker.report()
    assert kinds(report) == [("by_itk", "forms-differ", "warning"), ("by_nibabel", "forms-differ", "warning")]
    assert "neither a sform nor a qform; read as by ITK" in report.faults[0].message


def test_a_stack_without_spacing_is_a_warning(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "Dataset001_A", file_ending=".tif")
    for part, name in (("imagesTr", "a_0000.tif"), ("labelsTr", "a.tif")):
        (maker.folder / part).mkdir(parents=True)
        planes = [Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5) % (9 if part == "imagesTr" else 2))] * 3
        planes[0].save(maker.folder / part / name, save_all=True, append_images=planes[1:])
    (maker.folder / "labelsTr" / "a.json").write_text('{"spacing": [2, 1, 1]}')
    maker.ids = ["a"]
    report = maker.report()
    assert kinds(report) == [("a", "no-spacing", "warning")]
    assert "a.json beside it" in report.faults[0].remedy
