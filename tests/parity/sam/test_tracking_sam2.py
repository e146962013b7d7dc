"""Volumes tracked by SAM 2, against the official video predictor on the same weights."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch import Tensor

from rfmedsam2.inference.video_tracking import VideoSegmenter, as_published
from rfmedsam2.inference.zero_shot import reference_prompts, sam_points
from rfmedsam2.nn.sam2.build import Base, build_base
from rfmedsam2.nn.segmenter import IMAGENET_MEAN, IMAGENET_STD
from rfmedsam2.records.dataset import LabelSet

SIZE = 64
LABELS = LabelSet(names={"background": 0, "organ": 1})


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(3)
    base = build_base("nano", frame_size=SIZE)
    with torch.no_grad():
        for module in (base.memory_attention.norm,):  # nano's starts at zero, which would hide the memories
            module.weight.fill_(1)
        base.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5)  # untrained, objects are not seen at all
    return as_published(base)


def case() -> tuple[Tensor, np.ndarray]:
    rng = torch.Generator().manual_seed(0)
    frames = torch.rand(6, 3, SIZE, SIZE, generator=rng) * 60
    label = np.zeros((6, SIZE, SIZE), np.uint8)
    for z in range(1, 5):
        label[z, 10 + z : 30 + z, 20:45] = 1
    frames += torch.from_numpy(label)[:, None] * 150
    return frames, label


def official_masks(base: Base, frames: Tensor, prompts: dict[int, dict], *, everywhere: bool = False) -> Tensor:
    """What the official predictor makes of frames that are SIZE x SIZE, (frames, SIZE, SIZE) of bool.

    `everywhere`: its Step 2 also on prompted frames, as it runs on all others; their memories stay those of Step 1.
    """
    predictor = SAM2VideoPredictor.__new__(SAM2VideoPredictor)
    predictor.__dict__ = base.__dict__ | {
        "fill_hole_area": 0,
        "non_overlap_masks": False,
        "clear_non_cond_mem_around_input": False,
        "add_all_frames_to_correct_as_cond": False,
    }
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    state = {
        "images": (frames / 255 - mean) / deviation,
        "num_frames": len(frames),
        "offload_video_to_cpu": False,
        "offload_state_to_cpu": False,
        "video_height": SIZE,
        "video_width": SIZE,
        "device": torch.device("cpu"),
        "storage_device": torch.device("cpu"),
        "obj_id_to_idx": OrderedDict(),
        "obj_idx_to_id": OrderedDict(),
        "obj_ids": [],
    }
    names = ("point_inputs_per_obj", "mask_inputs_per_obj", "cached_features", "constants", "output_dict_per_obj")
    state |= {name: {} for name in (*names, "temp_output_dict_per_obj", "frames_tracked_per_obj")}
    for z, prompt in prompts.items():
        predictor.add_new_points_or_box(state, frame_idx=z, obj_id=1, normalize_coords=True, **prompt)
    out = torch.zeros(len(frames), SIZE, SIZE, dtype=torch.bool)
    if not everywhere:
        for z, _, masks in predictor.propagate_in_video(state):
            out[z] = masks[0, 0] > 0
        return out
    predictor.propagate_in_video_preflight(state)
    outputs = state["output_dict_per_obj"][0]
    for z in range(min(prompts), len(frames)):
        result, masks = predictor._run_single_frame_inference(
            inference_state=state,
            output_dict=outputs,
            frame_idx=z,
            batch_size=1,
            is_init_cond_frame=False,
            point_inputs=None,
            mask_inputs=None,
            reverse=False,
            run_mem_encoder=True,
        )
        if z not in outputs["cond_frame_outputs"]:
            outputs["non_cond_frame_outputs"][z] = result
        out[z] = predictor._get_orig_video_res_output(state, masks)[1][0, 0] > 0
    return out


@pytest.mark.parametrize("step2", ["unprompted", "all"])
@pytest.mark.parametrize("kind", ["box", "point"])
@pytest.mark.parametrize(("setting", "prompted"), [("one", [3]), ("two", [2, 4]), ("all", [1, 2, 3, 4])])
def test_masks_equal_the_official_predictors(base: Base, setting, prompted: list[int], kind, step2) -> None:
    frames, label = case()
    prompts = reference_prompts(label, LABELS, kind)
    with torch.inference_mode():
        got = VideoSegmenter(base, frames, prompts, LABELS, kind=kind).run((setting,))[setting, step2]
    points = sam_points(prompts, kind, (SIZE, SIZE), (SIZE, SIZE))
    given = {
        z: {"box": points[z, 0].flatten().tolist()}
        if kind == "box"
        else {"points": points[z, 0].tolist(), "labels": [1]}
        for z in prompted
    }
    with torch.inference_mode():
        expected = official_masks(base, frames, given, everywhere=step2 == "all").numpy()
    assert (got[: min(prompted)] == 0).all()
    differing = (got != expected).mean()
    assert differing <= 0.002  # the official predictor keeps memories in half precision
    assert 0.005 < expected[min(prompted) :].mean() < 0.98


def test_step_2_on_all_frames_changes_prompted_frames_alone(base: Base) -> None:
    frames, label = case()
    prompts = reference_prompts(label, LABELS, "box")
    with torch.inference_mode():
        maps = VideoSegmenter(base, frames, prompts, LABELS).run(("two",))
    same = (maps["two", "all"] == maps["two", "unprompted"]).all(axis=(1, 2))
    assert same.tolist() == [True, True, False, True, False, True]
