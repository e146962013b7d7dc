"""AMOS22 submissions: every fault is found, sound predictions give one reproducible zip."""

from __future__ import annotations

import gzip
import json
import zipfile
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pytest

from rfmedsam2.errors import SubmissionError, UsageError
from rfmedsam2.pipeline.datasets.amos22_submission import check_amos22, submit_amos22

AFFINE = np.array([[-1.5, 0.01, 0, 90], [-0.01, -1.5, 0, 80], [0, 0, 3.0, -40], [0, 0, 0, 1]])
SHAPE = (6, 5, 4)


def write(path: Path, array: np.ndarray, *, affine: np.ndarray = AFFINE, codes: tuple[int, int] = (1, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine)
    image.set_qform(affine, code=codes[0])
    image.set_sform(affine, code=codes[1])
    nibabel.save(image, path)


def labels(dtype: type = np.uint8) -> np.ndarray:
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 16).astype(dtype)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in ("0002", "0003", "0600"):
        write(tmp_path / f"imagesTs/amos_{number}_0000.nii.gz", np.zeros(SHAPE, np.int16))
    return tmp_path / "imagesTs"


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    for number in ("0002", "0003", "0600"):
        write(tmp_path / f"preds/amos_{number}.nii.gz", labels())
    (tmp_path / "preds/labels.json").write_text("{}")
    return tmp_path / "preds"


def refusal(predictions: Path, images: Path, tmp_path: Path, **options: object) -> dict[tuple[str, str], str]:
    """(case, kind) -> messages of the refused submission; nothing must have been written."""
    with pytest.raises(SubmissionError) as caught:
        submit_amos22(predictions, images, tmp_path / "amos.zip", **options)
    assert not list(tmp_path.glob("*.zip"))
    assert not list(tmp_path.glob(".partial*"))
    for fault in caught.value.faults:
        assert fault.message in str(caught.value)
    found: dict[tuple[str, str], str] = {}
    for fault in caught.value.faults:
        found[fault.case, fault.kind] = "; ".join(filter(None, [found.get((fault.case, fault.kind)), fault.message]))
    return found


def test_sound_predictions_become_a_zip_with_results(predictions: Path, images: Path, tmp_path: Path) -> None:
    report = submit_amos22(predictions, images, tmp_path / "amos.zip")
    assert report.faults == ()
    assert report.ignored == ("labels.json",)
    with zipfile.ZipFile(tmp_path / "amos.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"results/amos_{n}.nii.gz" for n in ("0002", "0003", "0600")]
        assert archive.read("results/amos_0002.nii.gz") == (predictions / "amos_0002.nii.gz").read_bytes()


def test_the_same_predictions_give_the_same_bytes(predictions: Path, images: Path, tmp_path: Path) -> None:
    write(predictions / "amos_0003.nii.gz", labels(np.int16))
    first = submit_amos22(predictions, images, tmp_path / "a.zip")
    (predictions / "amos_0002.nii.gz").touch()
    second = submit_amos22(predictions, images, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert first.sha256 == second.sha256


def test_other_integer_types_are_rewritten_with_the_same_geometry(
    predictions: Path, images: Path, tmp_path: Path
) -> None:
    write(predictions / "amos_0003.nii.gz", labels(np.int32))
    report = submit_amos22(predictions, images, tmp_path / "amos.zip")
    assert report.rewritten == ("amos_0003",)
    with zipfile.ZipFile(tmp_path / "amos.zip") as archive:
        raw = gzip.decompress(archive.read("results/amos_0003.nii.gz"))
    written = nibabel.Nifti1Image.from_stream(BytesIO(raw))
    image = nibabel.load(images / "amos_0003_0000.nii.gz")
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), labels())
    np.testing.assert_array_equal(written.affine, image.affine)
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 2)


def test_missing_and_extra_files_are_named(predictions: Path, images: Path, tmp_path: Path) -> None:
    (predictions / "amos_0002.nii.gz").rename(predictions / "amos_0002_0000.nii.gz")
    write(predictions / "amos_0009.nii.gz", labels())
    faults = refusal(predictions, images, tmp_path)
    assert set(faults) == {("amos_0002", "missing"), ("amos_0002_0000", "extra"), ("amos_0009", "extra")}
    assert "without _0000" in faults["amos_0002_0000", "extra"]


def test_task_1_is_ct_alone(predictions: Path, images: Path, tmp_path: Path) -> None:
    assert refusal(predictions, images, tmp_path, task=1) == {
        ("amos_0600", "extra"): "an MR case does not belong to task 1"
    }
    (predictions / "amos_0600.nii.gz").unlink()
    assert submit_amos22(predictions, images, tmp_path / "ct.zip", task=1).expected == ("amos_0002", "amos_0003")
    assert [fault.kind for fault in check_amos22(predictions, images, task=2).faults] == ["missing"]


@pytest.mark.parametrize(
    ("array", "options", "kind", "words"),
    [
        (np.zeros((6, 5, 3), np.uint8), {}, "geometry", "shape"),
        (labels(), {"affine": AFFINE + np.eye(4) * [0, 0, 0.01, 0]}, "geometry", "affine"),
        (labels(), {"affine": AFFINE * [[-1], [1], [1], [1]]}, "geometry", "affine"),
        (labels(), {"codes": (1, 1)}, "geometry", "sform_code is 1, the image's is 2"),
        (labels(), {"codes": (0, 2)}, "geometry", "qform_code is 0"),
        (labels(np.float32), {}, "dtype", "float32"),
        (labels() + np.uint8(1), {}, "labels", "from 1 to 16"),
        (labels(np.int16) - np.int16(1), {}, "labels", "from -1 to 14"),
        (np.stack([labels()] * 2, axis=-1), {}, "geometry", "2 channels"),
    ],
)
def test_each_fault_of_a_file_is_found(
    array: np.ndarray, options: dict, kind: str, words: str, predictions: Path, images: Path, tmp_path: Path
) -> None:
    write(predictions / "amos_0003.nii.gz", array, **options)
    faults = refusal(predictions, images, tmp_path)
    assert words in faults["amos_0003", kind]
    assert {case for case, _ in faults} == {"amos_0003"}


def test_scaled_voxels_are_refused(predictions: Path, images: Path, tmp_path: Path) -> None:
    raw = bytearray(gzip.decompress((predictions / "amos_0003.nii.gz").read_bytes()))
    raw[112:116] = np.float32(2).tobytes()
    (predictions / "amos_0003.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    assert "slope" in refusal(predictions, images, tmp_path)["amos_0003", "scaling"]


def test_faults_of_all_files_come_at_once(predictions: Path, images: Path, tmp_path: Path) -> None:
    data = (predictions / "amos_0002.nii.gz").read_bytes()
    (predictions / "amos_0002.nii.gz").write_bytes(data[: len(data) // 2])
    write(predictions / "amos_0003.nii.gz", np.full((6, 5, 3), 99, np.uint8), codes=(0, 2))
    (predictions / "amos_0600.nii.gz").unlink()
    with pytest.raises(SubmissionError) as caught:
        submit_amos22(predictions, images, tmp_path / "amos.zip")
    assert [(f.case, f.kind) for f in caught.value.faults] == [
        ("amos_0002", "unreadable"),
        ("amos_0003", "geometry"),
        ("amos_0003", "geometry"),
        ("amos_0003", "labels"),
        ("amos_0600", "missing"),
    ]


def test_the_report_is_json(predictions: Path, images: Path, tmp_path: Path) -> None:
    content = json.loads(json.dumps(submit_amos22(predictions, images, tmp_path / "amos.zip").as_json()))
    assert content["archive"].endswith("amos.zip")
    assert content["expected"] == ["amos_0002", "amos_0003", "amos_0600"]
    assert len(content["sha256"]) == 64


def test_an_older_archive_survives_a_refusal(predictions: Path, images: Path, tmp_path: Path) -> None:
    submit_amos22(predictions, images, tmp_path / "amos.zip")
    before = (tmp_path / "amos.zip").read_bytes()
    (predictions / "amos_0002.nii.gz").unlink()
    with pytest.raises(SubmissionError):
        submit_amos22(predictions, images, tmp_path / "amos.zip")
    assert (tmp_path / "amos.zip").read_bytes() == before


def test_absent_or_empty_folders_and_other_archives_are_refused(
    predictions: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in (
        (tmp_path / "absent", images, tmp_path / "a.zip"),
        (predictions, tmp_path / "absent", tmp_path / "a.zip"),
        (predictions, tmp_path / "empty", tmp_path / "a.zip"),
        (predictions, images, tmp_path / "a.tar"),
    ):
        with pytest.raises(UsageError):
            submit_amos22(*arguments)
