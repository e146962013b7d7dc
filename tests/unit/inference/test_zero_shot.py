"""Prompts from reference labels, pictures from intensities, label maps from masks; whose weights a file holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything import sam_model_registry

from rfmedsam2.errors import CheckpointError
from rfmedsam2.inference.video_tracking import prompted_slices
from rfmedsam2.inference.zero_shot import Painter, reference_prompts, sam_points
from rfmedsam2.nn.sam import NAMES, SamSegmenter
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam_weights import TINY_STEM, VIT_STEM, build_sam, sam_backbone
from rfmedsam2.pipeline.evaluation.prompt_study import Look, as_images, sam2_backbone
from rfmedsam2.records.dataset import LabelSet

LABELS = LabelSet(names={"background": 0, "liver": 3, "spleen": 1})
REGIONS = LabelSet(names={"background": 0, "whole": (1, 2), "core": 2}, regions_class_order=(1, 2))


def label() -> np.ndarray:
    frames = np.zeros((2, 8, 16), np.uint8)
    frames[0, 2:4, 4:8] = 3
    frames[1, 0, 0] = 1
    return frames


def test_boxes_and_points_in_declared_order_scaled_with_the_frame() -> None:
    boxes = reference_prompts(label(), LABELS, "box")
    assert boxes.present.tolist() == [[True, False], [False, True]]
    assert sam_points(boxes, "box", (8, 16), (8, 16))[0, 0].tolist() == [[4, 2], [7, 3]]
    assert sam_points(boxes, "box", (8, 16), (32, 64))[0, 0].tolist() == [[16, 8], [31, 15]]
    points = reference_prompts(label(), LABELS, "point")
    assert sam_points(points, "point", (8, 16), (8, 16))[1, 1].tolist() == [[0, 0]]
    assert sam_points(points, "point", (8, 16), (32, 64))[1, 1].tolist() == [[1.5, 1.5]]


def test_regions_are_prompted_whole() -> None:
    frames = np.zeros((1, 8, 8), np.uint8)
    frames[0, 1:6, 1:6], frames[0, 2:4, 2:4] = 1, 2
    boxes = reference_prompts(frames, REGIONS, "box").boxes
    assert boxes[0].tolist() == [[1, 1, 5, 5], [2, 2, 3, 3]]


def test_the_highest_logit_above_zero_is_painted() -> None:
    logits = torch.tensor([[[2.0, -1, 1]], [[1.0, -2, 3]]])
    target = np.ones((1, 3), np.uint8)
    Painter(LABELS).paint(logits, torch.tensor([0, 1]), target)
    assert target.tolist() == [[3, 0, 1]]
    Painter(LABELS).paint(logits[:0], torch.tensor([], dtype=torch.long), target)
    assert not target.any()


def test_regions_are_painted_in_their_order() -> None:
    target = np.zeros((1, 3), np.uint8)
    Painter(REGIONS).paint(torch.tensor([[[2.0, 1, -1]], [[1.0, -2, -3]]]), torch.tensor([0, 1]), target)
    assert target.tolist() == [[2, 1, 0]]


@pytest.mark.parametrize(
    ("present", "setting", "expected"),
    [
        ([4, 5, 6, 7, 9], "one", [6]),
        ([4, 5, 6, 7, 8, 9, 10, 11], "two", [6, 10]),
        ([4], "two", [4]),
        ([], "one", []),
        ([2, 3], "all", [2, 3]),
    ],
)
def test_frames_prompted(present: list[int], setting, expected: list[int]) -> None:
    assert prompted_slices(present, setting) == expected


def test_ct_is_shown_in_the_window_of_soft_tissue() -> None:
    image = np.array([-1000.0, -160, 40, 240, 3000]).reshape(1, 1, 1, 5)
    shown = as_images(image, Look(channels=(0,), names=("CT",), window=None))
    assert shown.shape == (1, 3, 1, 5)
    assert shown[0, 2, 0].tolist() == pytest.approx([0, 0, 127.5, 255, 255])


def test_other_channels_are_shown_between_percentiles_of_what_is_above_the_minimum() -> None:
    image = np.concatenate([np.zeros(1000), np.arange(1, 1002)]).reshape(1, 1, 1, -1)
    shown = as_images(image, Look(channels=(0,), names=("T1",), window=None))[0, 0, 0]
    assert shown[1000:1005].max() == 0
    assert shown[-6:].min() == 255
    assert shown[1500] == pytest.approx(127.5, abs=0.5)
    flat = as_images(np.full((1, 1, 2, 2), 7.0), Look(channels=(0,), names=("T1",), window=None))
    assert flat.abs().max() == 0


def test_three_channels_are_the_colors() -> None:
    image = np.stack([np.full((1, 2, 2), v) for v in (0.0, 5.0, 10.0)])
    shown = as_images(image, Look(channels=(2, 0, 1), names=("a", "b", "c"), window=(0, 10)))
    assert shown[0, :, 0, 0].tolist() == [255, 0, 127.5]


def test_sams_are_told_apart_by_their_weights() -> None:
    assert sam_backbone({TINY_STEM: torch.empty(32, 3, 3, 3)}) == "vit_tiny"
    assert sam_backbone({TINY_STEM: torch.empty(32, 3, 1, 1)}) == "lite_medsam"
    assert sam_backbone({VIT_STEM: torch.empty(1000, 3, 16, 16)}) is None
    assert sam_backbone({"weight": torch.empty(1)}) is None
    with pytest.raises(CheckpointError, match="weights of no SAM that is known"):
        build_sam({"weight": torch.empty(1)}, where="x.pt")
    with pytest.raises(CheckpointError, match=r"do not match vit_tiny \(MobileSAM\): x\.pt"):
        build_sam({TINY_STEM: torch.empty(32, 3, 3, 3)}, where="x.pt")


@pytest.mark.parametrize("key", ["vit_b", "vit_l", "vit_h"])
def test_official_vits_have_the_packages_names_and_shapes(key: str) -> None:
    with torch.device("meta"):
        official = sam_model_registry[key]().state_dict()
        backbone = sam_backbone(official)
        assert backbone == key
        assert NAMES[backbone] == f"SAM ViT-{key[-1].upper()}"
        ours = SamSegmenter(backbone).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in official.items() if n in ours}
    assert len(ours) == len(official)


@pytest.mark.parametrize("backbone", ["sam2_tiny", "sam2_small", "sam2_base_plus", "sam2_large", "nano"])
def test_sam_2s_are_told_apart_by_their_weights(backbone) -> None:
    with torch.device("meta"):
        assert sam2_backbone(build_base(backbone, frame_size=64).state_dict()) == backbone
    assert sam2_backbone({"weight": torch.empty(1)}) is None
