"""Any segmenter guided by clicks: coordinates, undo, the mask before, the published predictors' answers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.sam import SamSegmenter
from segment_anything_hq.data.prompt_files import read_prompts
from segment_anything_hq.evaluation.interactive import ClickedPredictor
from segment_anything_hq.evaluation.latency import sat_latency
from segment_anything_hq.evaluation.protocols import BoxRule
from segment_anything_hq.inference.image_transform import embed
from segment_anything_hq.inference.interactive import InteractivePredictor
from segment_anything_hq.nn.sam_ref import SamRef
from segment_anything_hq.prompts.prompt import Click, Prompt


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


def test_latency_is_measured_with_the_mask_before_on_an_image_that_is_encoded(sam, monkeypatch) -> None:
    encoded, before = [], []
    encode, segment = sam.encode, sam.segment
    monkeypatch.setattr(sam, "encode", lambda frames: encoded.append(len(before)) or encode(frames))

    def watched(embedded, prompted, previous=None):
        before.append((previous, prompted))
        return segment(embedded, prompted, previous=previous)

    monkeypatch.setattr(sam, "segment", watched)
    model = ClickedPredictor(InteractivePredictor(sam))
    sat_latency(model, np.zeros((32, 32, 3), np.uint8), grid=3, warm_up=2)
    assert encoded == [0, 2]  # once to warm up, and once measured
    measured = before[2:]
    assert [previous is None for previous, _ in measured] == [True] + [False] * 8
    assert [prompted.masks is None for _, prompted in measured] == [True] + [False] * 8
    assert all(prompted.points.shape[1] == 1 for _, prompted in measured)  # one point each, as in SegNext
    # the mask before is that of the point before, as a click of the evaluation gets it
    assert all(torch.equal(prompted.masks, previous.logits) for previous, prompted in measured[1:])


def test_an_image_is_encoded_when_that_is_said(monkeypatch) -> None:
    """A GPU works on after the call: what is left would be counted as time of the first click."""
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device.type))
    for kind in ("cpu", "cuda"):
        segmenter = SimpleNamespace(
            parameters=lambda kind=kind: iter([SimpleNamespace(device=torch.device(kind))]),
            normalize=lambda pixels: pixels,
            encode=lambda pixels: pixels,
            prepare=lambda embedded: (embedded, len(waited)),
        )
        framing = SimpleNamespace(pixels=lambda _: SimpleNamespace(to=lambda device: device.type))
        assert embed(segmenter, np.zeros((4, 4, 3), np.uint8), framing) == (kind, 0)
    assert waited == ["cuda"]


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
    with pytest.raises(UsageError, match="nothing to undo"):
        predictor.undo()


def test_evaluations_get_what_clicks_get(sam, picture) -> None:
    clicks = [Click(x=10, y=10, positive=True), Click(x=50, y=30, positive=False)]
    predictor = InteractivePredictor(sam)
    evaluated = ClickedPredictor(predictor)
    evaluated.set_image(picture)
    first = evaluated.predict(clicks[:1], None)
    second = evaluated.predict(clicks, first)
    predictor.reset()
    predictor.click(10, 10)
    assert np.array_equal(predictor.click(50, 30, positive=False), second)
    assert np.array_equal(predictor.segment(Prompt(clicks=tuple(clicks[:1]))), first)


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


def test_a_masked_image_is_refused_unless_nothing_is_masked(sam, picture) -> None:
    predictor = InteractivePredictor(sam)
    with pytest.raises(UsageError, match=r"masked array.*masked values.*filled"):
        predictor.set_image(np.ma.masked_greater(picture, 200))
    predictor.set_image(np.ma.array(picture))
    whole = predictor.click(10, 20)
    predictor.set_image(picture)
    assert np.array_equal(predictor.click(10, 20), whole)


def test_bad_input_is_a_sentence(sam, picture) -> None:
    predictor = InteractivePredictor(sam)
    with pytest.raises(UsageError, match="No image has been set"):
        predictor.click(1, 1)
    for image in (picture[..., 0], picture.astype(float), picture[:0]):
        with pytest.raises(UsageError, match="Expected an RGB image"):
            predictor.set_image(image)
    predictor.set_image(picture)
    with pytest.raises(UsageError, match="a point lies outside: 61, 3, the image is 60 wide and 40 high"):
        predictor.click(61, 3)
    with pytest.raises(UsageError, match="box ends before it begins: 10, 10, 5, 20"):
        predictor.box([10, 10, 5, 20])
    with pytest.raises(UsageError, match="Invalid box"):
        predictor.box([10, 10, 5])
    with pytest.raises(UsageError, match=r"Invalid box.*Found 'cat'"):
        predictor.box("cat")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Invalid click\. Expected two numbers x, y\. Found 'a', 3"):
        predictor.click("a", 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"The image is not an array of numbers.*Found builtins\.str"):
        predictor.set_image("cat.jpg")
    with pytest.raises(UsageError, match=r"Expected an RGB image.*int64"):
        predictor.set_image((picture.astype(int) + 1).tolist())  # 256 is no color


def test_images_of_pil_tensors_and_lists_are_as_arrays(sam, picture) -> None:
    predictor = InteractivePredictor(sam)
    predictor.set_image(picture)
    expected = predictor.click(10, 20)
    for image in (
        Image.fromarray(picture),
        torch.from_numpy(picture),
        torch.from_numpy(picture).long(),
        picture.tolist(),
    ):
        other = InteractivePredictor(sam)
        other.set_image(image)
        assert np.array_equal(other.click(10, 20), expected)


def test_a_click_between_two_pixels_stays_there(sam, picture, monkeypatch) -> None:
    seen = []
    original = sam.segment
    monkeypatch.setattr(sam, "segment", lambda e, p, previous=None: seen.append(p) or original(e, p))
    predictor = InteractivePredictor(sam, fit="stretch")
    predictor.set_image(picture)
    predictor.click(30.75, 20.5)
    assert seen[0].points.tolist() == [[[pytest.approx(30.75 * 64 / 60), pytest.approx(20.5 * 64 / 40)]]]
    assert predictor.prompt == Prompt(clicks=(Click(x=30.75, y=20.5, positive=True),))


@pytest.mark.parametrize(("x", "y", "inside"), [(0, 0, True), (59.9, 39, True), (60, 1, False), (1, 40, False)])
def test_files_and_clicks_agree_on_where_the_picture_ends(x, y, inside, sam, picture, tmp_path) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    points = {"image": "a.png", "points": [[x, y]], "labels": [1]}
    (tmp_path / "p.json").write_text(json.dumps([points]))
    predictor = InteractivePredictor(sam)
    predictor.set_image(picture)

    def read():
        return read_prompts(tmp_path / "p.json", [tmp_path / "a.png"])

    if inside:
        (found,) = read()
        predictor.click(x, y)
        assert found.prompt == predictor.prompt
        return
    for say in (read, lambda: predictor.click(x, y)):
        with pytest.raises(UsageError, match=f"a point lies outside: {x:g}, {y:g}"):
            say()


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ((5, 5, 5, 9), None),  # of the outermost pixels of a line
        ((0, 0, 60, 40), None),  # by the edges of the picture, as COCO's
        ((0, 0, 60.5, 40), "the box lies outside"),
        ((-1, 0, 5, 5), "the box lies outside"),
        ((9, 9, 5, 5), "the box ends before it begins"),
    ],
)
def test_files_and_boxes_agree_on_boxes(box, fault, sam, picture, tmp_path) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "p.json").write_text(json.dumps([{"image": "a.png", "box": box}]))
    predictor = InteractivePredictor(sam)
    predictor.set_image(picture)
    says = (lambda: read_prompts(tmp_path / "p.json", [tmp_path / "a.png"]), lambda: predictor.box(box))
    for say in says:
        with nullcontext() if fault is None else pytest.raises(UsageError, match=fault):
            say()


def test_a_masks_own_box_fits_the_picture() -> None:
    for pixels in (np.s_[7, 12], np.s_[39, 59], np.s_[:, :], np.s_[3, 4:20]):
        mask = np.zeros((40, 60), np.int8)
        mask[pixels] = 1
        (prompt,) = BoxRule().prompts(mask, np.random.default_rng(0))
        assert prompt.faults(mask.shape) == []
        x0, y0, x1, y1 = map(int, prompt.box)
        assert mask[y0 : y1 + 1, x0 : x1 + 1].all()
