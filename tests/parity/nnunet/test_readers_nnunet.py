"""Arrays and spacings equal those of nnU-Net's readers on real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from rfmedsam2.store.images import read_channels, read_image, read_label, write_label
from rfmedsam2.store.orientation import reoriented
from rfmedsam2.store.raw import open_dataset, read_case

SAMPLES = [
    "nifti/FLAIR.nii.gz",
    "nrrd/FLAIR.nrrd",
    "nrrd/brain1_image.nrrd",
    "nrrd/prostate_phantom_image.nrrd",
    "mha/mha.mha",
    "mha/10000_1000000_adc.mha",
    "mha/10000_1000000_prostate_seg.nii.gz",
    "dicom_ct_totalseg20_seg.nii.gz",
]
DATASETS = [
    "hippocampus/Dataset004_Hippocampus",
    "ct-organs-totalsegmentator/Dataset110_TSAbdomenCT",
    "brats-like-4ch/Dataset114_BraTSlike4ch",
    "ivadomed-samples/Dataset113_SpinalCord3ch",
]


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_equals_simpleitkio(data_root: Path, name: str) -> None:
    path = data_root / "format-samples" / name
    expected, properties = SimpleITKIO().read_images((str(path),))
    volume, _ = read_image(path)
    np.testing.assert_array_equal(volume.array, expected)
    assert list(volume.grid.spacing_zyx_mm) == properties["spacing"]
    np.testing.assert_allclose(volume.grid.origin_xyz_mm, properties["sitk_stuff"]["origin"], atol=1e-4)
    np.testing.assert_allclose(np.ravel(volume.grid.direction), properties["sitk_stuff"]["direction"], atol=1e-6)


@pytest.mark.parametrize("name", DATASETS)
def test_cases_equal_simpleitkio(data_root: Path, name: str) -> None:
    dataset = open_dataset(data_root / name)
    for case in dataset.training[:3]:
        expected, properties = SimpleITKIO().read_images([str(p) for p in case.images])
        volume, _ = read_case(case, channels=len(dataset.json.channels))
        np.testing.assert_array_equal(volume.array, expected)
        assert list(volume.grid.spacing_zyx_mm) == properties["spacing"]
        assert case.label is not None
        label, _ = SimpleITKIO().read_seg(str(case.label))
        np.testing.assert_array_equal(read_label(case.label)[0].array, label)


@pytest.mark.parametrize("name", [s for s in SAMPLES if s.endswith(".nii.gz")])
def test_reoriented_equals_nibabelio_with_reorient(data_root: Path, name: str, tmp_path: Path) -> None:
    path = data_root / "format-samples" / name
    reader = NibabelIOWithReorient()
    expected, properties = reader.read_images((str(path),))
    volume, turn = reoriented(read_image(path)[0], "RAS")
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_allclose(volume.grid.spacing_zyx_mm, properties["spacing"], rtol=1e-6)
    # the way back: both writers put the same voxel into the file
    labels = (volume.array[0] > np.median(volume.array)).astype(np.uint8)
    reader.write_seg(labels, str(tmp_path / "theirs.nii.gz"), properties)
    write_label(tmp_path / "ours.nii.gz", turn.undo(labels), read_image(path)[1])
    ours, theirs = read_label(tmp_path / "ours.nii.gz")[0], read_label(tmp_path / "theirs.nii.gz")[0]
    np.testing.assert_array_equal(ours.array, theirs.array)
    assert ours.grid.mismatch(theirs.grid) is None


@pytest.mark.parametrize("name", ["nrrd/FLAIR.nrrd", "nrrd/prostate_phantom_image.nrrd", "mha/10000_1000000_adc.mha"])
def test_reoriented_equals_simpleitkio_with_reorient(data_root: Path, name: str) -> None:
    path = data_root / "format-samples" / name
    expected, properties = SimpleITKIOWithReorient().read_images((str(path),))
    volume, _ = reoriented(read_image(path)[0], "RAS")
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_allclose(volume.grid.spacing_zyx_mm, properties["spacing"], rtol=1e-12)


def test_two_files_of_one_case_equal_simpleitkio(data_root: Path) -> None:
    paths = [data_root / "format-samples" / "mha" / f"10000_1000000_{m}.mha" for m in ("adc", "hbv")]
    expected, _ = SimpleITKIO().read_images([str(p) for p in paths])
    volume, header = read_channels(paths)
    np.testing.assert_array_equal(volume.array, expected)
    assert header.channels == 1
