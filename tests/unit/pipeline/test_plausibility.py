"""Doubts about an image: another modality than the model's, intensities far from its training's; else silence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from rfmedsam2.pipeline.prediction.plausibility import doubts_about, modality_named
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.store.formats.dicom_files import modality_of
from rfmedsam2.volume import Volume

RNG = np.random.default_rng(0)
CT = np.where(RNG.random((40, 50, 60)) < 0.4, -1000, RNG.normal(40, 60, (40, 50, 60))).astype(np.int16)
MR = np.where(RNG.random((40, 50, 60)) < 0.4, 0, RNG.gamma(4, 150, (40, 50, 60))).astype(np.int16)


def plan_of(*channels: str, low: float, high: float) -> Plan:
    """A plan without stages: what is compared are channel names and the training foreground's range."""
    found = IntensityStatistics(mean=0, median=0, std=1, min=low, max=high, percentile_00_5=low, percentile_99_5=high)
    return Plan.model_construct(
        channels=channels,
        intensities=(found,) * len(channels),
        labels=LabelSet(names={"background": 0, "a": 1}),
        stages={},
    )


CT_PLAN = plan_of("CT", low=-150, high=400)
MR_PLAN = plan_of("T1w", low=5, high=3000)


def volume_of(*channels: np.ndarray) -> Volume:
    return Volume.from_numpy(np.stack(channels), spacing_zyx_mm=(1, 1, 1))


def dicom(path: Path, modality: str | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    if modality is not None:
        data.Modality = modality
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("CT", "CT"), ("ct_venous", "CT"), ("MRI", "MR"), ("T1ce", "MR"), ("T2-FLAIR", "MR"), ("adc", "MR"), ("PET", "PT"),
     ("PET/CT", None), ("0", None), ("R", None), ("noNorm", None), ("contact", None), ("zscore", None),
     ("CTA", "CT"), ("CBCT", "CT"), ("TOF-MRA", "MR"), ("MPRAGE", "MR"), ("PDw", "MR"), ("bold", "MR"),
     ("magnetic resonance", "MR"), ("SPECT", "NM"), ("ultrasound", "US"), ("SPECT/CT", None)],
)  # fmt: skip
def test_channel_names_tell_the_modality(name, kind):
    assert modality_named(name) == kind


def test_the_usual_image_raises_no_doubt():
    assert doubts_about(volume_of(CT), CT_PLAN) == ()
    assert doubts_about(volume_of(MR), MR_PLAN) == ()
    assert doubts_about(volume_of(CT), plan_of("0", low=-150, high=400)) == ()
    assert doubts_about(volume_of(np.zeros_like(CT)), CT_PLAN) == ()  # empty: another fault
    # another scanner's scale of MR, which normalization takes away, and few negative voxels of its interpolation
    scaled = (MR * 9.0).astype(np.float32)
    scaled[0] = -300
    assert doubts_about(volume_of(scaled), MR_PLAN) == ()
    # a CT window stored from 0, as the training was
    assert doubts_about(volume_of(np.clip(CT, 0, None)), plan_of("CT", low=0, high=400)) == ()
    # a vessel: few voxels are as bright
    vessel = CT.copy()
    vessel[20, 20:24] = 380
    assert doubts_about(volume_of(vessel), plan_of("CT", low=250, high=600)) == ()


def test_other_images_are_doubted_with_the_reason():
    [mr] = doubts_about(volume_of(MR), CT_PLAN)
    assert "channel CT" in mr
    assert "no voxel is below 0, but the training foreground reaches -150 HU" in mr
    [shifted] = doubts_about(volume_of(CT + np.int16(1024)), CT_PLAN)  # stored without its intercept
    assert "no voxel is below 0" in shifted
    [floats] = doubts_about(volume_of(RNG.random((9, 9, 9)).astype(np.float32)), plan_of("CT", low=250, high=600))
    assert "0.0% of the voxels lie in its foreground's range, 250 to 600" in floats
    [ct] = doubts_about(volume_of(CT), MR_PLAN)
    assert "40% of the voxels are below -200, as air in CT" in ct
    assert "channel T1w" in ct
    second = doubts_about(volume_of(MR, CT), plan_of("T1", "T2", low=0, high=900))
    assert ["channel T2" in doubt for doubt in second] == [True]


@pytest.mark.parametrize("scaled", [CT / 1000, 2 * (CT - CT.min()) / np.ptp(CT) - 1, (CT - CT.mean()) / CT.std()])
def test_a_ct_that_was_scaled_is_doubted(scaled):
    """Its values lie in the foreground's range, all of them in a small part of it."""
    [doubt] = doubts_about(volume_of(scaled.astype(np.float32)), CT_PLAN)
    assert re.search(
        r"channel CT\): all voxels lie within [\d.]+ HU, .* foreground within 550: they look scaled", doubt
    )
    assert (
        doubts_about(volume_of(scaled.astype(np.float32)), plan_of("CT", low=-1, high=1)) == ()
    )  # so was the training
    assert doubts_about(volume_of(CT[:, :3, :3] * 0 + RNG.normal(5, 12, (40, 3, 3))), CT_PLAN) == ()  # within an organ


@pytest.mark.parametrize("brightest", [None, 3000])
def test_a_ct_that_was_scaled_is_doubted_by_a_model_of_one_tissue(brightest):
    """A bleeding takes 70 HU, a small part of which would not be told from z-scores of a skull."""
    skull = CT.astype(np.float64)
    skull[:, :2, :2] = brightest or skull[:, :2, :2]
    scaled = (skull - skull.mean()) / skull.std()
    bleeding = plan_of("CT", low=0, high=70)
    [doubt] = doubts_about(volume_of(scaled.astype(np.float32)), bleeding)
    assert "they look scaled" in doubt
    assert doubts_about(volume_of(RNG.normal(35, 5, (20, 40, 40)).round()), bleeding) == ()  # within the brain
    assert doubts_about(volume_of(scaled.astype(np.float32)), plan_of("CT", low=0, high=3)) == ()  # so was the training


def test_the_series_modality_is_compared_with_the_channel(tmp_path):
    dicom(tmp_path / "ct" / "1.dcm", "CT")
    dicom(tmp_path / "other" / "1.dcm", "OT")
    dicom(tmp_path / "none" / "1.dcm", None)
    [doubt] = doubts_about(volume_of(MR), MR_PLAN, paths=[tmp_path / "ct"])
    assert doubt == "The model was trained on MR (channel T1w), but this series is CT"
    assert doubts_about(volume_of(CT), CT_PLAN, paths=[tmp_path / "ct"]) == ()
    for part in ("other", "none"):
        assert doubts_about(volume_of(MR), MR_PLAN, paths=[tmp_path / part]) == ()
    assert doubts_about(volume_of(CT), plan_of("0", low=-150, high=400), paths=[tmp_path / "ct"]) == ()


def test_only_dicom_has_a_modality(tmp_path):
    assert modality_of(dicom(tmp_path / "a.dcm", "MR")) == "MR"
    (tmp_path / "b.nii.gz").write_bytes(b"x" * 200)
    assert modality_of(tmp_path / "b.nii.gz") is None
    assert modality_of(tmp_path) == "MR"
    dicom(tmp_path / "0.dcm", "SEG")  # a segmentation beside its images
    assert modality_of(tmp_path) == "MR"
    assert modality_of(tmp_path / "0.dcm") is None


@pytest.mark.parametrize(
    ("spacing", "odd"),
    [((5, 1, 1), False), ((0.1, 1, 1), False), ((5e-9, 1e-9, 1e-9), True), ((5000, 1000, 1000), True)],
)
def test_an_image_of_another_unit_of_length_is_doubted(spacing, odd):
    """Metres or nanometres taken for millimetres: the network sees one voxel, or pixels of a wall."""
    stage = Stage.model_construct(median_shape=(40, 160, 160), spacing_mm=(5.0, 1.5, 1.5))
    plan = CT_PLAN.model_copy(update={"stages": {"3d_fullres": stage}})
    found = doubts_about(Volume.from_numpy(CT[None], spacing_zyx_mm=spacing), plan)
    assert [("longest side" in doubt) for doubt in found] == ([True] if odd else [])
