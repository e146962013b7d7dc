"""Converters of the official downloads, on small synthetic downloads and on real Decathlon files."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pytest

from rfmedsam2.errors import DatasetError, UsageError
from rfmedsam2.pipeline.datasets.amos22 import convert_amos22
from rfmedsam2.pipeline.datasets.btcv import convert_btcv
from rfmedsam2.pipeline.datasets.builder import new_dataset
from rfmedsam2.pipeline.datasets.conversion import ConvertOptions
from rfmedsam2.pipeline.datasets.msd import convert_msd, convert_nnunet_v1
from rfmedsam2.store.raw import open_dataset

AFFINE = np.array([[-1.5, 0, 0, 90], [0, -1.5, 0, 80], [0, 0, 3.0, -40], [0, 0, 0, 1]])


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_pair(image: Path, label: Path, *, highest: int = 13, channels: int = 1) -> None:
    rng = np.random.default_rng(len(image.name))
    shape = (6, 5, 4) if channels == 1 else (6, 5, 4, channels)
    write(image, rng.integers(-1000, 1000, shape).astype(np.int16))
    labels = rng.integers(0, highest + 1, (6, 5, 4)).astype(np.uint8)
    labels[0, 0, 0] = highest
    write(label, labels)


def names_in(raw: Path) -> list[str]:
    return [p.name for p in raw.iterdir()] if raw.exists() else []


@pytest.fixture
def btcv(tmp_path: Path) -> Path:
    home = tmp_path / "download" / "RawData"
    for number in ("0001", "0002", "0021"):
        write_pair(home / f"Training/img/img{number}.nii.gz", home / f"Training/label/label{number}.nii.gz")
    write(home / "Testing/img/img0061.nii.gz", np.zeros((6, 5, 4), np.int16))
    (home / "Training/img/._img0001.nii.gz").write_bytes(b"mac")
    return tmp_path / "download"


@pytest.fixture
def amos(tmp_path: Path) -> Path:
    home = tmp_path / "amos22"
    parts = {"Tr": ("0001", "0004", "0507"), "Va": ("0008", "0544")}
    for part, numbers in parts.items():
        for n in numbers:
            image, label = home / f"images{part}/amos_{n}.nii.gz", home / f"labels{part}/amos_{n}.nii.gz"
            write_pair(image, label, highest=15)
    for n in ("0002", "0600"):
        write(home / f"imagesTs/amos_{n}.nii.gz", np.zeros((6, 5, 4), np.int16))
    entries = {
        name: [{"image": f"./images{p}/amos_{n}.nii.gz", "label": f"./labels{p}/amos_{n}.nii.gz"} for n in parts[p]]
        for name, p in (("training", "Tr"), ("validation", "Va"))
    }
    labels = {str(i): f"organ {i}" for i in range(16)}
    (home / "dataset.json").write_text(json.dumps({"labels": labels, "test": [], **entries}))
    return home


@pytest.fixture
def msd(tmp_path: Path) -> Path:
    home = tmp_path / "Task05_Prostate"
    for n in ("00", "01"):
        image, label = home / f"imagesTr/prostate_{n}.nii.gz", home / f"labelsTr/prostate_{n}.nii.gz"
        write_pair(image, label, highest=2, channels=2)
    write(home / "imagesTs/prostate_02.nii.gz", np.ones((6, 5, 4, 2), np.float32))
    (home / "imagesTr/._prostate_00.nii.gz").write_bytes(b"mac")
    write_msd_json(home)
    return home


def write_msd_json(home: Path, **changes: object) -> None:
    content = {
        "name": "PROSTATE",
        "license": "CC-BY-SA 4.0",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "numTraining": 2,
        "numTest": 1,
        "training": [
            {"image": f"./imagesTr/prostate_{n}.nii.gz", "label": f"./labelsTr/prostate_{n}.nii.gz"}
            for n in ("00", "01")
        ],
        "test": ["./imagesTs/prostate_02.nii.gz"],
    }
    (home / "dataset.json").write_text(json.dumps({**content, **changes}))


def test_btcv_becomes_a_raw_dataset(btcv: Path, tmp_path: Path) -> None:
    result = convert_btcv(btcv, tmp_path / "raw")
    assert result.folder.name == "Dataset217_BTCV"
    assert (result.training, result.test) == (3, 1)
    assert sorted(str(p.relative_to(result.folder)) for p in result.folder.rglob("*.*")) == [
        "dataset.json",
        "imagesTr/img0001_0000.nii.gz",
        "imagesTr/img0002_0000.nii.gz",
        "imagesTr/img0021_0000.nii.gz",
        "imagesTs/img0061_0000.nii.gz",
        "labelsTr/img0001.nii.gz",
        "labelsTr/img0002.nii.gz",
        "labelsTr/img0021.nii.gz",
    ]
    record = json.loads((result.folder / "dataset.json").read_text())
    assert record["labels"]["left_adrenal_gland"] == 13
    assert record["numTraining"] == 3
    original = btcv / "RawData/Training/img/img0002.nii.gz"
    assert (result.folder / "imagesTr/img0002_0000.nii.gz").read_bytes() == original.read_bytes()
    assert names_in(tmp_path / "raw") == ["Dataset217_BTCV"]


def test_btcv_names_the_official_cases_that_are_not_there(btcv: Path, tmp_path: Path) -> None:
    warnings = "\n".join(convert_btcv(btcv, tmp_path / "raw").warnings)
    assert "27 training case(s) missing" in warnings
    assert "img0040" in warnings
    assert "1 test cases" in warnings


def test_all_faults_of_all_cases_are_in_one_error_and_nothing_is_written(btcv: Path, tmp_path: Path) -> None:
    home = btcv / "RawData/Training"
    write(home / "label/label0001.nii.gz", np.full((6, 5, 4), 17, np.uint8))
    write(home / "label/label0002.nii.gz", np.zeros((6, 5, 3), np.uint8))
    (home / "img/img0021.nii.gz").write_bytes(b"not an image")
    write(home / "img/img0022.nii.gz", np.zeros((6, 5, 4), np.int16))
    with pytest.raises(DatasetError) as caught:
        convert_btcv(btcv, tmp_path / "raw")
    text = str(caught.value)
    assert "4 fault(s)" in text
    for words in (
        "img0001: the label holds 17",
        "img0002: image and label differ in geometry: shape",
        "img0021",
        "img0022: missing label",
    ):
        assert words in text
    assert names_in(tmp_path / "raw") == []


def test_a_truncated_label_is_a_fault(btcv: Path, tmp_path: Path) -> None:
    label = btcv / "RawData/Training/label/label0001.nii.gz"
    label.write_bytes(label.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="img0001"):
        convert_btcv(btcv, tmp_path / "raw")


@pytest.mark.parametrize("how", ["hardlink", "symlink"])
def test_files_can_be_linked(btcv: Path, tmp_path: Path, how: str) -> None:
    result = convert_btcv(btcv, tmp_path / "raw", options=ConvertOptions(how=how))
    placed = result.folder / "labelsTr/img0001.nii.gz"
    assert placed.is_symlink() == (how == "symlink")
    assert placed.samefile(btcv / "RawData/Training/label/label0001.nii.gz")


def test_an_existing_dataset_is_not_touched_without_force(btcv: Path, tmp_path: Path) -> None:
    folder = convert_btcv(btcv, tmp_path / "raw").folder
    (folder / "mine.txt").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        convert_btcv(btcv, tmp_path / "raw")
    assert (folder / "mine.txt").exists()
    convert_btcv(btcv, tmp_path / "raw", options=ConvertOptions(force=True))
    assert not (folder / "mine.txt").exists()


def test_a_failed_forced_conversion_keeps_the_old_dataset(btcv: Path, tmp_path: Path) -> None:
    folder = convert_btcv(btcv, tmp_path / "raw").folder
    (btcv / "RawData/Training/img/img0001.nii.gz").unlink()
    with pytest.raises(DatasetError):
        convert_btcv(btcv, tmp_path / "raw", options=ConvertOptions(force=True))
    assert (folder / "imagesTr/img0001_0000.nii.gz").exists()
    assert names_in(tmp_path / "raw") == [folder.name]


@pytest.mark.parametrize("converter", [convert_btcv, convert_amos22, convert_msd, convert_nnunet_v1])
def test_a_folder_that_is_no_download_is_named_with_what_is_in_it(converter, tmp_path: Path) -> None:
    (tmp_path / "download").mkdir()
    (tmp_path / "download/readme.txt").write_text("")
    with pytest.raises(DatasetError, match=r"readme\.txt"):
        converter(tmp_path / "download", tmp_path / "raw")
    with pytest.raises(DatasetError, match="download does not exist"):
        converter(tmp_path / "absent", tmp_path / "raw")
    assert names_in(tmp_path / "raw") == []


def test_amos_task_1_takes_ct_only(amos: Path, tmp_path: Path) -> None:
    result = convert_amos22(amos, tmp_path / "raw")
    assert result.folder.name == "Dataset218_AMOS22_CT"
    assert {p.name for p in (result.folder / "labelsTr").iterdir()} == {
        "amos_0001.nii.gz",
        "amos_0004.nii.gz",
        "amos_0008.nii.gz",
    }
    assert [p.name for p in (result.folder / "imagesTs").iterdir()] == ["amos_0002_0000.nii.gz"]
    record = json.loads((result.folder / "dataset.json").read_text())
    assert record["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    assert record["channel_names"] == {"0": "CT"}
    assert record["labels"]["prostate_uterus"] == 15
    assert any("2 CT cases, officially 200" in w for w in result.warnings)


def test_amos_task_2_takes_ct_and_mr(amos: Path, tmp_path: Path) -> None:
    result = convert_amos22(amos.parent, tmp_path / "raw", task=2)
    assert result.folder.name == "Dataset219_AMOS22"
    assert (result.training, result.test) == (5, 2)
    # nnU-Net normalizes a channel called CT by global statistics; mixed modalities need each image's own
    assert json.loads((result.folder / "dataset.json").read_text())["channel_names"] != {"0": "CT"}


def test_amos_reports_what_dataset_json_promises_and_folders_lack(amos: Path, tmp_path: Path) -> None:
    (amos / "imagesTr/amos_0001.nii.gz").unlink()
    (amos / "labelsTr/amos_0001.nii.gz").unlink()
    (amos / "labelsVa/amos_0008.nii.gz").unlink()
    with pytest.raises(DatasetError) as caught:
        convert_amos22(amos, tmp_path / "raw")
    assert "amos_0001: missing image and label" in str(caught.value)
    assert "amos_0008: missing label" in str(caught.value)


def test_amos_leaves_out_damaged_and_foreign_files(amos: Path, tmp_path: Path) -> None:
    for name in ("amos_5514", "other"):
        write_pair(amos / f"imagesTr/{name}.nii.gz", amos / f"labelsTr/{name}.nii.gz")
    result = convert_amos22(amos, tmp_path / "raw", task=2)
    text = "\n".join(result.warnings)
    assert "amos_5514.nii.gz: skipped, known to be damaged" in text
    assert "other.nii.gz: skipped" in text
    assert result.training == 5


def test_amos_works_from_the_folders_alone(amos: Path, tmp_path: Path) -> None:
    (amos / "dataset.json").unlink()
    result = convert_amos22(amos, tmp_path / "raw")
    assert result.training == 3
    assert any("dataset.json does not exist" in w for w in result.warnings)


def test_amos_refuses_other_labels_and_a_broken_dataset_json(amos: Path, tmp_path: Path) -> None:
    (amos / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "tumor"}}))
    with pytest.raises(DatasetError, match="expected 0 to 15"):
        convert_amos22(amos, tmp_path / "raw")
    for content in ("[1, 2", "[1, 2]", '{"labels": {"liver": "6"}}', '{"training": 5}'):
        (amos / "dataset.json").write_text(content)
        with pytest.raises(DatasetError, match=r"dataset\.json is not AMOS22's.*Found .*Error"):
            convert_amos22(amos, tmp_path / "raw")


def test_amos_has_two_tasks(amos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Unknown AMOS22 task"):
        convert_amos22(amos, tmp_path / "raw", task=3)


def test_msd_channels_become_files_with_the_sources_geometry(msd: Path, tmp_path: Path) -> None:
    result = convert_msd(msd, tmp_path / "raw")
    assert result.folder.name == "Dataset005_Prostate"
    assert (result.training, result.test, result.warnings) == (2, 1, ())
    source = nibabel.load(msd / "imagesTr/prostate_01.nii.gz")
    for channel in (0, 1):
        written = nibabel.load(result.folder / f"imagesTr/prostate_01_000{channel}.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(source.dataobj)[..., channel])
        assert written.get_data_dtype() == np.int16
        np.testing.assert_array_equal(written.affine, source.affine)
        assert written.header["sform_code"] == source.header["sform_code"]
        assert written.header["qform_code"] == source.header["qform_code"]
    record = json.loads((result.folder / "dataset.json").read_text())
    assert record["channel_names"] == {"0": "T2", "1": "ADC"}
    assert record["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    assert record["license"] == "CC-BY-SA 4.0"


def test_msd_number_and_name_can_be_chosen(msd: Path, tmp_path: Path) -> None:
    assert convert_msd(msd, tmp_path / "raw", dataset_id=105).folder.name == "Dataset105_Prostate"
    plain = msd.rename(tmp_path / "prostate")
    with pytest.raises(UsageError, match="number or name"):
        convert_msd(plain, tmp_path / "raw")
    assert convert_msd(plain, tmp_path / "raw", dataset_id=7).folder.name == "Dataset007_PROSTATE"


def test_msd_counts_channels_and_names_missing_cases(msd: Path, tmp_path: Path) -> None:
    write(msd / "imagesTr/prostate_00.nii.gz", np.zeros((6, 5, 4), np.int16))
    (msd / "imagesTs/prostate_02.nii.gz").unlink()
    with pytest.raises(DatasetError) as caught:
        convert_msd(msd, tmp_path / "raw")
    assert "prostate_00: the image has 1 channels, expected 2" in str(caught.value)
    assert "prostate_02: dataset.json lists this test case" in str(caught.value)


def test_msd_paths_in_dataset_json_cannot_leave_the_download(msd: Path, tmp_path: Path) -> None:
    write_msd_json(msd, training=[{"image": "../../secret/prostate_00.nii.gz"}, {"image": "/etc/prostate_01.nii.gz"}])
    assert convert_msd(msd, tmp_path / "raw").training == 2


@pytest.mark.parametrize(
    "changes",
    [{"modality": ["T2"]}, {"labels": {"a": "background"}}, {"training": 4}, {"modality": {"1": "T2", "2": "ADC"}}],
)
def test_msd_refuses_a_dataset_json_of_another_kind(msd: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    write_msd_json(msd, **changes)
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        convert_msd(msd, tmp_path / "raw")


@pytest.mark.data
def test_real_decathlon_files_convert_unchanged(data_root: Path, tmp_path: Path) -> None:
    real = data_root / "hippocampus" / "Dataset004_Hippocampus"
    home = tmp_path / "Task04_Hippocampus"
    ids = sorted(p.name.removesuffix(".nii.gz") for p in (real / "labelsTr").iterdir())[:3]
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (home / folder).mkdir(parents=True)
    for case in ids:
        shutil.copyfile(real / f"imagesTr/{case}_0000.nii.gz", home / f"imagesTr/{case}.nii.gz")
        shutil.copyfile(real / f"labelsTr/{case}.nii.gz", home / f"labelsTr/{case}.nii.gz")
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    training = [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in ids]
    write_msd_json(home, modality={"0": "MRI"}, labels=labels, training=training, test=[], numTraining=3, numTest=0)
    result = convert_msd(home, tmp_path / "raw")
    assert (result.training, result.test, result.warnings) == (3, 0, ())
    for case in ids:
        for name in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
            assert (result.folder / name).read_bytes() == (real / name).read_bytes()


# --- nnU-Net v1 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    """Two channels in two files each; dataset.json names cases without a channel number."""
    home = tmp_path / "nnUNet_raw_data" / "Task005_Prostate"
    for case in ("00", "01", "02"):
        part = "imagesTs" if case == "02" else "imagesTr"
        for channel in (0, 1):
            write(home / part / f"prostate_{case}_{channel:04d}.nii.gz", np.full((6, 5, 4), channel, np.int16))
        if case != "02":
            write(home / f"labelsTr/prostate_{case}.nii.gz", np.arange(120).reshape(6, 5, 4).astype(np.uint8) % 3)
    write_msd_json(home)
    return home


def test_nnunet_v1_becomes_a_raw_dataset_with_labels_by_name(version_1: Path, tmp_path: Path) -> None:
    result = convert_nnunet_v1(version_1, tmp_path / "raw")
    assert (result.folder.name, result.training, result.test) == ("Dataset005_Prostate", 2, 1)
    record = json.loads((result.folder / "dataset.json").read_text())
    assert record["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    assert record["channel_names"] == {"0": "T2", "1": "ADC"}
    found = open_dataset(result.folder)
    assert found.faults == ()
    assert [case.id for case in found.training] == ["prostate_00", "prostate_01"]
    for name in ("imagesTr/prostate_01_0001.nii.gz", "imagesTs/prostate_02_0000.nii.gz", "labelsTr/prostate_00.nii.gz"):
        assert (result.folder / name).read_bytes() == (version_1 / name).read_bytes()


def test_nnunet_v1_names_channels_that_are_missing_or_elsewhere(version_1: Path, tmp_path: Path) -> None:
    (version_1 / "imagesTr/prostate_00_0001.nii.gz").unlink()
    write(version_1 / "imagesTr/prostate_01_0001.nii.gz", np.zeros((6, 5, 4), np.int16), np.diag([3.0, 1, 1, 1]))
    with pytest.raises(DatasetError) as caught:
        convert_nnunet_v1(version_1, tmp_path / "raw")
    assert "missing imagesTr/prostate_00_0001.nii.gz" in str(caught.value)
    assert "prostate_01_0001.nii.gz is not on the grid of prostate_01_0000.nii.gz" in str(caught.value)
    assert names_in(tmp_path / "raw") == []


@pytest.mark.parametrize("force", [True, False])
def test_a_dataset_that_appears_meanwhile_is_replaced_by_force_alone(tmp_path: Path, force: bool) -> None:
    """Conversions take minutes, in which another run or a person may make the same dataset."""
    expected = nullcontext() if force else pytest.raises(UsageError, match="exists already")
    with expected, new_dataset(tmp_path, "Dataset001_A", force=force) as building:
        (building / "new").touch()
        write(tmp_path / "Dataset001_A/imagesTr/a_0000.nii.gz", np.zeros((2, 2, 2), np.int16))
    assert names_in(tmp_path) == ["Dataset001_A"]
    assert names_in(tmp_path / "Dataset001_A") == ["new" if force else "imagesTr"]


def test_what_a_killed_conversion_left_is_removed_by_the_next(msd: Path, tmp_path: Path) -> None:
    left = tmp_path / "raw" / ".building-left" / "Dataset001_A"
    left.mkdir(parents=True)
    result = convert_msd(msd, tmp_path / "raw")
    assert names_in(tmp_path / "raw") == [result.folder.name]


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "1": "x", "01": "y"},
        {"0": "background", "1": ""},
        {"0": "air", "1": "background"},
        {"0": "background", "1": "x", "2": "x"},
    ],
)
def test_a_table_that_says_nothing_by_name_is_refused_before_files_are_read(version_1, tmp_path, labels) -> None:
    content = json.loads((version_1 / "dataset.json").read_text())
    (version_1 / "dataset.json").write_text(json.dumps(content | {"labels": labels}))
    with pytest.raises(DatasetError, match="one name for each, background for 0 alone") as caught:
        convert_nnunet_v1(version_1, tmp_path / "raw")
    assert f"{version_1 / 'dataset.json'}" in str(caught.value)


def test_the_other_of_both_layouts_names_its_converter(version_1: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"as nnU-Net v1 names them.*Found prostate_00_0000.nii.gz.*convert nnunetv1"):
        convert_msd(version_1, tmp_path / "raw")
    for file in (version_1 / "imagesTr").iterdir():
        file.rename(file.with_name(file.name.replace("_0000", ""))) if "_0000" in file.name else file.unlink()
    with pytest.raises(UsageError, match=r"as the Decathlon names them.*Found prostate_00.nii.gz.*rfmed_convert msd"):
        convert_nnunet_v1(version_1, tmp_path / "raw")


def test_nnunet_v1_with_values_as_decimals_and_lists_of_the_first_channel(version_1: Path, tmp_path: Path) -> None:
    """As pandas writes whole numbers, and as lists of the files that are there come out."""
    training = [{"image": f"./imagesTr/prostate_{n}_0000.nii.gz"} for n in ("00", "01")]
    test = ["./imagesTs/prostate_02_0000.nii.gz"]
    labels = {"0.0": "background", "1.0": "PZ", "2.0": "TZ"}
    write_msd_json(version_1, labels=labels, training=training, test=test)
    result = convert_nnunet_v1(version_1, tmp_path / "raw")
    assert (result.training, result.test, result.warnings) == (2, 1, ())
    assert json.loads((result.folder / "dataset.json").read_text())["labels"] == {"background": 0, "PZ": 1, "TZ": 2}


def test_an_id_that_ends_like_a_channel_stays(version_1: Path, tmp_path: Path) -> None:
    for file in sorted(version_1.rglob("*.nii.gz")):
        file.rename(file.with_name(re.sub(r"(prostate_\d\d)", r"\1_0000", file.name)))
    training = [{"image": f"./imagesTr/prostate_{n}_0000.nii.gz"} for n in ("00", "01")]
    write_msd_json(version_1, training=training, test=["./imagesTs/prostate_02_0000.nii.gz"])
    result = convert_nnunet_v1(version_1, tmp_path / "raw")
    assert (result.training, result.test, result.warnings) == (2, 1, ())
    assert (result.folder / "imagesTr/prostate_00_0000_0001.nii.gz").is_file()
