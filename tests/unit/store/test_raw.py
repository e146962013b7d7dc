"""Finding the cases of raw datasets and of inputs to predict, by names alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfmedsam2.errors import DatasetError, ImageError, RecordError, UsageError
from rfmedsam2.store.input_discovery import find_cases
from rfmedsam2.store.raw import open_dataset


def dataset(folder: Path, images: list[str], labels: list[str], **fields) -> Path:
    """A dataset of empty files."""
    for name, files in (("imagesTr", images), ("labelsTr", labels)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            (folder / name / file).touch()
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": len(labels),
        "file_ending": ".nii.gz",
        **fields,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def names(cases) -> dict[str, list[str]]:
    return {case.id: [path.name for path in case.images] for case in cases}


TWO = {"channel_names": {"0": "T1", "1": "T2"}}


def test_nnunets_layout_gives_cases_in_order_with_labels_groups_and_tests(tmp_path: Path) -> None:
    folder = dataset(
        tmp_path / "Dataset001_A",
        ["b_0001.nii.gz", "b_0000.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz"],
        ["a.nii.gz", "b.nii.gz"],
        groups={"a": "patient 1"},
        **TWO,
    )
    (folder / "imagesTs").mkdir()
    for channel in (0, 1):
        (folder / "imagesTs" / f"c_000{channel}.nii.gz").touch()
    found = open_dataset(folder)
    assert found.name == "Dataset001_A"
    assert names(found.training) == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
    }
    assert [c.label.name for c in found.training if c.label] == ["a.nii.gz", "b.nii.gz"]
    assert [c.group for c in found.training] == ["patient 1", None]
    assert names(found.test) == {"c": ["c_0000.nii.gz", "c_0001.nii.gz"]}
    assert found.faults == ()
    assert found.reorient is None


def test_files_without_channel_suffix_are_cases_also_when_they_are_numbered(tmp_path: Path) -> None:
    files = ["liver_0000.nii.gz", "liver_0001.nii.gz", "other.nii.gz"]
    found = open_dataset(dataset(tmp_path / "d", files, files))
    assert names(found.training) == {"liver_0000": files[:1], "liver_0001": files[1:2], "other": files[2:]}
    assert found.faults == ()


def test_multi_channel_files_without_suffix_are_cases(tmp_path: Path) -> None:
    found = open_dataset(dataset(tmp_path / "d", ["a.nii.gz", "b.nii.gz"], ["a.nii.gz", "b.nii.gz"], **TWO))
    assert names(found.training) == {"a": ["a.nii.gz"], "b": ["b.nii.gz"]}
    assert found.faults == ()


def test_dicom_folders_are_images(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", [], ["a.nii.gz", "b.nii.gz"])
    for name in ("a_0000", "b"):
        (folder / "imagesTr" / name).mkdir()
        (folder / "imagesTr" / name / "1").write_bytes(bytes(128) + b"DICM")
    assert names(open_dataset(folder).training) == {"a": ["a_0000"], "b": ["b"]}


@pytest.mark.parametrize("reader", ["SimpleITKIOWithReorient", "NibabelIOWithReorient"])
def test_reader_with_reorient_turns_volumes(tmp_path: Path, reader: str) -> None:
    folder = dataset(tmp_path / "d", ["a_0000.nii.gz"], ["a.nii.gz"], overwrite_image_reader_writer=reader)
    assert open_dataset(folder).reorient == "RAS"


def test_explicit_file_lists_are_followed(tmp_path: Path) -> None:
    for name in ("x.nii.gz", "y.nii.gz"):
        (tmp_path / name).touch()
    listed = {"k": {"images": ["../x.nii.gz"], "label": str(tmp_path / "y.nii.gz")}}
    found = open_dataset(dataset(tmp_path / "d", [], [], dataset=listed, numTraining=1))
    assert names(found.training) == {"k": ["x.nii.gz"]}
    assert found.faults == ()
    listed["m"] = {"images": ["gone.nii.gz"], "label": "gone_too.nii.gz"}
    faults = open_dataset(dataset(tmp_path / "d", [], [], dataset=listed, numTraining=2)).faults
    assert {(f.case, f.kind) for f in faults} == {("m", "missing-image"), ("m", "missing-label")}


@pytest.mark.parametrize(
    ("images", "labels", "kind", "words"),
    [
        (["a_0000.nii.gz"], ["a.nii.gz"], "missing-channel", "_0001 (T2)"),
        (["a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz"], ["a.nii.gz"], "extra-channel", "_0002"),
        (["a.nii.gz", "b.nii.gz"], ["a.nii.gz"], "missing-label", "without label"),
        (["a.nii.gz"], ["a.nii.gz", "b.nii.gz"], "missing-image", "without image"),
        (["a.nii.gz", "a.nii"], ["a.nii.gz"], "duplicate-id", "the same case id"),
        (["a.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz"], ["a.nii.gz"], "duplicate-id", "Several files"),
        (["a.nii.gz", "A.nii.gz"], ["a.nii.gz", "A.nii.gz"], "duplicate-id", "letter case: A, a"),
        (["stra\u00dfe.nii.gz", "STRASSE.nii.gz"],) * 2 + ("duplicate-id", "letter case: STRASSE, stra\u00dfe"),
        (["caf\u00e9.nii.gz", "cafe\u0301.nii.gz"],) * 2 + ("duplicate-id", "accented letters (NFC, NFD)"),
        (["a.nii.gz", "b.nrrd"], ["a.nii.gz"], "wrong-suffix", "does not end in .nii.gz"),
    ],
)
def test_faults_of_single_cases_are_kept_not_raised(
    tmp_path: Path, images: list[str], labels: list[str], kind: str, words: str
) -> None:
    faults = open_dataset(dataset(tmp_path / "d", images, labels, **TWO)).faults
    assert [f.kind for f in faults if f.severity == "error"] == [kind]
    assert words in " ".join(f.message for f in faults)


@pytest.mark.parametrize(
    ("images", "labels", "wrong", "only"),
    [
        (["a.nii.gz", "b.nii.gz"], ["a.nii", "b.nii.gz"], "labelsTr/a.nii", True),
        (["a.nii.gz", "b.nii.gz"], ["a.mha", "b.nii.gz"], "labelsTr/a.mha", True),
        (["a.mha", "b.nii.gz"], ["a.nii.gz", "b.nii.gz"], "imagesTr/a.mha", True),
        (["a_0000.nii.gz", "a_0001.mha"], ["a.nii.gz"], "imagesTr/a_0001.mha", True),
        (["a.nii.gz"], ["a.nii.gz", "a.mha"], "labelsTr/a.mha", False),
        (["a_0000.nii.gz", "a_0001.nii.gz", "a_0001.mha"], ["a.nii.gz"], "imagesTr/a_0001.mha", False),
        (["a_0000.nii.gz", "a_0001.nii.gz", "a.mha"], ["a.nii.gz"], "imagesTr/a.mha", False),
        (["a.nii.gz", "a_0000.mha"], ["a.nii.gz"], "imagesTr/a_0000.mha", False),
    ],
)
def test_only_a_file_that_is_there_twice_may_be_removed(
    tmp_path: Path, images: list[str], labels: list[str], wrong: str, only: bool
) -> None:
    folder = dataset(tmp_path / "d", images, labels, **TWO)
    (fault,) = [f for f in open_dataset(folder).faults if f.file == str(folder / wrong)]
    assert fault.remedy == ("Convert it" if only else "Convert the file, or remove it")
    assert fault.kind == ("wrong-suffix" if only else "duplicate-id")
    assert fault.case == "a"
    assert ("the same case id" in fault.message) is not only


def test_wrong_number_of_training_cases_is_a_warning(tmp_path: Path) -> None:
    (fault,) = open_dataset(dataset(tmp_path / "d", ["a_0000.nii.gz"], ["a.nii.gz"], numTraining=7)).faults
    assert (fault.kind, fault.severity) == ("case-count", "warning")
    assert "7" in fault.message


def test_wrong_ending_for_all_files_says_which_ending_to_set(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", ["a_0000.nrrd", "b_0000.nrrd"], ["a.nrrd", "b.nrrd"])
    with pytest.raises(DatasetError, match=r'no training cases.*a_?.*2 \.nrrd.*"file_ending".*"\.nrrd"'):
        open_dataset(folder)


def test_misspelt_folder_is_named(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", ["a_0000.nii.gz"], ["a.nii.gz"])
    (folder / "imagesTr").rename(folder / "imagesTR")
    with pytest.raises(DatasetError, match="Rename imagesTR to imagesTr"):
        open_dataset(folder)


def test_missing_folder_and_missing_or_faulty_json_have_sentences(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "Dataset001_Liver", ["a_0000.nii.gz"], ["a.nii.gz"])
    with pytest.raises(DatasetError, match="Did you mean Dataset001_Liver"):
        open_dataset(tmp_path / "Dataset001_liver2")
    (folder / "dataset.json").write_text('{"labels": {"background": 0}, "file_ending": "nii"}')
    with pytest.raises(RecordError, match=r"2 fault.*channel_names.*file_ending"):
        open_dataset(folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=r"no dataset\.json"):
        open_dataset(folder)


# --- inputs to predict ------------------------------------------------------------------------------------------------


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


@pytest.mark.parametrize("ending", [None, ".nii.gz"])
def test_folder_with_or_without_channel_suffix(tmp_path: Path, ending: str | None) -> None:
    touch(tmp_path, "a_0000.nii.gz", "b.nii.gz", "notes.md", ".hidden.nii.gz")
    found = names(find_cases(tmp_path, channels=1, file_ending=ending))
    assert found == {"a": ["a_0000.nii.gz"], "b": ["b.nii.gz"]}


def test_images_of_other_formats_are_not_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a_0000.nii.gz", "b_0000.nii", "c.NII.GZ", "d.mha", "e.nii.gz", "notes.txt")
    assert [c.id for c in find_cases(tmp_path, channels=1, file_ending=".nii.gz")] == ["a", "e"]
    (message,) = caplog.messages
    assert message.startswith("3 image(s) are left out, because their names do not end in .nii.gz")
    assert "b_0000.nii, c.NII.GZ, d.mha" in message
    caplog.clear()
    assert [c.id for c in find_cases(tmp_path, channels=1, file_ending=None)] == ["a", "b", "c", "d", "e"]
    assert [c.id for c in find_cases(tmp_path, channels=1, file_ending=".nrrd")] == ["a", "b", "c", "d", "e"]
    assert not caplog.messages


def test_numbered_single_channel_files_are_not_taken_for_channels(tmp_path: Path) -> None:
    touch(tmp_path, *(f"amos_{i:04d}.nii.gz" for i in range(3)))
    assert [c.id for c in find_cases(tmp_path, channels=1, file_ending=None)] == ["amos_0000", "amos_0001", "amos_0002"]


@pytest.mark.parametrize(
    ("names", "channels", "meant"),
    [
        (("a_0000", "a_0001"), 1, ["a_0000, a_0001 are predicted as 2 cases", "channels of one case, a:"]),
        (("a_0000", "a_0001", "b"), 1, ["a_0000, a_0001 are predicted as 2 cases"]),
        (("a_0000", "a_0002"), 1, ["a_0000, a_0002 are predicted as 2 cases"]),
        (("a_0001", "a_0002"), 1, []),  # numbered from 1: nobody's channels
        (("a_0000", "b_0000"), 1, []),
        (tuple(f"amos_{i:04d}" for i in range(40)), 1, []),
    ],
)
def test_names_like_channels_of_one_patient_are_a_warning(tmp_path: Path, names, channels, meant, caplog) -> None:
    touch(tmp_path, *(f"{name}.nii.gz" for name in names))
    find_cases(tmp_path, channels=channels, file_ending=".nii.gz")
    assert bool(caplog.messages) == bool(meant)
    assert all(words in caplog.text for words in meant)
    caplog.clear()
    find_cases(sorted(tmp_path.iterdir()), channels=channels, file_ending=None)
    assert bool(caplog.messages) == bool(meant)


def test_images_of_more_channels_than_the_model_takes_are_no_cases_of_their_own(tmp_path: Path) -> None:
    for case in ("a", "b"):
        for channel in range(3):
            (tmp_path / f"{case}_{channel:04d}.nii.gz").touch()
    with pytest.raises(DatasetError, match=r"a: Channels beyond the 1 declared: _0001, _0002"):
        find_cases(tmp_path, channels=1, file_ending=None)


def test_missing_channels_of_all_cases_are_named_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "b_0001.nii.gz")
    with pytest.raises(DatasetError, match=r"2 input case.*a: .*_0001.*b: .*_0000"):
        find_cases(tmp_path, channels=2, file_ending=".nii.gz")


def test_nothing_found_says_what_is_there_and_what_was_expected(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(DatasetError, match=r"0 cases.*CASE_0000\.nii\.gz.*2 \.jpg.*Check the folder"):
        find_cases(tmp_path, channels=1, file_ending=".nii.gz")
    touch(tmp_path / "top" / "imagesTs", "a.nii.gz")
    with pytest.raises(DatasetError, match=r"0 cases.*Name the subfolder.*imagesTs"):
        find_cases(tmp_path / "top", channels=1, file_ending=None)


def test_a_folder_of_another_readable_format_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, "a.nrrd", "b_0000.nrrd")
    assert [c.id for c in find_cases(tmp_path, channels=1, file_ending=".nii.gz")] == ["a", "b"]
    touch(tmp_path, "c.nii.gz")
    assert [c.id for c in find_cases(tmp_path, channels=1, file_ending=".nii.gz")] == ["c"]


def test_single_file_finds_its_other_channels(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz")
    found = find_cases(tmp_path / "a_0001.nii.gz", channels=2, file_ending=None)
    assert names(found) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}
    assert names(find_cases(tmp_path / "a_0000.nii.gz", channels=1, file_ending=None)) == {"a": ["a_0000.nii.gz"]}


def test_dicom_series_folder_is_one_case_and_a_folder_of_them_several(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        touch(tmp_path / name, "IM1")
        (tmp_path / name / "IM1").write_bytes(bytes(128) + b"DICM")
    assert names(find_cases(tmp_path / "p1", channels=1, file_ending=".nii.gz")) == {"p1": ["p1"]}
    assert names(find_cases(tmp_path, channels=1, file_ending=".nii.gz")) == {"p1": ["p1"], "p2": ["p2"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "# comment\nx/a_0000.nii.gz\nx/a_0001.nii.gz\n"),
        ("l.json", '["x/a_0000.nii.gz", "x/a_0001.nii.gz"]'),
        ("l.json", '{"a": ["x/a_0000.nii.gz", "x/a_0001.nii.gz"]}'),
        ("l.json", '[{"id": "a", "images": ["x/a_0000.nii.gz", "x/a_0001.nii.gz"]}]'),
        ("l.csv", "id,image,image\na,x/a_0000.nii.gz,x/a_0001.nii.gz\n"),
        ("l.csv", "a,x/a_0000.nii.gz,x/a_0001.nii.gz\n"),
        ("l.csv", "path\nx/a_0000.nii.gz\nx/a_0001.nii.gz\n"),
    ],
)
def test_list_files_of_every_kind_give_the_same_case(tmp_path: Path, name: str, text: str) -> None:
    touch(tmp_path / "x", "a_0000.nii.gz", "a_0001.nii.gz")
    (tmp_path / name).write_text(text)
    found = find_cases(tmp_path / name, channels=2, file_ending=None)
    assert names(found) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("l.json", "{", "cannot be parsed"),
        ("l.json", "5", "cannot be parsed"),
        ("l.json", '{"a": [3]}', "cannot be parsed"),
        ("l.json", '[{"id": "a"}]', "an entry lacks"),
        ("l.json", '[{"id": "a", "images": "a.mha"}, {"id": "a", "images": "b.mha"}]', "the id a occurs twice"),
        ("l.json", '["a.nii.gz", 3]', "cannot be parsed"),
        ("l.txt", "", "0 cases"),
        ("l.txt", "gone.nii.gz", "not exist.*gone"),
        ("l.csv", "a,x.nii.gz,y.nii.gz,z.nii.gz", "not exist"),
    ],
)
def test_faulty_list_files_have_sentences(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=words):
        find_cases(tmp_path / name, channels=2, file_ending=None)


def test_sequence_of_paths_and_missing_or_foreign_input(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii.gz", "a_0000.nrrd", "x.pdf")
    found = find_cases([tmp_path / "b.nii.gz", tmp_path / "a_0000.nrrd"], channels=1, file_ending=None)
    assert [c.id for c in found] == ["a", "b"]
    with pytest.raises(UsageError, match="input does not exist"):
        find_cases(tmp_path / "gone", channels=1, file_ending=None)
    with pytest.raises(UsageError, match="neither an image nor a list"):
        find_cases(tmp_path / "x.pdf", channels=1, file_ending=None)


def test_case_with_another_number_of_channels_is_refused(data_root: Path) -> None:
    from rfmedsam2.store.raw import read_case

    case = open_dataset(data_root / "hippocampus" / "Dataset004_Hippocampus").training[0]
    with pytest.raises(ImageError, match=rf"number of channels of case {case.id} differs.*2 channel.*Found 1"):
        read_case(case, channels=2)


def test_real_datasets_open_without_faults(data_root: Path) -> None:
    folders = sorted(data_root.glob("*/Dataset*"))
    assert folders
    for folder in folders:
        found = open_dataset(folder)
        assert found.faults == ()
        assert len(found.training) == found.json.numTraining


# --- layouts of other programs ----------------------------------------------------------------------------------------

COLORS = {"channel_names": {"0": "red", "1": "green", "2": "blue"}, "file_ending": ".png"}


def color_dataset(folder: Path, channels: int) -> Path:
    """Two color images c0_0000.png, as nnU-Net's NaturalImage2DIO wants them, and one to predict."""
    dataset(folder, ["c0_0000.png", "c1_0000.png"], ["c0.png", "c1.png"], **COLORS)
    (folder / "imagesTs").mkdir()
    shape = (8, 9, channels) if channels > 1 else (8, 9)
    pixels = np.random.default_rng(7).integers(0, 255, shape).astype(np.uint8)
    for name in ("imagesTr/c0_0000", "imagesTr/c1_0000", "imagesTs/c2_0000"):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    for name in ("c0", "c1"):
        Image.fromarray(np.ones((8, 9), np.uint8)).save(folder / "labelsTr" / f"{name}.png")
    return folder


def test_a_color_image_is_all_channels_of_its_case(tmp_path: Path) -> None:
    folder = color_dataset(tmp_path / "d", 3)
    found = open_dataset(folder)
    assert found.faults == ()
    assert names(found.training) == {"c0": ["c0_0000.png"], "c1": ["c1_0000.png"]}
    assert names(found.test) == {"c2": ["c2_0000.png"]}
    image, label = found.read("c0")
    assert image.array.shape == (3, 1, 8, 9)
    assert label is not None
    pixels = np.asarray(Image.open(folder / "imagesTr" / "c0_0000.png"))
    np.testing.assert_array_equal(image.array[:, 0], np.moveaxis(pixels, -1, 0))
    assert names(find_cases(folder / "imagesTs", channels=3, file_ending=".png")) == {"c2": ["c2_0000.png"]}
    assert names(find_cases(folder / "imagesTs" / "c2_0000.png", channels=3, file_ending=".png"))


@pytest.mark.parametrize(
    ("channels", "kind", "message"),
    [(1, "missing-channel", "2 of 3 channels missing"), (4, "extra-channel", "has 4 channels inside, expected 3")],
)
def test_a_color_image_with_another_number_of_channels_is_a_fault(
    tmp_path: Path, channels: int, kind: str, message: str
) -> None:
    faults = open_dataset(color_dataset(tmp_path / "d", channels)).faults
    assert {(fault.case, fault.kind) for fault in faults} == {(case, kind) for case in ("c0", "c1", "c2")}
    assert message in faults[0].message


@pytest.mark.parametrize("ending", [".nrrd", ".nii.gz", ".dcm"])
def test_labels_may_be_slicers_segmentations(tmp_path: Path, ending: str) -> None:
    images = ["a", "b"] if ending == ".dcm" else [f"a_0000{ending}", f"b_0000{ending}"]
    folder = dataset(tmp_path / "d", [], ["a.seg.nrrd", "b.seg.nhdr"], file_ending=ending)
    for name in images:
        if ending == ".dcm":
            (folder / "imagesTr" / name).mkdir()
            (folder / "imagesTr" / name / "1.dcm").write_bytes(bytes(128) + b"DICM")
        else:
            (folder / "imagesTr" / name).touch()
    found = open_dataset(folder)
    assert found.faults == ()
    assert {case.id: case.label.name for case in found.training if case.label} == {
        "a": "a.seg.nrrd",
        "b": "b.seg.nhdr",
    }


def test_a_dataset_json_of_nnunet_v1_is_named_with_what_is_swapped(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", ["a_0000.nii.gz"], ["a.nii.gz"])
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "numTraining": 1, "training": []}
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"format of nnU-Net v1.*other way round.*rfmed_convert nnunetv1"):
        open_dataset(folder)
    del content["modality"]  # a file whose other fields are already those of version 2
    half = {**content, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(half))
    with pytest.raises(DatasetError, match=r"format of nnU-Net v1.*other way round"):
        open_dataset(folder)
    decimal = {**half, "labels": {"0.0": "background", "1.0": "liver"}}  # as pandas writes whole numbers
    (folder / "dataset.json").write_text(json.dumps(decimal))
    with pytest.raises(DatasetError, match=r"format of nnU-Net v1.*other way round"):
        open_dataset(folder)
    for names in (("background", "1", "2"), ("0", "1", "2"), ("background", "3", "z")):  # names that are numbers
        swapped = {**content, "modality": {"0": "CT"}, "labels": {str(i): name for i, name in enumerate(names)}}
        (folder / "dataset.json").write_text(json.dumps(swapped))
        with pytest.raises(DatasetError, match=r"format of nnU-Net v1.*other way round.*rfmed_convert nnunetv1"):
            open_dataset(folder)
    (folder / "dataset.json").write_text(json.dumps({**content, "modality": {"0": "CT"}, "labels": {"liver": 1}}))
    with pytest.raises(RecordError, match="channel_names"):
        open_dataset(folder)
