"""Objects of a video, prompted and followed: what comes when, how much is kept, what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rfmedsam2.errors import ImageError, UsageError
from segment_anything_hq.nn.hq_sam2 import HqSam2
from segment_anything_hq.nn.sam2_base import Sam2Segmenter
from segment_anything_hq.nn.sam2_refiner import SAM2Refiner
from segment_anything_hq.video.predictor import VideoPredictor

pytestmark = pytest.mark.slow

SIZE, HEIGHT, WIDTH = 64, 48, 80
BOX = [10, 8, 50, 40]


@cache
def network(kind: str) -> Any:
    torch.manual_seed(0)
    made = HqSam2("hiera_nano", frame_size=SIZE) if kind == "hq" else Sam2Segmenter("hiera_nano", frame_size=SIZE)
    with torch.no_grad():
        made.base.memory_attention.norm.weight.fill_(1)
        made.base.sam_mask_decoder.state_dict()["pred_obj_score_head.layers.2.bias"].fill_(5)
    made = SAM2Refiner(made) if kind == "refiner" else made
    if isinstance(made, SAM2Refiner):
        torch.nn.init.normal_(made.refinement.head.weight, std=0.05)
    return made.eval()


def frames(count: int = 5, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def refiner(kind: str = "sam2", count: int = 5, **options: Any) -> VideoPredictor:
    made = VideoPredictor(network(kind), **options)
    made.set_video(frames(count))
    return made


@pytest.mark.parametrize("kind", ["sam2", "hq", "refiner"])
def test_every_frame_has_a_mask_of_every_object(kind: str) -> None:
    video = refiner(kind)
    probabilities = video.prompt(1, 4, box=BOX)
    assert probabilities.shape == (HEIGHT, WIDTH)
    assert 0 <= probabilities.min() <= probabilities.max() <= 1
    video.prompt(2, -3, points=[[30, 20], [70, 5]], labels=[1, 0])
    assert video.objects == (4, -3)
    found = dict(video.propagate())
    assert list(found) == [1, 2, 3, 4]
    for masks in found.values():
        assert list(masks) == [4, -3]
        assert all(mask.shape == (HEIGHT, WIDTH) and mask.dtype == np.bool_ for mask in masks.values())
    assert np.array_equal(found[1][4], probabilities > 0.5)
    assert list(dict(video.propagate(reverse=True))) == [1, 0]
    assert list(dict(video.propagate(3, objects=[-3]))[4]) == [-3]


@pytest.mark.parametrize("kind", ["hq", "refiner"])
def test_objects_do_not_depend_on_their_company_or_on_groups(kind: str) -> None:
    prompts: dict[int, dict[str, Any]] = {
        1: {"box": BOX},
        2: {"points": [[30, 20]], "labels": [1]},
        3: {"box": [40, 20, 79, 47]},
    }
    together, grouped = refiner(kind), refiner(kind, objects_at_once=2)
    for video in (together, grouped):
        for object_id, prompt in prompts.items():
            video.prompt(object_id % 2, object_id, **prompt)
    expected = dict(together.propagate())
    for frame, masks in grouped.propagate():
        assert all((masks[each] != expected[frame][each]).mean() < 1e-3 for each in masks)
    for object_id, prompt in prompts.items():
        alone = refiner(kind)
        alone.prompt(object_id % 2, object_id, **prompt)
        for frame, masks in alone.propagate(0):
            assert (masks[object_id] != expected[frame][object_id]).mean() < 1e-3


def test_the_refiners_detail_is_shown_and_not_remembered() -> None:
    plain, refined = refiner("refiner"), refiner("refiner")
    head = network("refiner").refinement.head
    weight = head.weight.detach().clone()
    probabilities = refined.prompt(0, 1, box=BOX)
    with torch.no_grad():
        head.weight.zero_()
        try:
            interpolated = plain.prompt(0, 1, box=BOX)
        finally:
            head.weight.copy_(weight)
    assert not np.allclose(probabilities, interpolated, atol=1e-3)
    before, after = (video._prompted_frames[1][0].memory.map for video in (plain, refined))
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_each_frame_is_encoded_once_and_not_where_all_were_prompted(monkeypatch: pytest.MonkeyPatch) -> None:
    made, encoded = network("sam2"), []
    encode = made.encode
    monkeypatch.setattr(made, "encode", lambda given: (encoded.append(len(given)), encode(given))[1])
    video = refiner()
    for object_id in range(3):
        video.prompt(0, object_id, box=BOX)
        video.prompt(0, object_id, points=[[30, 20]], labels=[1])
    assert encoded == [1]
    assert len(list(video.propagate())) == 5
    assert encoded == [1] * 5


def test_frames_are_read_when_they_are_needed(tmp_path: Path) -> None:
    for number, frame in enumerate(frames()):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    video = VideoPredictor(network("sam2"))
    video.set_video(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no image")
    video.prompt(1, 1, box=BOX)
    following = video.propagate()
    assert [next(following)[0] for _ in range(2)] == [1, 2]
    with pytest.raises(ImageError, match=r"3\.png"):
        next(following)


def test_what_is_kept_does_not_grow_with_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    video, kept = refiner(count=30), []
    attended = video._steps.select_memories

    def looked(place: Any, given: Any, recent: Any) -> Any:
        kept.append((len(recent), sum(memory.map is not None for memory in recent.values())))
        return attended(place, given, recent)

    monkeypatch.setattr(video._steps, "select_memories", looked)
    video.prompt(0, 1, box=BOX)
    list(video.propagate())
    assert max(kept) == kept[-1] == (15, 6)
    assert len(video._prompted_frames[1]) == 1


def test_a_second_prompt_builds_on_the_first_and_a_run_on_none_before() -> None:
    video, other = refiner(), refiner()
    first = video.prompt(0, 1, box=BOX)
    second = video.prompt(0, 1, points=[[60, 40]], labels=[0])
    alone = other.prompt(0, 1, points=[[60, 40]], labels=[0])
    assert not np.allclose(second, first, atol=1e-4)
    assert not np.allclose(second, alone, atol=1e-4)
    before = dict(video.propagate())
    list(video.propagate(3, reverse=True))
    again = dict(video.propagate())
    assert all(np.array_equal(again[frame][1], masks[1]) for frame, masks in before.items())


def test_a_mask_is_taken_as_it_is_and_an_empty_one_is_not_there() -> None:
    video = refiner()
    mask = np.zeros((HEIGHT, WIDTH), bool)
    assert video.prompt(0, 1, mask=mask).max() < 0.5
    mask[10:40, 20:60] = True
    probabilities = video.prompt(0, 1, mask=mask)
    assert ((probabilities > 0.5) != mask).mean() < 0.05
    assert len(list(video.propagate())) == 5


def test_an_object_that_is_not_there_has_an_empty_mask() -> None:
    made = network("refiner")
    bias = made.sam.base.sam_mask_decoder.state_dict()["pred_obj_score_head.layers.2.bias"]
    try:
        bias.fill_(-50)
        video = refiner("refiner")
        assert video.prompt(0, 1, box=BOX).max() == 0
        assert not any(masks[1].any() for _, masks in video.propagate())
    finally:
        bias.fill_(5)


def test_reset_and_a_new_video_forget_the_prompts() -> None:
    video = refiner()
    video.prompt(0, 1, box=BOX)
    following = video.propagate()
    next(following)
    video.reset()
    assert video.objects == ()
    with pytest.raises(UsageError, match="changed during propagation"):
        next(following)
    video.prompt(0, 1, box=BOX)
    video.set_video(frames(2))
    assert video.objects == ()
    video.prompt(1, 2, box=BOX)
    assert [frame for frame, _ in video.propagate(0)] == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"frame": 5, "box": BOX}, "The video has no such frame.*0 to 4.*Found 5"),
        ({"frame": -1, "box": BOX}, "The video has no such frame"),
        ({}, "No prompt was given"),
        ({"box": [10, 8, 81, 40]}, "the box lies outside: 10, 8, 81, 40, the image is 80 wide and 48 high"),
        ({"points": [[5, -1]], "labels": [1]}, "a point lies outside: 5, -1"),
        ({"points": [[float("nan"), 1]], "labels": [1]}, "a point lies outside"),
        ({"box": [50, 8, 10, 40]}, "box ends before it begins: 50, 8, 10, 40"),
        ({"box": [50, 8, 10]}, "Invalid box"),
        ({"points": [[5, 5]]}, "Every point needs a label"),
        ({"labels": [1]}, "Every point needs a label"),
        ({"points": [[5, 5]], "labels": [2]}, "Every point needs a label"),
        ({"points": np.zeros((0, 2)), "labels": []}, "Every point needs a label"),
        ({"mask": np.ones((WIDTH, HEIGHT), bool)}, "another size than the video"),
        ({"mask": np.ones((HEIGHT, WIDTH), bool), "box": BOX}, "A mask prompt cannot be combined"),
    ],
)
def test_prompts_that_cannot_be_are_refused(prompt: dict[str, Any], said: str) -> None:
    video = refiner()
    with pytest.raises(UsageError, match=said):
        video.prompt(prompt.pop("frame", 0), 1, **prompt)
    assert video.objects == ()


def test_what_is_asked_too_early_is_refused() -> None:
    video = VideoPredictor(network("sam2"))
    with pytest.raises(UsageError, match="No video has been set"):
        video.prompt(0, 1, box=BOX)
    video.set_video(frames())
    with pytest.raises(UsageError, match="No object has been prompted yet"):
        video.propagate()
    video.prompt(0, 1, box=BOX)
    with pytest.raises(UsageError, match=r"never prompted.*some of 1.*Found 2"):
        video.propagate(objects=[1, 2])
    with pytest.raises(UsageError, match="The video has no such frame"):
        video.propagate(7)


def test_a_video_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"ftyp")
    video = VideoPredictor(network("sam2"))
    with pytest.raises(UsageError, match=r"folder of images, not from a file: .*clip\.mp4.*ffmpeg -i clip\.mp4"):
        video.set_video(tmp_path / "clip.mp4")
    with pytest.raises(UsageError, match="The folder of frames does not exist"):
        video.set_video(tmp_path / "nowhere")


def test_frames_that_cannot_be_are_refused(tmp_path: Path) -> None:
    video = VideoPredictor(network("sam2"))
    for wrong, said in (
        ([], "The video has no frames"),
        ([np.zeros((4, 4), np.uint8)], "Frame 0 is not an RGB image"),
        ([np.zeros((4, 4, 3))], "Frame 0 is not an RGB image"),
        (tmp_path, "The video has no frames"),
        (tmp_path / "none", "folder of frames does not exist"),
    ):
        with pytest.raises(UsageError, match=said):
            video.set_video(wrong)
    video.set_video([*frames(2), *frames(1, HEIGHT, WIDTH + 1)])
    video.prompt(0, 1, box=BOX)
    following = video.propagate()
    assert [next(following)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(UsageError, match=r"Frame 2 has another size.*80 x 48.*Found 81 x 48"):
        next(following)


@pytest.mark.parametrize("kind", ["sam2", "hq", "refiner"])
def test_it_runs_at_half_precision(kind: str) -> None:
    video = refiner(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.isfinite(video.prompt(2, 1, box=BOX)).all()
        video.prompt(0, 2, mask=np.ones((HEIGHT, WIDTH), bool))
        assert len(list(video.propagate())) == 5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"points": "a", "labels": "b"}, "Points and boxes are numbers"),
        ({"box": "abcd"}, "Points and boxes are numbers"),
        ({"mask": np.full((HEIGHT, WIDTH), np.nan)}, "The mask cannot be used.*NaN"),
    ],
)
def test_prompts_that_are_not_numbers_are_sentences(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        refiner().prompt(0, 1, **given)


def test_frames_networks_and_sizes_of_groups_are_checked() -> None:
    video = refiner()
    for frame in (None, "0", 1.5):
        with pytest.raises(UsageError, match="frame must be a whole number"):
            video.prompt(frame, 1, box=BOX)  # type: ignore[arg-type]
    assert video.prompt(np.int64(1), 1, box=BOX).shape == (HEIGHT, WIDTH)  # type: ignore[arg-type]
    for wrong in (None, "sam2", torch.nn.Linear(1, 1)):
        with pytest.raises(UsageError, match="This network does not track"):
            VideoPredictor(wrong)  # type: ignore[arg-type]
    for groups in (0, -1, "4", None):
        with pytest.raises(UsageError, match="objects_at_once must be a whole number from 1"):
            refiner(objects_at_once=groups)
    for frames_ in (None, 5, iter(frames())):
        with pytest.raises(UsageError, match="This is not a video"):
            video.set_video(frames_)  # type: ignore[arg-type]
    hidden = [np.ma.masked_array(frame, frame > 200) for frame in frames()]
    with pytest.raises(UsageError, match="of which some values are masked"):
        video.set_video(hidden)
