"""rfmed_convert_labels: formats of a folder of maps, scored again; faults of all cases in one error; nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from support.commands import run_error, run_ok
from support.dicom_series import whole_series
from support.tiny_model import make_plan, write_image, write_model

from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.exchange.formats import ENDINGS
from rfmedsam2.store.images import read_header, read_label, write_label

LABELS = {"background": 0, "liver": 6, "left_kidney": 3}


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Two maps with their names, and the series of their images in folders of their names."""
    folder = tmp_path / "maps"
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 2, "file_ending": ".nii.gz"}
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(content))
    for number, case in enumerate("ab"):
        series = whole_series(tmp_path / "series" / case)
        labels = np.zeros((4, 9, 7), np.uint8)
        labels[1, 2:6, 1:4] = 6
        labels[1 + number, 6:8, 4:6] = 3
        write_label(folder / f"{case}.nii.gz", labels, read_header(series))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_all_formats_at_once_score_1_against_the_maps(maps: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_ok("convert_labels", "-i", maps, "-o", out, "--series", tmp_path / "series", "--format", *ENDINGS)
    assert "12 file(s)" in done.out
    assert sorted(files(out)) == sorted(f"{name}/{case}{end}" for name, end in ENDINGS.items() for case in "ab")
    seg = hd.seg.segread(out / "dicom-seg" / "b.dcm")
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["left_kidney", "liver"]
    for name in ENDINGS:
        scores = tmp_path / f"scores-{name}"
        run_ok("evaluate", "-p", out / name, "-g", maps, "-o", scores)
        found = json.loads((scores / "metrics.json").read_text())
        assert [c["classes"][n]["dsc"] for c in found["cases"] for n in ("liver", "left_kidney")] == [1.0] * 4
        for case in "ab":
            one, other = (
                read_label(p)[0].array for p in (out / name / f"{case}{ENDINGS[name]}", maps / f"{case}.nii.gz")
            )
            np.testing.assert_array_equal(one, other)


def test_one_map_takes_the_folder_of_its_series(maps: Path, tmp_path: Path) -> None:
    series = tmp_path / "series" / "a"
    words = ("--format", "dicom-seg-labelmap", "--series", series, "--keep-empty-frames")
    run_ok("convert_labels", "-i", maps / "a.nii.gz", "-o", tmp_path / "out", *words)
    data = pydicom.dcmread(tmp_path / "out" / "dicom-seg-labelmap" / "a.dcm")
    assert (data.NumberOfFrames, [s.SegmentNumber for s in data.SegmentSequence]) == (4, [0, 3, 6])


def test_a_users_codes_and_labels(maps: Path, tmp_path: Path) -> None:
    (tmp_path / "codes.csv").write_text("name,code,meaning,scheme\nliver,L1,Our liver,99OURS\n")
    words = ("--format", "dicom-seg", "--series", tmp_path / "series", "--codes", tmp_path / "codes.csv")
    run_ok("convert_labels", "-i", maps, "-o", tmp_path / "out", *words)
    segment = pydicom.dcmread(tmp_path / "out" / "dicom-seg" / "a.dcm").SegmentSequence[1]
    kind = segment.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == ("L1", "99OURS", "Our liver")


def test_faults_of_all_cases_in_one_error_and_nothing_written(maps: Path, tmp_path: Path) -> None:
    moved = nib.load(maps / "a.nii.gz")
    affine = moved.affine.copy()
    affine[0, 3] += 50
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj), affine), maps / "a.nii.gz")
    (tmp_path / "series" / "b").rename(tmp_path / "series" / "c")
    (maps / "d.nii.gz").write_bytes(b"damaged")
    words = ("--format", "nifti", "dicom-seg", "--series", tmp_path / "series")
    error = run_error("convert_labels", "-i", maps, "-o", tmp_path / "out", *words)
    for part in (
        "3 fault(s); nothing was written",
        "a: The label map is not on the grid",
        "b: The DICOM series",
        "d: ",
    ):
        assert part in " ".join(error.split())
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_without_the_word(maps: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_ok("convert_labels", "-i", maps, "-o", out, "--format", "mha")
    (out / "mha" / "a.mha").write_bytes(b"mine")
    before = files(out)
    error = run_error("convert_labels", "-i", maps, "-o", out, "--format", "mha", "nrrd")
    assert "2 file(s) would be replaced" in error
    assert "--overwrite" in error
    assert files(out) == before
    run_ok("convert_labels", "-i", maps, "-o", out, "--format", "mha", "--overwrite")
    np.testing.assert_array_equal(*(read_label(p)[0].array for p in (out / "mha" / "a.mha", maps / "a.nii.gz")))


def test_an_input_is_never_overwritten(maps: Path, tmp_path: Path) -> None:
    inside = tmp_path / "all" / "nifti"
    maps.rename(tmp_path / "m")
    inside.parent.mkdir()
    (tmp_path / "m").rename(inside)
    before = files(inside)
    error = run_error("convert_labels", "-i", inside, "-o", inside.parent, "--format", "nifti", "--overwrite")
    assert "overwrite an input" in error
    assert files(inside) == before


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--format", "dicom-seg"), "Name its folder, or the folder of all series, with --series"),
        (("--format", "nifti", "nifti"), "not formats of label maps"),
        (("--format", "dicom-seg", "--series", "nowhere"), "folder of the DICOM series does not exist"),
        (("--format", "nifti", "--codes", "nowhere.csv"), "table of codes does not exist"),
    ],
)
def test_what_is_lacking_is_said(maps: Path, tmp_path: Path, words: tuple[str, ...], part: str) -> None:
    assert part in " ".join(run_error("convert_labels", "-i", maps, "-o", tmp_path / "out", *words).split())
    assert not (tmp_path / "out").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    names = {"background": 0, "liver": 1, "left_kidney": 2}
    return write_model(tmp_path / "model", make_plan(labels=LabelSet(names=names)), fold="4")


def test_predictions_in_other_formats(model: Path, tmp_path: Path) -> None:
    series, out = whole_series(tmp_path / "images" / "a"), tmp_path / "out"
    words = ("predict", "-i", series, "-o", out, "-m", model, "--device", "cpu", "--format", "seg.nrrd", "dicom-seg")
    run_ok(*words)
    labels, header = read_label(out / "a.nii.gz")
    assert np.unique(labels.array).size > 1
    for path in (out / "seg.nrrd" / "a.seg.nrrd", out / "dicom-seg" / "a.dcm"):
        again, other = read_label(path)
        np.testing.assert_array_equal(again.array, labels.array)
        assert header.grid.mismatch(other.grid) is None
    segments = pydicom.dcmread(out / "dicom-seg" / "a.dcm").SegmentSequence
    assert [(s.SegmentLabel, s.SegmentAlgorithmType) for s in segments] == [
        ("liver", "AUTOMATIC"),
        ("left_kidney", "AUTOMATIC"),
    ]
    before = files(out)
    assert "2 file(s) would be replaced" in run_error(*words)
    assert files(out) == before
    (out / "dicom-seg" / "a.dcm").unlink()
    run_ok(*words, "--continue")
    assert sorted(files(out)) == sorted(before)
    assert files(out)["seg.nrrd/a.seg.nrrd"] == before["seg.nrrd/a.seg.nrrd"]
    run_ok(*words, "--overwrite")


def test_predictions_without_series_are_refused_before_anything_is_predicted(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "b_0000.nii.gz")
    words = ("-i", tmp_path / "images", "-o", tmp_path / "out", "-m", model, "--device", "cpu")
    assert "1 case(s) in other formats: b" in run_error("predict", *words, "--format", "nifti", "dicom-seg")
    words = ("-i", tmp_path / "images", "-o", tmp_path / "out.nii.gz", "-m", model, "--device", "cpu")
    assert "Expected an output folder" in run_error("predict", *words, "--format", "mha")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.nii.gz").exists()
