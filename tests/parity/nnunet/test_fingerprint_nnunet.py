"""The fingerprint against nnU-Net's extractor (run case by case in this process)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from rfmedsam2.pipeline.preprocessing.fingerprint import fingerprint
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.raw import RawDataset, open_dataset

SAMPLES = 200_000


def subset(source: Path, target: Path, cases: int) -> RawDataset:
    """A dataset of the first `cases` training cases."""
    names = sorted(p.name for p in (source / "labelsTr").iterdir() if p.name.endswith(".nii.gz"))[:cases]
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
    for name in names:
        shutil.copy2(source / "labelsTr" / name, target / "labelsTr" / name)
        for image in (source / "imagesTr").glob(name.removesuffix(".nii.gz") + "_????.nii.gz"):
            shutil.copy2(image, target / "imagesTr" / image.name)
    content = json.loads((source / "dataset.json").read_text())
    content["numTraining"] = cases
    (target / "dataset.json").write_text(json.dumps(content))
    return open_dataset(target)


def theirs(dataset: RawDataset) -> tuple[list, list, list[np.ndarray], float]:
    """Shapes after crop, spacings, pooled samples per channel, median relative size: as the extractor's `run`."""
    found = [
        DatasetFingerprintExtractor.analyze_case([str(p) for p in case.images], str(case.label), SimpleITKIO, SAMPLES)
        for case in dataset.training
    ]
    pooled = [np.concatenate([f[2][c] for f in found]) for c in range(len(dataset.json.channels))]
    return [f[0] for f in found], [f[1] for f in found], pooled, float(np.median([f[4] for f in found]))


def compare(dataset: RawDataset, ours: Fingerprint) -> None:
    shapes, spacings, pooled, relative = theirs(dataset)
    assert [case.shape_after_crop_zyx for case in ours.cases] == [tuple(s) for s in shapes]
    assert [case.spacing_zyx_mm for case in ours.cases] == [tuple(float(v) for v in s) for s in spacings]
    assert ours.median_relative_size_after_crop == relative
    for channel, pool in zip(ours.intensities, pooled, strict=True):
        # six standard errors of a sample of this size
        error = 6 * channel.std / np.sqrt(len(pool))
        assert abs(channel.mean - pool.mean(dtype=np.float64)) < error
        assert abs(channel.std - pool.std(dtype=np.float64)) < 3 * error + 1e-6
        assert channel.min <= pool.min()
        assert channel.max >= pool.max()
        for value, q in ((channel.percentile_00_5, 0.005), (channel.median, 0.5), (channel.percentile_99_5, 0.995)):
            # the rank of our percentile in their pool, to six standard errors (both sides, for ties)
            margin = 6 * np.sqrt(q * (1 - q) / len(pool)) + 2e-4
            assert np.mean(pool < value - 1e-4 * abs(value)) <= q + margin
            assert np.mean(pool <= value + 1e-4 * abs(value)) >= q - margin


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "cases"),
    [
        ("hippocampus/Dataset004_Hippocampus", 12),
        ("ct-organs-totalsegmentator/Dataset110_TSAbdomenCT", 2),
        ("brats-like-4ch/Dataset114_BraTSlike4ch", 1),
    ],
)
def test_real_datasets_agree_with_the_extractor(data_root, tmp_path, folder, cases):
    source = data_root / folder
    dataset = subset(source, tmp_path / source.name, cases)
    ours = fingerprint(dataset, Layout.under(tmp_path / "root"))
    assert [case.id for case in ours.cases] == [case.id for case in dataset.training]
    compare(dataset, ours)
