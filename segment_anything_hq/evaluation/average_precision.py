"""COCO average precision of masks prompted with a detector's boxes or the annotated ones (HQ-SAM paper, section 4).

pycocotools (extra `coco`) computes the metrics; the masks of all boxes of an image are predicted in batches.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rfmedsam2.errors import DatasetError, UsageError
from rfmedsam2.nn.segmenter import PromptBatch
from rfmedsam2.system.json_text import parse_json
from rfmedsam2.system.ordinary_files import read_whole
from rfmedsam2.system.progress import Track, silent
from segment_anything_hq.data.coco import image_file
from segment_anything_hq.data.image_io import read_image
from segment_anything_hq.evaluation.coco_format import require_annotations, require_detections, require_known
from segment_anything_hq.inference.image_transform import Fit, device_of, embed, make_transform
from segment_anything_hq.models import Network

BATCH_SIZE = 32
"""Boxes per batch, all of one image."""
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""pycocotools' first six metrics: mean over IoU 0.50 to 0.95, at 0.50, at 0.75, for small, medium and large objects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Average precision of predicted masks.

    Attributes:
        metrics: value, 0 to 1, by the names in `METRICS`; NaN if there are no such objects.
        files: the images evaluated.
        boxes: number of boxes given as prompts.
    """

    metrics: dict[str, float]
    files: tuple[Path, ...]
    boxes: int

    @property
    def images(self) -> int:
        """Number of images evaluated."""
        return len(self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box prompt: `xyxy` as COCO has it, edges of pixels, and as published given to SAM as pixel indices.

    `score` is None for annotated boxes.
    """

    image: int
    category: int
    xyxy: tuple[float, float, float, float]
    score: float | None


def average_precision(
    network: Network,
    annotations: Path,
    images: Path,
    *,
    fit: Fit,
    detections: Path | None = None,
    max_images: int | None = None,
    track: Track = silent,
) -> Precision:
    """Predict a mask for each box and compute COCO's average precision.

    Args:
        network: a network in evaluation mode, on its device.
        annotations: COCO or LVIS instances, JSON.
        images: folder that holds the images by their `file_name`.
        fit: how images are fitted into the frame.
        detections: a detector's boxes in COCO's results format, [{"image_id", "category_id", "bbox": [x, y, w, h],
            "score"}], whose scores rank the masks. None: the annotated boxes, ranked by the predicted IoU.
        max_images: evaluate only this many images, the first that have boxes; None: all.
        track: shows progress by image.

    Raises:
        UsageError: pycocotools is not installed.
        DatasetError: a file is missing or has another format.
        ImageError: an image cannot be read.
    """
    ground_truth = _coco(annotations)
    boxes = _annotated(ground_truth) if detections is None else _detected(detections, ground_truth)
    boxes_by_image: dict[int, list[Box]] = defaultdict(list)
    for box in boxes:
        boxes_by_image[box.image].append(box)
    chosen = sorted(boxes_by_image)[:max_images]
    if not chosen:
        raise DatasetError("The file contains no boxes", where=detections or annotations)
    results: list[dict[str, Any]] = []
    files: list[Path] = []
    for image in track(chosen, "images", len(chosen)):
        path = image_file(ground_truth.imgs[image], images)
        if path is None:
            name = ground_truth.imgs[image]["file_name"]
            raise DatasetError("An annotated image is missing", where=images, expected=f"a file {name}")
        pixels, entry = read_image(path), ground_truth.imgs[image]
        if pixels.shape[:2] != (entry["height"], entry["width"]):
            raise DatasetError(
                "An image has another size than in the annotations",
                where=path,
                expected=f"{entry['height']} x {entry['width']}",
                found=f"{pixels.shape[0]} x {pixels.shape[1]}",
            )
        results += _predict(network, pixels, boxes_by_image[image], fit)
        files.append(path)
    return Precision(
        metrics=_count(ground_truth, results, chosen),
        files=tuple(files),
        boxes=sum(len(boxes_by_image[image]) for image in chosen),
    )


@torch.inference_mode()
def _predict(network: Network, image: np.ndarray, boxes: list[Box], fit: Fit) -> Iterator[dict[str, Any]]:
    """Masks of the boxes of one image, in COCO's results format."""
    codec = _package("mask")
    size = (image.shape[0], image.shape[1])
    transform = make_transform(size, network.frame_size, fit)
    embedded, device = embed(network, image, transform), device_of(network)
    results = []
    for start in range(0, len(boxes), BATCH_SIZE):
        part = boxes[start : start + BATCH_SIZE]
        corners = transform.apply_coords(np.array([box.xyxy for box in part]).reshape(-1, 2, 2)).reshape(-1, 4)
        answer = network.segment(
            embedded,
            PromptBatch(
                images=torch.zeros(len(part), dtype=torch.long, device=device),
                boxes=torch.as_tensor(corners, dtype=torch.float32, device=device),
            ),
        )
        masks = (transform.logits(answer.final) > 0).cpu().numpy().transpose(1, 2, 0)
        codes = codec.encode(np.asfortranarray(masks, np.uint8))
        for box, code, quality in zip(part, codes, answer.scores.tolist(), strict=True):
            score = quality if box.score is None else box.score
            results.append({"image_id": box.image, "category_id": box.category, "segmentation": code, "score": score})
    return iter(results)


def _count(ground_truth: Any, results: list[dict[str, Any]], images: list[int]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        counting = _package("cocoeval").COCOeval(ground_truth, ground_truth.loadRes(results), "segm")
        counting.params.imgIds = images
        counting.evaluate()
        counting.accumulate()
        counting.summarize()
    # pycocotools gives -1 for metrics without objects
    values = [float(value) if value >= 0 else math.nan for value in counting.stats[: len(METRICS)]]
    return dict(zip(METRICS, values, strict=True))


def _coco(path: Path) -> Any:
    content = _json(path)
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in parts):
        raise DatasetError(
            "The file is not an instance annotation file", where=path, expected=f"lists named {', '.join(parts)}"
        )
    require_annotations(content, path)
    coco = _package("coco").COCO()
    # LVIS has `coco_url` instead of `file_name`, and no crowds
    for image in content["images"]:
        image.setdefault("file_name", Path(image.get("coco_url", "")).name)
    for entry in content["annotations"]:
        entry.setdefault("iscrowd", 0)
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _annotated(ground_truth: Any) -> list[Box]:
    return [
        Box(image=entry["image_id"], category=entry["category_id"], xyxy=_corners(entry["bbox"]), score=None)
        for entry in ground_truth.dataset["annotations"]
        if not entry["iscrowd"] and min(entry["bbox"][2:]) > 0
    ]


def _detected(path: Path, ground_truth: Any) -> list[Box]:
    content = _json(path)
    found = require_detections(content, path)
    require_known(found, ground_truth.imgs, ground_truth.cats, path)
    return [
        Box(image=d["image_id"], category=d["category_id"], xyxy=_corners(d["bbox"]), score=d["score"]) for d in found
    ]


def _corners(xywh: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = map(float, xywh)
    return x, y, x + width, y + height


def _json(path: Path) -> Any:
    try:
        return parse_json(read_whole(path), unique=False)
    except FileNotFoundError:
        raise DatasetError("The file is missing", where=path) from None
    except OSError as error:
        raise DatasetError(f"The file cannot be read ({error.strerror})", where=path) from error
    except ValueError as error:
        raise DatasetError("The file is not valid JSON", where=path, found=error) from error


def _package(part: str) -> Any:
    try:
        return importlib.import_module(f"pycocotools.{part}")
    except ImportError:
        raise UsageError(
            "COCO's average precision needs pycocotools, which is not installed",
            remedy="pip install pycocotools, or install this package with the extra `coco`",
        ) from None
