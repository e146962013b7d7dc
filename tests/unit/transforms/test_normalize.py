"""Intensity schemes: by hand, and against nnU-Net's classes."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.preprocessing.normalization import default_normalization_schemes as theirs

from rfmedsam2.errors import ImageError
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.plan import Normalization
from rfmedsam2.transforms.normalize import normalize

STATISTICS = IntensityStatistics(
    mean=78.25, median=80, std=61.5, min=-900, max=1900, percentile_00_5=-160.5, percentile_99_5=240.25
)
PROPERTIES = {"mean": 78.25, "std": 61.5, "percentile_00_5": -160.5, "percentile_99_5": 240.25}
PEERS = {
    "ct": theirs.CTNormalization,
    "zscore": theirs.ZScoreNormalization,
    "rescale_0_1": theirs.RescaleTo01Normalization,
    "rgb_0_1": theirs.RGBTo01Normalization,
    "none": theirs.NoNormalization,
}
EXACT = {"ct", "rescale_0_1", "rgb_0_1", "none"}


def volume(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "rgb_0_1":
        return rng.integers(0, 256, (7, 30, 31)).astype(np.float32)
    return (rng.normal(100, 400, (7, 30, 31)).round(1)).astype(np.float32)


@pytest.mark.parametrize("kind", sorted(PEERS))
def test_results_are_nnunets(kind):
    source = volume(kind)
    expected = PEERS[kind](False, PROPERTIES).run(source.copy(), None)
    normalize(source, Normalization(kind=kind), STATISTICS)
    assert source.dtype == np.float32
    np.testing.assert_allclose(source, expected, rtol=0, atol=0 if kind in EXACT else 2e-6)


def test_masked_zscore_changes_the_inside_only_and_is_nnunets():
    source = volume("zscore")
    inside = np.random.default_rng(4).random(source.shape) > 0.4
    source[~inside] = 0
    expected = theirs.ZScoreNormalization(True, PROPERTIES).run(source.copy(), np.where(inside, 0, -1))
    normalize(source, Normalization(kind="zscore", use_mask=True), STATISTICS, inside=inside)
    np.testing.assert_allclose(source, expected, rtol=0, atol=2e-6)
    assert np.all(source[~inside] == 0)
    assert abs(source[inside].mean()) < 1e-5


def test_a_constant_volume_becomes_zero_and_not_nan():
    source = np.full((3, 4, 5), 7.5, np.float32)
    normalize(source, Normalization(kind="zscore"), STATISTICS)
    np.testing.assert_array_equal(source, 0)


def test_an_empty_inside_changes_nothing():
    source = np.zeros((3, 4, 5), np.float32)
    normalize(source, Normalization(kind="zscore", use_mask=True), STATISTICS, inside=np.zeros((3, 4, 5), bool))
    np.testing.assert_array_equal(source, 0)


@pytest.mark.parametrize("value", [-1, 300])
def test_colors_beyond_a_byte_are_refused(value):
    source = np.full((1, 2, 2), 10, np.float32)
    source[0, 0, 0] = value
    with pytest.raises(ImageError, match="0 to 255"):
        normalize(source, Normalization(kind="rgb_0_1"), STATISTICS)
