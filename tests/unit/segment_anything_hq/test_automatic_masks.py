"""Automatic masks at their edges: nothing that passes, crops without points, grids and images that cannot be used."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from rfmedsam2.errors import ImageError, MissingPackageError, UsageError
from segment_anything_hq import SamAutomaticMaskGenerator, SamPredictor
from segment_anything_hq.nn.hq_sam import HqSam, build_hq_sam

IMAGE = np.full((90, 120, 3), 30, np.uint8)
IMAGE[20:70, 30:90] = [220, 180, 90]
ALL: dict[str, Any] = {"pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "points_per_side": 2}
"""Every point gives a mask."""


@pytest.fixture(scope="module")
def sam() -> HqSam:
    torch.manual_seed(0)
    return build_hq_sam("vit_tiny", frame_size=128)


def found(sam: HqSam, image: np.ndarray = IMAGE, **options: Any) -> list[dict[str, Any]]:
    return SamAutomaticMaskGenerator(sam, **{**ALL, **options}).generate(image)


@pytest.mark.parametrize("layers", [0, 1])
def test_where_no_mask_passes_the_list_is_empty(sam: HqSam, layers: int) -> None:
    assert found(sam, pred_iou_thresh=2.0, crop_n_layers=layers) == []
    assert found(sam, stability_score_thresh=2.0, crop_n_layers=layers) == []


def test_crops_of_which_only_some_give_masks_keep_their_boxes(sam: HqSam) -> None:
    """Point grids leave the second layer's crops, and then the whole image, without points."""
    grid, none = np.array([[0.5, 0.5]]), np.zeros((0, 2))
    whole = found(sam, points_per_side=None, point_grids=[grid])
    assert len(whole) == 1
    assert whole[0]["crop_box"] == [0, 0, 120, 90]
    same = found(sam, points_per_side=None, point_grids=[grid, none], crop_n_layers=1)
    assert [m["bbox"] for m in same] == [m["bbox"] for m in whole]
    assert same[0]["crop_box"] == [0, 0, 120, 90]
    assert (same[0]["segmentation"] == whole[0]["segmentation"]).all()
    crops = found(sam, points_per_side=None, point_grids=[none, grid], crop_n_layers=1, crop_nms_thresh=1.0)
    assert all(box["crop_box"][2:] != [120, 90] for box in crops)


def test_a_grid_that_becomes_too_coarse_for_crops_leaves_them_out(sam: HqSam) -> None:
    coarse = found(sam, points_per_side=2, crop_n_layers=1, crop_n_points_downscale_factor=4, crop_nms_thresh=1.0)
    plain = found(sam, points_per_side=2)
    assert [m["bbox"] for m in coarse] == [m["bbox"] for m in plain]


def test_more_layers_than_the_image_has_pixels_for_are_a_sentence(sam: HqSam) -> None:
    """Some crops of the last layers would lie beyond the image."""
    with pytest.raises(UsageError, match=r"too small.*Expected crop_n_layers up to \d\. Found 9 for 90 x 120 pixels"):
        found(sam, crop_n_layers=9)


def test_grids_may_be_tensors_and_lists(sam: HqSam) -> None:
    grid = [[0.25, 0.5], [0.5, 0.5]]
    boxes = [
        [mask["bbox"] for mask in found(sam, points_per_side=None, point_grids=[given])]
        for given in (np.array(grid), torch.tensor(grid, requires_grad=True), grid)
    ]
    assert boxes[0] == boxes[1] == boxes[2] != []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"points_per_side": 0}, "no points to prompt with.*points_per_side from 1.*Found 0"),
        ({"points_per_side": -3}, "no points to prompt with"),
        ({"points_per_side": None}, "twice or not at all"),
        ({"point_grids": [np.ones((1, 2))]}, "twice or not at all"),
        ({"points_per_side": None, "point_grids": [np.ones((0, 2))]}, "point_grids cannot be used"),
        ({"points_per_side": None, "point_grids": [np.ones((1, 2))], "crop_n_layers": 1}, r"Expected 2 array"),
        ({"points_per_side": None, "point_grids": [np.ones(2)]}, "point_grids cannot be used"),
        ({"points_per_side": None, "point_grids": []}, "Found none"),
        ({"points_per_side": "2"}, "no points to prompt with"),
        ({"points_per_side": None, "point_grids": [np.full((1, 2), np.nan)]}, "point_grids cannot be used"),
        ({"points_per_side": None, "point_grids": [np.full((1, 2), 5.0)]}, "of 0 to 1"),
        ({"points_per_side": None, "point_grids": [[["a", "b"]]]}, "point_grids cannot be used"),
        ({"points_per_batch": 0}, "points_per_batch cannot be used. Expected a whole number from 1. Found 0"),
        ({"crop_n_layers": -1}, "crop_n_layers cannot be used. Expected a whole number from 0"),
        ({"crop_n_layers": 1.5}, "crop_n_layers cannot be used"),
        ({"crop_overlap_ratio": 5.0}, "crop_overlap_ratio cannot be used. Expected a share from 0 to below 1"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor cannot be used"),
        ({"pred_iou_thresh": None}, "pred_iou_thresh cannot be used. Expected a number. Found None"),
        *(({name: np.nan}, f"{name} cannot be used") for name in ("pred_iou_thresh", "stability_score_thresh")),
        *(({name: np.nan}, f"{name} cannot be used") for name in ("box_nms_thresh", "stability_score_offset")),
        ({"output_mode": "rle"}, "binary_mask, uncompressed_rle, coco_rle.*Found rle"),
    ],
)
def test_points_and_modes_that_cannot_be_used_are_sentences(sam: HqSam, options: dict, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        SamAutomaticMaskGenerator(sam, **options)


@pytest.mark.parametrize(
    ("module", "options"), [("cv2", {"min_mask_region_area": 5}), ("pycocotools", {"output_mode": "coco_rle"})]
)
def test_packages_that_are_missing_are_named_before_anything_is_computed(sam: HqSam, monkeypatch, module, options):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=r"pip install (opencv|pycocotools)"):
        SamAutomaticMaskGenerator(sam, **options)


@pytest.mark.parametrize(
    "image", [IMAGE[..., 0], IMAGE[..., :1], np.dstack([IMAGE, IMAGE[..., 0]]), IMAGE / 255, IMAGE[:0]]
)
def test_images_that_are_not_in_color_are_sentences(sam: HqSam, image: np.ndarray) -> None:
    with pytest.raises(ImageError, match="needs a color image"):
        found(sam, image)


def test_the_smallest_image_is_an_image(sam: HqSam) -> None:
    assert isinstance(found(sam, np.zeros((1, 1, 3), np.uint8), points_per_side=1), list)


def test_what_is_not_a_sam_is_named() -> None:
    for model in (None, "vit_b", torch.nn.Linear(1, 1)):
        with pytest.raises(UsageError, match="sam_model is not a SAM"):
            SamAutomaticMaskGenerator(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({"point_coords": [[np.nan, 4]], "point_labels": [1]}, "point_coords cannot be used"),
        ({"point_coords": [[None, 4]], "point_labels": [1]}, "point_coords cannot be used"),
        ({"point_coords": [[3, 4]], "point_labels": [0.5]}, "Unknown point_labels.*1 on the object"),
        ({"point_coords": [[3, 4]], "point_labels": [7]}, "Unknown point_labels"),
        ({"point_coords": [[3, 4]], "point_labels": ["1"]}, "point_labels cannot be used"),
        ({"point_coords": [[3, 4]], "point_labels": 1}, "Points that cannot be used"),
        ({"box": [np.nan] * 4}, "box cannot be used"),
        ({"box": [None] * 4}, "box cannot be used"),
        ({"mask_input": np.full((1, 32, 32), np.inf)}, "mask_input cannot be used"),
    ],
)
def test_prompts_that_are_not_numbers_give_no_masks(sam: HqSam, prompt: dict, sentence: str) -> None:
    predictor = SamPredictor(sam)
    with pytest.raises(UsageError, match="There is no image yet"):
        predictor.get_image_embedding()
    predictor.set_image(IMAGE)
    with pytest.raises(UsageError, match=sentence):
        predictor.predict(**prompt)
    whole = predictor.predict(point_coords=[[30, 40]], point_labels=[True])  # type: ignore[arg-type]
    assert (whole[0] == predictor.predict(np.array([[30.0, 40.0]]), np.array([1]))[0]).all()
