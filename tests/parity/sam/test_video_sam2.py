"""Objects followed through a video, against the official video predictor on the same weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor
from sam2.utils.misc import load_video_frames

from rfmedsam2.nn.sam2.build import Base
from segment_anything_hq.nn.hq_sam2 import HqSam2
from segment_anything_hq.nn.sam2_base import Sam2Backbone, Sam2Segmenter
from segment_anything_hq.nn.sam2_refiner import SAM2Refiner
from segment_anything_hq.video.frames import Video
from segment_anything_hq.video.memory import FrameMasks, VideoSteps
from segment_anything_hq.video.predictor import VideoPredictor

SIZE = 64
FRAMES = 6
HEIGHT, WIDTH = 72, 96
Prompt = dict[str, Any]
BOX: Prompt = {"box": [20.0, 12, 66, 50]}
CLICK: Prompt = {"points": [[40.0, 30]], "labels": [1]}
CLICKS: Prompt = {"points": [[70.0, 20], [10.0, 60]], "labels": [1, 0]}
SHARP = {f"layers.{i}.cross_attn_image.{name}_proj.weight" for i in range(4) for name in ("q", "k", "v", "out")}
MASK: Prompt = {"mask": np.pad(np.ones((30, 40), bool), ((20, 22), (30, 26)))}


def prepared(network: Any) -> Any:
    """With memory that matters: nano's starts at zero, and untrained, objects are not seen at all."""
    base: Base = network.sam.base if isinstance(network, SAM2Refiner) else network.base
    base.residual_memory = False
    base.binarize_mask_from_pts_for_mem_enc = True
    with torch.no_grad():
        base.memory_attention.norm.weight.fill_(1)
        base.sam_mask_decoder.state_dict()["pred_obj_score_head.layers.2.bias"].fill_(5)
        base.maskmem_tpos_enc.mul_(30)  # that it shows which memory is taken for which
        base.state_dict()["obj_ptr_tpos_proj.weight"].mul_(5)
        base.state_dict()["memory_encoder.out_proj.weight"].mul_(10)
        for layer in base.memory_attention.state_dict().keys() & SHARP:
            base.memory_attention.state_dict()[layer].mul_(3)
    # the official predictor keeps maps in half precision and leaves it to autocast, or to pointers, to mend that
    base.memory_attention.register_forward_pre_hook(
        lambda _, args, given: (args, {**given, "memory": given["memory"].float()}), with_kwargs=True
    )
    return network.eval()


def segmenter(backbone: Sam2Backbone = "hiera_nano", size: int = SIZE) -> Sam2Segmenter:
    torch.manual_seed(3)
    return prepared(Sam2Segmenter(backbone, frame_size=size))


def hq() -> HqSam2:
    torch.manual_seed(3)
    return prepared(HqSam2("hiera_nano", frame_size=SIZE))


def video(height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """Two things that move."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 60, (FRAMES, height, width, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[10 + 2 * number : 40 + 2 * number, 20:60] += 120
        frame[30:60, 50 - 3 * number : 80 - 3 * number, 1] += 70
    return list(frames)


class Official:
    """The official predictor on frames that are given resized."""

    def __init__(self, base: Base, frames: list[np.ndarray]) -> None:
        self.predictor = SAM2VideoPredictor.__new__(SAM2VideoPredictor)
        self.predictor.__dict__ = base.__dict__ | {
            "fill_hole_area": 0,
            "non_overlap_masks": False,
            "clear_non_cond_mem_around_input": False,
            "add_all_frames_to_correct_as_cond": False,
        }
        mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        source = Video(frames)
        images = torch.cat([source.resized(i, base.image_size) for i in range(len(source))])
        self.state: dict[str, Any] = {
            "images": (images / 255 - mean) / deviation,
            "num_frames": len(frames),
            "offload_video_to_cpu": False,
            "offload_state_to_cpu": False,
            "video_height": source.size[0],
            "video_width": source.size[1],
            "device": torch.device("cpu"),
            "storage_device": torch.device("cpu"),
            "obj_id_to_idx": OrderedDict(),
            "obj_idx_to_id": OrderedDict(),
            "obj_ids": [],
        }
        names = ("point_inputs_per_obj", "mask_inputs_per_obj", "cached_features", "constants", "output_dict_per_obj")
        self.state |= {name: {} for name in (*names, "temp_output_dict_per_obj", "frames_tracked_per_obj")}

    def prompt(self, frame: int, object_id: int, **given: Any) -> np.ndarray:
        add = self.predictor.add_new_mask if "mask" in given else self.predictor.add_new_points_or_box
        _, ids, logits = add(self.state, frame_idx=frame, obj_id=object_id, **given)
        return logits[ids.index(object_id), 0].sigmoid().numpy()

    def propagate(self, **options: Any) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
        for frame, ids, logits in self.predictor.propagate_in_video(self.state, **options):
            yield frame, {object_id: logits[i, 0].numpy() for i, object_id in enumerate(ids)}


class Logits(VideoPredictor):
    """Gives logits of what is tracked, not masks; what was prompted stays a mask."""

    def _masks(self, answer: FrameMasks, size: tuple[int, int]) -> np.ndarray:
        masks = super()._masks(answer, size)
        logits = F.interpolate(answer.final[:, None], size, mode="bilinear", align_corners=False)[:, 0].numpy()
        assert np.array_equal(masks, logits > 0)
        return logits


def assert_equal_videos(
    network: Sam2Segmenter,
    prompts: list[tuple[int, int, Prompt]],
    frames: list[np.ndarray],
    *,
    start: int | None = None,
    reverse: bool = False,
) -> None:
    ours = Logits(network)
    ours.set_video(frames)
    official = Official(network.base, frames)
    for frame, object_id, prompt in prompts:
        expected = official.prompt(frame, object_id, **prompt)
        np.testing.assert_allclose(ours.prompt(frame, object_id, **prompt), expected, atol=1e-4)
    got = dict(ours.propagate(start, reverse=reverse))
    wanted = dict(official.propagate(start_frame_idx=start, reverse=reverse))
    assert list(got) == list(wanted)
    given = {(frame, object_id) for frame, object_id, _ in prompts}
    for frame, logits in wanted.items():
        assert got[frame].keys() == logits.keys()
        for object_id, expected in logits.items():
            one = got[frame][object_id]
            assert one.shape == expected.shape == frames[0].shape[:2]
            if (frame, object_id) not in given:
                np.testing.assert_allclose(one, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
            assert ((one > 0) != (expected > 0)).mean() <= 2e-4  # sums in another order
    shares = [float((each > 0).mean()) for logits in wanted.values() for each in logits.values()]
    assert 0.01 < np.mean(shares) < 0.99


CASES: dict[str, list[tuple[int, int, Prompt]]] = {
    "a box and a click on one frame": [(0, 1, BOX), (0, 2, CLICK)],
    "on frames of their own": [(0, 7, CLICKS), (2, 3, BOX), (4, 7, CLICK)],
    "a mask and a box with clicks": [(0, 1, MASK), (0, 2, {**BOX, **CLICKS})],
    "twice on one frame": [(1, 1, CLICK), (1, 1, CLICKS), (1, 2, BOX)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("build", [segmenter, hq])
def test_masks_equal_the_official_predictors(build: Callable[[], Sam2Segmenter], case: str) -> None:
    assert_equal_videos(build(), CASES[case], video())


def test_masks_equal_on_an_official_size() -> None:
    assert_equal_videos(segmenter("hiera_t", 128), CASES["a box and a click on one frame"], video()[:4])


def test_masks_equal_backwards() -> None:
    prompts = [(5, 1, BOX), (3, 2, CLICK)]
    assert_equal_videos(segmenter(), prompts, video(), start=5, reverse=True)


def test_masks_equal_before_the_first_prompt() -> None:
    """Memories of frames to come are attended to, their pointers are not."""
    assert_equal_videos(segmenter(), [(3, 1, BOX), (4, 2, CLICK)], video(), start=0)


def test_masks_equal_where_few_prompted_frames_are_attended_to() -> None:
    network = segmenter()
    network.base.max_cond_frames_in_attn = 2
    assert_equal_videos(network, [(0, 1, BOX), (1, 1, CLICK), (2, 1, CLICKS)], video())


def test_memory_that_is_dropped_is_not_missed() -> None:
    """More frames than any memory reaches back."""
    frames = [np.roll(frame, shift, axis=1) for shift in (0, 2, 4, 6) for frame in video()]
    assert_equal_videos(segmenter(), CASES["a box and a click on one frame"], frames)


@pytest.mark.parametrize("best_of_three", [True, False])
def test_the_refiner_untrained_follows_as_sam_2_does(best_of_three: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same low-resolution logits on every frame, from the same memories."""
    network = segmenter()
    network.base.multimask_output_for_tracking = best_of_three
    logits: dict[str, list[torch.Tensor]] = {"sam2": [], "refiner": []}
    masks = {}
    for name, each in (("sam2", network), ("refiner", SAM2Refiner(network).eval())):
        track = VideoSteps.track

        def kept(steps: Any, *args: Any, name: str = name, track: Callable = track) -> Any:
            answer = track(steps, *args)
            logits[name].append(answer.logits)
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(VideoSteps, "track", kept)
            ours = VideoPredictor(cast(Any, each))
            ours.set_video(video())
            ours.prompt(0, 1, **BOX)
            ours.prompt(1, 2, **CLICKS)
            masks[name] = dict(ours.propagate())
    assert len(logits["sam2"]) == FRAMES  # object 2 is followed on frame 0 too
    for expected, got in zip(logits["sam2"], logits["refiner"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    differing = [(masks["sam2"][f][o] != masks["refiner"][f][o]).mean() for f in range(FRAMES) for o in (1, 2)]
    assert max(differing) < 0.03  # interpolated twice


def test_a_folder_is_read_as_the_official_loader_does(tmp_path: Path) -> None:
    for number, frame in enumerate(video()):
        Image.fromarray(frame).save(tmp_path / f"{9 + number}.jpg")  # 10 comes after 9
    expected, height, width = load_video_frames(str(tmp_path), SIZE, False, compute_device=torch.device("cpu"))
    source, network = Video(tmp_path), segmenter()
    assert (len(source), *source.size) == (len(expected), height, width)
    for number in range(FRAMES):
        got = network.normalize(source.resized(number, SIZE))[0]
        torch.testing.assert_close(got, expected[number].float(), rtol=1e-5, atol=1e-5)
