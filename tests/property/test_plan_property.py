"""What every plan must hold, whatever the data."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfmedsam2.pipeline.datasets.splits import leaks, make_splits
from rfmedsam2.pipeline.planning.plan import plan
from rfmedsam2.pipeline.planning.presets import PRESETS
from rfmedsam2.pipeline.planning.spacing import coarsened
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from rfmedsam2.system.file_names import is_file_name

pytestmark = pytest.mark.slow

SHAPES = st.tuples(*[st.integers(1, 700)] * 3)
SPACINGS = st.tuples(*[st.floats(0.2, 12, allow_nan=False)] * 3)
FLAT = IntensityStatistics(mean=0, median=0, std=1, min=-1, max=1, percentile_00_5=-1, percentile_99_5=1)


@st.composite
def data(draw) -> tuple[SimpleNamespace, Fingerprint]:
    cases = tuple(
        CaseFingerprint(
            id=str(i), shape_zyx=shape, shape_after_crop_zyx=shape, spacing_zyx_mm=draw(SPACINGS), voxels_by_label={}
        )
        for i, shape in enumerate(draw(st.lists(SHAPES, min_size=1, max_size=4)))
    )
    labels = {"background": 0} | {f"c{i}": i for i in range(1, draw(st.integers(2, 20)))}
    plain = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    fingerprint = Fingerprint(
        dataset="Dataset001_A", digest="", cases=cases, intensities=(FLAT,), median_relative_size_after_crop=1
    )
    return SimpleNamespace(name="Dataset001_A", json=DatasetJson.parse(plain)), fingerprint


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data(), st.sampled_from(sorted(PRESETS)))
def test_every_stage_is_sound(described, preset):
    dataset, fingerprint = described
    found = plan(dataset, fingerprint, preset=preset)
    assert "2d" in found.stages
    for stage in found.stages.values():
        shape = stage.median_shape[-len(stage.patch_size) :]
        divisors = [math.prod(axis) for axis in zip(*stage.model.strides, strict=True)]
        for size, median, divisor in zip(stage.patch_size, shape, divisors, strict=True):
            assert size % divisor == 0
            # padded to the divisor of the network, and no further; as in nnU-Net an axis keeps its length where
            # shortening another one has cost the network a level, whose divisor was twice as large
            assert size <= max(12, median + 2 * divisor)
        assert stage.batch_size >= (1 if preset == "cpu" else 2)
        assert len(stage.model.strides) >= 2
        assert all(f <= g for f, g in zip(stage.model.features, stage.model.features[1:], strict=False))
    if "3d_lowres" in found.stages:
        full, low = found.stages["3d_fullres"], found.stages["3d_lowres"]
        assert all(a <= b for a, b in zip(full.spacing_mm, low.spacing_mm, strict=True))
        assert math.prod(low.median_shape) <= math.prod(full.median_shape)


@given(SHAPES, SPACINGS, st.integers(1000, 3_000_000))
@settings(max_examples=60, deadline=None)
def test_coarsening_obeys_the_limit_and_never_refines(shape, spacing, limit):
    import numpy as np

    before = np.array(spacing)
    after = coarsened(before, np.array(shape), limit)
    assert np.prod(before / after * np.array(shape)) <= limit
    assert np.all(after >= before)
    if np.prod(shape) <= limit:
        assert np.array_equal(after, before)


CASE_IDS = st.text(min_size=1, max_size=5).filter(is_file_name)


@given(st.dictionaries(CASE_IDS, st.integers(0, 8).map(str), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_folds_share_out_every_case_once_and_keep_groups_together(groups):
    splits = make_splits(groups)
    if len(set(groups.values())) == 1:
        assert splits[0].train == splits[0].val
        return
    assert sorted(c for s in splits for c in s.val) == sorted(groups)
    assert all(sorted((*s.train, *s.val)) == sorted(groups) for s in splits)
    assert leaks({str(i): s for i, s in enumerate(splits)}, groups) == []
