"""Coarsening for small budgets: a patch shows the whole body, no class is lost, given spacings stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rfmedsam2.errors import PlanError
from rfmedsam2.pipeline.planning.plan import plan
from rfmedsam2.pipeline.planning.presets import CaseSizing
from rfmedsam2.pipeline.planning.rfmedsam2 import plan_rfmedsam2
from rfmedsam2.pipeline.planning.spacing import class_volumes_mm3, coarsened, coarsened_by
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics

ABDOMEN = {"shape": (75, 192, 192), "spacing": (4.0, 1.8, 1.8)}
"""300 x 346 x 346 mm."""
ORGANS = {1: 150.0, 2: 1500.0, 3: 25.0}
"""ml of a kidney, a liver, a gallbladder."""


def described(
    volumes_ml: dict[int, float], *, shape, spacing, cases: int = 14, ignore: int | None = None
) -> tuple[Any, Fingerprint]:
    """A dataset and its fingerprint, of equal cases with classes of these volumes."""
    voxels = {value: round(ml * 1000 / np.prod(spacing)) for value, ml in volumes_ml.items()}
    labels = {"background": 0} | {("ignore" if v == ignore else f"c{v}"): v for v in volumes_ml}
    case = {"shape_zyx": shape, "shape_after_crop_zyx": shape, "spacing_zyx_mm": spacing, "voxels_by_label": voxels}
    flat = IntensityStatistics(mean=0, median=0, std=1, min=-1, max=1, percentile_00_5=-1, percentile_99_5=1)
    fingerprint = Fingerprint(
        dataset="Dataset001_A",
        digest="",
        cases=tuple(CaseFingerprint(id=str(i), **case) for i in range(cases)),
        intensities=(flat,),
        median_relative_size_after_crop=1,
    )
    plain = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    return SimpleNamespace(name="Dataset001_A", json=DatasetJson.parse(plain)), fingerprint


def extent_mm(sizes, spacing) -> np.ndarray:
    return np.array(sizes) * np.array(spacing)


def test_a_patch_of_the_cpu_preset_shows_most_of_an_abdomen():
    stage = plan(*described(ORGANS, **ABDOMEN), preset="cpu").stages["3d_fullres"]
    assert stage.spacing_mm == pytest.approx((5.3, 5.3, 5.3), abs=0.2)
    share = np.minimum(extent_mm(stage.patch_size, stage.spacing_mm) / extent_mm(*ABDOMEN.values()), 1)
    assert np.prod(share) > 0.7
    assert np.prod(stage.patch_size) * stage.batch_size <= 200_000
    assert np.prod(stage.median_shape) <= 250_000


def test_a_small_class_keeps_its_voxels_and_the_case_stays_finer():
    coarse = plan(*described(ORGANS, **ABDOMEN), preset="cpu").stages["3d_fullres"]
    lesions = plan(*described(ORGANS | {4: 1.0}, **ABDOMEN), preset="cpu").stages["3d_fullres"]
    assert np.prod(lesions.spacing_mm) * 27 == pytest.approx(1000, rel=0.1)
    assert np.prod(lesions.spacing_mm) * 27 <= 1000
    assert max(lesions.spacing_mm[1:]) < max(coarse.spacing_mm)


def test_a_class_of_few_voxels_does_not_make_cases_too_large():
    long = {"shape": (450, 512, 512), "spacing": (1.0, 0.8, 0.8)}
    stage = plan(*described({1: 0.01}, **long), preset="cpu").stages["3d_fullres"]
    assert 1_800_000 < np.prod(stage.median_shape) <= 2_050_000


def test_small_cases_are_left_as_they_are():
    stage = plan(*described({1: 1.7, 2: 1.6}, shape=(36, 50, 35), spacing=(1, 1, 1)), preset="cpu").stages["3d_fullres"]
    assert (stage.spacing_mm, stage.patch_size, stage.batch_size) == ((1, 1, 1), (40, 56, 40), 2)


def test_the_ignore_label_is_no_class():
    dataset, fingerprint = described(ORGANS | {9: 0.05}, ignore=9, **ABDOMEN)
    with_ignore = plan(dataset, fingerprint, preset="cpu").stages["3d_fullres"].spacing_mm
    assert with_ignore == plan(*described(ORGANS, **ABDOMEN), preset="cpu").stages["3d_fullres"].spacing_mm


@pytest.mark.parametrize("preset", ["cpu", "nnunet"])
@pytest.mark.parametrize("spacing", [(4.0, 1.8, 900.0), (1e19, 1e19, 1e19)])
def test_a_spacing_wider_than_the_images_is_a_sentence(preset, spacing):
    with pytest.raises(PlanError, match="wider than the images"):
        plan(*described(ORGANS, **ABDOMEN), preset=preset, spacing_zyx_mm=spacing)


def test_a_given_spacing_stands():
    stage = plan(*described(ORGANS, **ABDOMEN), preset="cpu", spacing_zyx_mm=(5.0, 2.5, 2.5)).stages["3d_fullres"]
    assert stage.spacing_mm == (5.0, 2.5, 2.5)


def test_a_given_spacing_that_makes_cases_too_large_is_coarsened_to_the_limit():
    stage = plan(*described(ORGANS, **ABDOMEN), preset="cpu", spacing_zyx_mm=(2.0, 1.0, 1.0)).stages["3d_fullres"]
    assert 1_800_000 < np.prod(stage.median_shape) <= 2_050_000


def test_slices_are_not_coarsened_for_a_stage_that_sees_them_whole():
    stages = plan(*described(ORGANS, **ABDOMEN), preset="cpu").stages
    assert stages["2d"].spacing_mm[1:] == pytest.approx((2.1, 2.1), abs=0.15)
    assert stages["3d_fullres"].spacing_mm[1] > 5


def test_step_0_of_rfmedsam2_has_the_same_spacing():
    described_ = described(ORGANS, **ABDOMEN)
    stage = plan_rfmedsam2(*described_, preset="cpu").stages["3d_fullres"]
    assert stage.spacing_mm == plan(*described_, preset="cpu").stages["3d_fullres"].spacing_mm


@pytest.mark.parametrize("preset", ["default", "nnunet", "8gb"])
def test_other_presets_keep_nnunets_spacing(preset):
    assert plan(*described(ORGANS, **ABDOMEN), preset=preset).stages["3d_fullres"].spacing_mm == (4.0, 1.8, 1.8)


def test_volumes_are_medians_over_the_cases_that_have_the_class():
    _, fingerprint = described({1: 1.0}, shape=(10, 10, 10), spacing=(2.0, 1.0, 1.0), cases=3)
    voxels = [{1: 100, 2: 7}, {1: 300}, {1: 900, 3: 4}]
    cases = [c.model_copy(update={"voxels_by_label": v}) for c, v in zip(fingerprint.cases, voxels, strict=True)]
    fingerprint = fingerprint.model_copy(update={"cases": tuple(cases)})
    assert class_volumes_mm3(fingerprint, (0, 1, 2)) == {1: 600, 2: 14}


def test_finest_axes_are_coarsened_first():
    assert coarsened(np.array([5.0, 1.0, 1.0]), np.array([40, 200, 200]), 100_000) == pytest.approx(
        [5, 4.1, 4.1], abs=0.1
    )
    assert coarsened(np.array([5.0, 1.0, 1.0]), np.array([40, 200, 200]), 1, max_voxel_mm3=45) == pytest.approx(
        [5, 2.97, 2.97], abs=0.05
    )
    sizing = CaseSizing(max_voxels=2_000_000, whole_voxels=100_000, class_voxels=27)
    _, fingerprint = described({1: 1.215}, shape=(40, 200, 200), spacing=(5.0, 1.0, 1.0))
    assert coarsened_by(sizing, np.array([5.0, 1.0, 1.0]), fingerprint, (1,)) == pytest.approx(
        [5, 2.97, 2.97], abs=0.05
    )
