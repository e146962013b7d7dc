"""Masks of everything in an image from a grid of points: `SamAutomaticMaskGenerator` as the published package has it.

The steps are `segment_anything`'s. A point whose predicted IoU does not pass is dropped before there is a mask of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator as PlainGenerator
from torch import Tensor

from rfmedsam2.errors import MissingPackageError, UsageError
from segment_anything_hq.modeling import MaskDecoderHQ, Sam
from segment_anything_hq.predictor import SamPredictor, color_image
from segment_anything_hq.utils.amg import (
    MaskData,
    area_from_rle,
    batch_iterator,
    batched_mask_to_box,
    box_xyxy_to_xywh,
    build_all_layer_point_grids,
    build_point_grid,
    calculate_stability_score,
    coco_encode_rle,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    remove_small_regions,
    rle_to_mask,
    uncrop_boxes_xyxy,
    uncrop_masks,
    uncrop_points,
)

# names that the published module has, too
__all__ = [
    "MaskData",
    "Sam",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "area_from_rle",
    "batch_iterator",
    "batched_mask_to_box",
    "box_xyxy_to_xywh",
    "build_all_layer_point_grids",
    "calculate_stability_score",
    "coco_encode_rle",
    "generate_crop_boxes",
    "is_box_near_crop_edge",
    "mask_to_rle_pytorch",
    "remove_small_regions",
    "rle_to_mask",
    "uncrop_boxes_xyxy",
    "uncrop_masks",
    "uncrop_points",
]

FINISHED_AT_ONCE = 8
"""Masks that are brought to the image's size together."""
_WHOLE = ("points_per_batch", "crop_n_layers")
_RANGES = {
    "points_per_batch": (1, math.inf, "a whole number from 1"),
    "crop_n_layers": (0, math.inf, "a whole number from 0"),
    "crop_overlap_ratio": (0, 1, "a share from 0 to below 1"),
    "crop_n_points_downscale_factor": (1, math.inf, "a number from 1"),
}
"""Of options that not every number will do for: least, limit, in words."""
OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")


def _checked_grids(
    points_per_side: int | None, point_grids: Sequence[NDArray] | None, *, layers: int
) -> list[NDArray] | None:
    """The grids as NumPy arrays; None where they are to be made of `points_per_side`.

    Raises:
        UsageError: neither or both are given, or there are no points.
    """
    if (points_per_side is None) == (point_grids is None):
        raise UsageError("Points are given twice or not at all", expected="either points_per_side or point_grids")
    if points_per_side is not None and not _is_number(points_per_side, least=1):
        raise UsageError("There are no points to prompt with", expected="points_per_side from 1", found=points_per_side)
    if point_grids is None:
        return None
    grids = [grid.double().numpy(force=True) if isinstance(grid, Tensor) else np.array(grid) for grid in point_grids]
    shapes = [grid.shape for grid in grids]
    inside = all(grid.dtype.kind in "iuf" and bool(((grid >= 0) & (grid <= 1)).all()) for grid in grids)
    if (
        not inside
        or len(shapes) != layers
        or any(len(s) != 2 or s[1] != 2 for s in shapes)
        or not any(s[0] for s in shapes)
    ):
        raise UsageError(
            "point_grids cannot be used",
            expected=f"{layers} array(s) (k, 2), one for each layer of crops, of 0 to 1, with at least one point",
            found=", ".join(map(str, shapes)) or "none",
        )
    return grids


def _is_number(value: object, *, least: float = -math.inf, below: float = math.inf) -> bool:
    """Whether it is a number from `least` on, and less than `below`; NaN is not."""
    return isinstance(value, Real) and least <= float(value) < below


def _require_numbers(**given: object) -> None:
    """Check the numbers of the options.

    Raises:
        UsageError: names the first that cannot be used.
    """
    for name, value in given.items():
        least, below, expected = _RANGES.get(name, (-math.inf, math.inf, "a number"))
        if not _is_number(value, least=least, below=below) or (name in _WHOLE and not float(value).is_integer()):  # type: ignore[arg-type]
            raise UsageError(f"{name} cannot be used", expected=expected, found=repr(value))


def _require_package(module: str, package: str, *, needed: bool) -> None:
    """Check that an optional package can be imported, if the options need it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        if needed:
            import_module(module)
    except ImportError:
        raise MissingPackageError(f"These options need {package}", remedy=f"Run pip install {package}") from None


class SamAutomaticMaskGenerator(PlainGenerator):
    """Masks of all objects; arguments and steps as in `segment_anything`, with HQ-SAM's masks.

    Args:
        model: of `sam_model_registry`.
        points_per_side: points of the grid along each side; None where `point_grids` are given.
        points_per_batch: points whose prompts are prepared together.
        pred_iou_thresh: least predicted IoU of a mask.
        stability_score_thresh: least IoU of the masks at a higher and a lower threshold.
        stability_score_offset: by how much these thresholds differ from the mask's.
        box_nms_thresh: IoU of boxes above which the worse of two masks is dropped.
        crop_n_layers: how often the image is looked at again in 4, 16 ... crops.
        crop_nms_thresh: `box_nms_thresh` between crops.
        crop_overlap_ratio: share of the side by which crops of the first layer overlap.
        crop_n_points_downscale_factor: by how much the grid gets coarser with each layer.
        point_grids: for each layer (k, 2) XY of 0 to 1.
        min_mask_region_area: pixels of the least island or hole that is left; needs OpenCV where above 0.
        output_mode: "binary_mask", "uncompressed_rle" or "coco_rle" (needs pycocotools).
    """

    predictor: SamPredictor
    point_grids: list[NDArray]

    def __init__(
        self,
        model: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[NDArray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
    ) -> None:
        numbers: dict[str, Any] = {
            "points_per_batch": points_per_batch,
            "pred_iou_thresh": pred_iou_thresh,
            "stability_score_thresh": stability_score_thresh,
            "stability_score_offset": stability_score_offset,
            "box_nms_thresh": box_nms_thresh,
            "crop_n_layers": crop_n_layers,
            "crop_nms_thresh": crop_nms_thresh,
            "crop_overlap_ratio": crop_overlap_ratio,
            "crop_n_points_downscale_factor": crop_n_points_downscale_factor,
            "min_mask_region_area": min_mask_region_area,
        }
        _require_numbers(**numbers)
        grids = _checked_grids(points_per_side, point_grids, layers=crop_n_layers + 1)
        if output_mode not in OUTPUT_MODES:
            raise UsageError("Unknown output_mode", expected=f"one of {', '.join(OUTPUT_MODES)}", found=output_mode)
        _require_package("cv2", "opencv-python-headless", needed=min_mask_region_area > 0)
        _require_package("pycocotools", "pycocotools", needed=output_mode == "coco_rle")
        if grids is None:
            sides = [int(points_per_side / crop_n_points_downscale_factor**i) for i in range(crop_n_layers + 1)]
            grids = [build_point_grid(side) if side else np.zeros((0, 2)) for side in sides]
        predictor = SamPredictor(model)  # refuses what is not a SAM
        super().__init__(model, points_per_side=None, point_grids=grids, output_mode=output_mode, **numbers)
        self.predictor = predictor
        self._multimask = True

    @torch.no_grad()
    def generate(self, image: NDArray[np.uint8], multimask_output: bool = True) -> list[dict[str, Any]]:
        """Masks of everything in an image.

        Args:
            image: (H, W, 3) of 0 to 255.
            multimask_output: of each point's masks take the best by predicted IoU.

        Returns:
            for each mask "segmentation" (a mask (H, W) bool or its run lengths, by `output_mode`), "bbox" XYWH, "area"
            in pixels, "predicted_iou", "point_coords" [[X, Y]], "stability_score" and "crop_box" XYWH; an empty list
            where no mask passes.

        Raises:
            ImageError: not three channels of 8 bits.
            UsageError: `crop_n_layers` is too large for this image.
        """
        self._multimask = multimask_output
        image = color_image(image)
        self._require_pixels(image.shape[0], image.shape[1])
        return super().generate(image)

    def _require_pixels(self, height: int, width: int) -> None:
        """Check that every crop has pixels.

        Raises:
            UsageError: there are too many layers for the image.
        """
        for layers in range(1, self.crop_n_layers + 1):
            boxes, _ = generate_crop_boxes((height, width), layers, self.crop_overlap_ratio)
            if any(x0 >= x1 or y0 >= y1 for x0, y0, x1, y1 in boxes):
                raise UsageError(
                    "The image is too small for this number of crop layers",
                    expected=f"crop_n_layers up to {layers - 1}",
                    found=f"{self.crop_n_layers} for {height} x {width} pixels",
                )

    def _process_crop(
        self, image: NDArray, crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> MaskData:
        """Masks of one crop, none where its layer has no points."""
        if not len(self.point_grids[crop_layer_idx]):
            return MaskData()
        data = super()._process_crop(image, crop_box, crop_layer_idx, orig_size)
        if not len(data["rles"]):
            data["crop_boxes"] = torch.zeros((0, 4), dtype=torch.long)
        return data

    def _process_batch(
        self, points: NDArray, im_size: tuple[int, ...], crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        """Masks of points (k, 2) XY of a crop, those of them that pass."""
        framed = self.predictor.transform.apply_coords(points, im_size)
        # as the published package: coordinates as precise as the grid's
        coords = torch.as_tensor(framed, device=self.predictor.device)[:, None]
        logits, scores, kept = self._masks(coords)
        data = MaskData()
        for start in range(0, max(len(kept), 1), FINISHED_AT_ONCE):
            rows = slice(start, start + FINISHED_AT_ONCE)
            data.cat(self._finished(logits[rows], scores[rows], points[kept[rows]], crop_box, orig_size))
        return data

    def _masks(self, coords: Tensor) -> tuple[Tensor, Tensor, NDArray]:
        """Of points (k, 1, 2): logits (n, 4s, 4s), predicted IoU (n,) and which points they are of (n,)."""
        predictor, least = self.predictor, self.pred_iou_thresh if self.pred_iou_thresh > 0 else None
        labels = torch.ones(coords.shape[:2], dtype=torch.int, device=coords.device)
        if isinstance(predictor.model.mask_decoder, MaskDecoderHQ):
            found = predictor.decode((coords, labels), None, None, multimask=self._multimask, least_score=least)
            return found.logits, found.scores[found.kept], found.kept.cpu().numpy()
        _, scores, logits = predictor.predict_torch(
            coords, labels, multimask_output=self._multimask, return_logits=True
        )
        points = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores).flatten()
        passed = scores.flatten() > (-torch.inf if least is None else least)
        return logits.flatten(0, 1)[passed], scores.flatten()[passed], points[passed].cpu().numpy()

    def _finished(
        self, logits: Tensor, scores: Tensor, points: NDArray, crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        """Masks in the whole image of logits (n, 4s, 4s): those that are stable and not cut by the crop."""
        predictor, (height, width) = self.predictor, orig_size
        threshold = predictor.model.mask_threshold
        masks = predictor.model.postprocess_masks(logits[:, None], predictor.input_size, predictor.original_size)[:, 0]
        data = MaskData(masks=masks, iou_preds=scores, points=torch.as_tensor(points))
        data["stability_score"] = calculate_stability_score(data["masks"], threshold, self.stability_score_offset)
        if self.stability_score_thresh > 0.0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        data["masks"] = data["masks"] > threshold
        data["boxes"] = batched_mask_to_box(data["masks"])
        inside = ~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height])
        if not torch.all(inside):
            data.filter(inside)
        data["rles"] = mask_to_rle_pytorch(uncrop_masks(data["masks"], crop_box, height, width))
        del data["masks"]
        return data
