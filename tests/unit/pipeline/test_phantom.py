"""The synthetic abdomen: complete, oriented, realistic in its intensities, reproducible."""

from __future__ import annotations

import json
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from rfmedsam2.errors import StoreError, UsageError
from rfmedsam2.pipeline.datasets.label_tables import BTCV_LABELS
from rfmedsam2.pipeline.datasets.phantom import make_phantom, phantom_case


@pytest.fixture(scope="module")
def case():
    return phantom_case(seed=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom(tmp_path_factory.mktemp("raw"), cases=2, test_cases=1, shape_zyx=(20, 48, 48), seed=7)


def center_zyx(labels: np.ndarray, name: str) -> np.ndarray:
    return np.argwhere(labels == BTCV_LABELS[name]).mean(0)


def test_left_and_right_are_the_patients(case) -> None:
    # direction is the identity in LPS: x grows to the patient's left, y to the back, z to the head
    assert case.grid.direction == ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    middle = case.labels.shape[2] / 2
    for right in ("liver", "right_kidney", "gallbladder", "right_adrenal_gland", "inferior_vena_cava"):
        assert center_zyx(case.labels, right)[2] < middle
    for left in ("spleen", "left_kidney", "stomach", "left_adrenal_gland"):
        assert center_zyx(case.labels, left)[2] > middle


def test_head_is_up_and_spine_is_behind(case) -> None:
    kidney, liver, stomach = (center_zyx(case.labels, n) for n in ("right_kidney", "liver", "stomach"))
    assert kidney[0] < liver[0]
    assert kidney[1] > stomach[1]
    bone = np.argwhere(case.image > 350)
    bone = bone[np.abs(bone[:, 2] - case.image.shape[2] / 2) < 5]
    assert bone[:, 1].mean() > center_zyx(case.labels, "aorta")[1]
    lung_share = (case.image < -700)[:, 20:70, 20:70].mean((1, 2))
    assert lung_share[-5:].mean() > lung_share[:5].mean() + 0.2


def test_intensities_are_those_of_a_ct(case) -> None:
    assert case.image.dtype == np.int16
    assert case.image.min() >= -1024
    liver = case.image[case.labels == BTCV_LABELS["liver"]]
    assert 30 < np.median(liver) < 140
    assert 8 < liver.std() < 45
    assert np.median(case.image[:, :3]) == pytest.approx(-1000, abs=25)


def test_noise_is_correlated_between_neighbors(case) -> None:
    air = case.image[:, :8].astype(float)
    air -= air.mean()
    assert (air[..., 1:] * air[..., :-1]).mean() / (air**2).mean() > 0.2


def test_most_scans_are_portal_venous_and_the_aorta_tells_the_phase() -> None:
    brightness: dict[str, list[float]] = {}
    for seed in range(20):
        case = phantom_case((20, 48, 48), seed=seed)
        brightness.setdefault(case.phase, []).append(float(np.median(case.image[case.labels == BTCV_LABELS["aorta"]])))
    assert len(brightness["portal venous"]) > 8
    assert max(brightness["native"]) < min(brightness["portal venous"]) < min(brightness["arterial"])


def test_an_mr_is_positive_with_bright_fat() -> None:
    case = phantom_case(seed=0, modality="mr")
    assert case.image.min() >= 0
    assert case.phase == "T1"
    assert np.median(case.image[case.labels == BTCV_LABELS["liver"]]) > np.median(
        case.image[case.labels == BTCV_LABELS["spleen"]]
    )


def test_a_case_takes_little_cpu_time() -> None:
    began = time.thread_time()
    phantom_case((40, 96, 96), seed=1)
    assert time.thread_time() - began < 2


def test_the_dataset_is_nnunet_raw(dataset: Path) -> None:
    assert dataset.name == "Dataset900_PhantomCT"
    files = sorted(str(p.relative_to(dataset)) for p in dataset.rglob("*") if p.is_file())
    assert files == [
        "dataset.json",
        "imagesTr/phantom_001_0000.nii.gz",
        "imagesTr/phantom_002_0000.nii.gz",
        "imagesTs/phantom_003_0000.nii.gz",
        "labelsTr/phantom_001.nii.gz",
        "labelsTr/phantom_002.nii.gz",
        "labelsTs/phantom_003.nii.gz",
    ]
    record = json.loads((dataset / "dataset.json").read_text())
    assert record["channel_names"] == {"0": "CT"}
    assert record["labels"] == BTCV_LABELS
    assert record["numTraining"] == 2


def test_image_and_label_share_geometry_and_orientation_survives_the_file(dataset: Path) -> None:
    image = nibabel.load(dataset / "imagesTr/phantom_001_0000.nii.gz")
    label = nibabel.load(dataset / "labelsTr/phantom_001.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(image.affine, label.affine)
    assert image.shape == label.shape
    values = np.asanyarray(label.dataobj)

    def center_mm(name: str) -> np.ndarray:
        return nibabel.affines.apply_affine(label.affine, np.argwhere(values == BTCV_LABELS[name]).mean(0))

    # NIfTI's world is RAS: the liver lies to the right (+x), kidneys behind (-y) and below (-z)
    assert center_mm("liver")[0] > center_mm("spleen")[0]
    assert center_mm("right_kidney")[1] < center_mm("stomach")[1]
    assert center_mm("right_kidney")[2] < center_mm("liver")[2]


def test_cases_differ_in_spacing_and_content(dataset: Path) -> None:
    first, second = (nibabel.load(dataset / f"imagesTr/phantom_00{i}_0000.nii.gz") for i in (1, 2))
    assert not np.allclose(first.header.get_zooms(), second.header.get_zooms())


def test_the_same_seed_gives_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    again = make_phantom(tmp_path, cases=2, test_cases=1, shape_zyx=(20, 48, 48), seed=7)
    other = make_phantom(tmp_path / "other", cases=1, test_cases=0, shape_zyx=(20, 48, 48), seed=8)
    name = "imagesTr/phantom_001_0000.nii.gz"
    assert (again / name).read_bytes() == (dataset / name).read_bytes()
    assert (other / name).read_bytes() != (dataset / name).read_bytes()


def test_an_existing_dataset_is_kept_unless_forced(tmp_path: Path) -> None:
    settings = {"cases": 1, "test_cases": 0, "shape_zyx": (12, 32, 32)}
    folder = make_phantom(tmp_path, **settings)
    (folder / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        make_phantom(tmp_path, **settings)
    assert (folder / "note.txt").exists()
    make_phantom(tmp_path, **settings, force=True)
    assert not (folder / "note.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def broken(items, description, total):
        yield from list(items)[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_phantom(tmp_path, cases=2, shape_zyx=(12, 32, 32), track=broken)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("")
    with pytest.raises(StoreError, match="a file exists"):
        make_phantom(tmp_path / "raw", cases=1, shape_zyx=(12, 32, 32))


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("cases", 0, "number of cases"),
        ("test_cases", -1, "number of cases"),
        ("shape_zyx", (4, 96, 96), "too small"),
        ("spacing_mm", ((4.0, 2.5), (1.2, 1.6)), "spacing"),
        ("spacing_mm", ((-1.0, 2.5), (1.2, 1.6)), "spacing"),
    ],
)
def test_impossible_requests_are_refused(tmp_path: Path, argument: str, value: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_phantom(tmp_path, **{argument: value})
    assert list(tmp_path.iterdir()) == []
