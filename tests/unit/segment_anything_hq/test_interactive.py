"""Any segmenter guided by clicks: coordinates, undo, the mask before, the published predictors' answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.sam import SamSegmenter
from segment_anything_hq.inference.interactive import InteractivePredictor
from segment_anything_hq.nn.sam_ref import SamRef
from segment_anything_hq.prompts.clicks import Click, Prompt


@pytest.fixture(scope="module")
def sam() -> SamSegmenter:
    torch.manual_seed(0)
    return SamSegmenter("vit_nano", frame_size=64).eval()


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def test_probabilities_have_the_pictures_size(sam, picture) -> None:
    for fit in ("pad", "stretch"):
        predictor = InteractivePredictor(sam, fit=fit)
        predictor.set_image(picture)
        found = predictor.click(10, 20)
        assert found.shape == (40, 60)
        assert 0 <= found.min() <= found.max() <= 1


def test_points_and_boxes_reach_the_model_in_its_frame(sam, picture, monkeypatch) -> None:
    seen = []
    original = sam.segment
    monkeypatch.setattr(sam, "segment", lambda e, p, previous=None: seen.append(p) or original(e, p))
    padded, stretched = InteractivePredictor(sam), InteractivePredictor(sam, fit="stretch")
    for predictor in (padded, stretched):
        predictor.set_image(picture)
        predictor.click(30, 20, positive=False)
        predictor.box([6, 4, 30, 20])
    assert seen[0].points.tolist() == [[[32.0, pytest.approx(20 * 43 / 40)]]]
    assert seen[0].point_labels.tolist() == [[0]]
    assert seen[2].points.tolist() == [[[32.0, 32.0]]]
    assert seen[3].boxes[0].tolist() == pytest.approx([6.4, 6.4, 32.0, 32.0])
    assert seen[0].masks is None
    assert seen[1].masks.shape == (1, 16, 16)


def test_undo_gives_the_answer_before(sam, picture) -> None:
    predictor = InteractivePredictor(sam)
    predictor.set_image(picture)
    first = predictor.click(10, 10)
    second = predictor.click(50, 30, positive=False)
    assert not np.array_equal(first, second)
    assert np.array_equal(predictor.undo(), first)
    assert np.array_equal(predictor.click(50, 30, positive=False), second)
    predictor.undo()
    assert predictor.undo() is None
    with pytest.raises(UsageError, match="no click to take back"):
        predictor.undo()


def test_evaluations_get_what_clicks_get(sam, picture) -> None:
    clicks = [Click(x=10, y=10, positive=True), Click(x=50, y=30, positive=False)]
    predictor = InteractivePredictor(sam)
    predictor.set_image(picture)
    first = predictor.predict(clicks[:1], None)
    second = predictor.predict(clicks, first)
    predictor.reset()
    predictor.click(10, 10)
    assert np.array_equal(predictor.click(50, 30, positive=False), second)
    assert np.array_equal(predictor.segment(Prompt(points=tuple(clicks[:1]))), first)


def test_refiners_are_given_the_mask_before(sam, picture) -> None:
    torch.manual_seed(1)
    refiner = SamRef(sam, theta=0).eval()
    predictor = InteractivePredictor(refiner, fit="stretch")
    predictor.set_image(picture)
    before = predictor.click(10, 10)
    after = predictor.click(50, 30)
    changed = before != after
    assert changed.any()
    assert not changed.all()  # PatchDiff changes its window alone


def test_the_same_picture_is_encoded_once(sam, picture, monkeypatch) -> None:
    calls = []
    original = sam.encode
    monkeypatch.setattr(sam, "encode", lambda frames: calls.append(1) or original(frames))
    predictor = InteractivePredictor(sam)
    for image in (picture, picture.copy(), 255 - picture):
        predictor.set_image(image)
    assert len(calls) == 2


def test_bad_input_is_a_sentence(sam, picture) -> None:
    predictor = InteractivePredictor(sam)
    with pytest.raises(UsageError, match="no picture yet"):
        predictor.click(1, 1)
    for image in (picture[..., 0], picture.astype(float), picture[:0]):
        with pytest.raises(UsageError, match="no picture"):
            predictor.set_image(image)
    predictor.set_image(picture)
    with pytest.raises(UsageError, match=r"outside the picture.*x from 0 to 60, y from 0 to 40"):
        predictor.click(61, 3)
    with pytest.raises(UsageError, match="outside the picture"):
        predictor.box([10, 10, 5, 20])
