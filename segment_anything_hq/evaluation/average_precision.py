"""COCO's average precision of masks by given boxes: a detector's, or the annotations' own (HQ-SAM paper, section 4).

The counting is pycocotools', as published (extra `coco`); masks are made here, all boxes of a picture as one batch.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from rfmedsam2.errors import DatasetError, UsageError
from rfmedsam2.nn.segmenter import PromptBatch
from rfmedsam2.records.base import VersionedRecord, renamed
from segment_anything_hq.data.image_io import read_image
from segment_anything_hq.inference.image_transform import Fit, device_of, embed, make_transform
from segment_anything_hq.models import Network

AT_ONCE = 32
"""Boxes of a picture that are one batch."""
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""pycocotools' first six figures: over IoU 0.50 to 0.95, at 0.50, at 0.75, of small, middle and large objects."""


class Track(Protocol):
    """Shows progress around what it passes on."""

    def __call__(self, items: Iterable[int], description: str, total: int) -> Iterable[int]:
        """The items, one after the other."""
        ...


def _precision_1_to_2(data: dict[str, Any]) -> dict[str, Any]:
    return renamed(data, {"pictures": "images"})


class PrecisionRecord(VersionedRecord):
    """What the command writes."""

    upgrades = (_precision_1_to_2,)

    format: Literal[2] = 2
    network: dict[str, str]
    annotations: str
    detections: str | None
    images: int
    boxes: int
    figures: dict[str, float | None]
    """0 to 1; None where there is no object of a size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Average precision.

    Attributes:
        figures: by the names of `FIGURES`; not a number where there is no such object.
        pictures: that were looked at.
        boxes: that were given.
    """

    figures: dict[str, float]
    images: int
    boxes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box of a detector: `xyxy` in pixels of the picture."""

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
    track: Track | None = None,
) -> Precision:
    """Mask given boxes and count as COCO does.

    Args:
        network: in evaluation mode, on its device.
        annotations: COCO's or LVIS's JSON of instances.
        images: folder of the pictures, by their `file_name`.
        fit: how pictures lie in the frame.
        detections: boxes of a detector in COCO's format of results, [{"image_id", "category_id", "bbox": [x, y, w, h],
            "score"}]; the score ranks the masks. None: the boxes of the annotations, ranked by predicted IoU.
        max_images: only the first so many pictures that have boxes.
        track: shows progress by picture.

    Raises:
        UsageError: pycocotools is missing.
        DatasetError: files that are missing or hold something else.
        ImageError: a picture that cannot be read.
    """
    ground_truth = _coco(annotations)
    boxes = _annotated(ground_truth) if detections is None else _detected(detections, ground_truth)
    of: dict[int, list[Box]] = defaultdict(list)
    for box in boxes:
        of[box.image].append(box)
    chosen = sorted(of)[:max_images]
    if not chosen:
        raise DatasetError("There is no box to mask", where=detections or annotations)
    results: list[dict[str, Any]] = []
    for image in track(chosen, "pictures", len(chosen)) if track else chosen:
        path = images / Path(ground_truth.imgs[image]["file_name"]).name
        results += _masked(network, read_image(path), of[image], fit)
    return Precision(
        figures=_counted(ground_truth, results, chosen), images=len(chosen), boxes=sum(len(of[p]) for p in chosen)
    )


@torch.inference_mode()
def _masked(network: Network, image: np.ndarray, boxes: list[Box], fit: Fit) -> Iterator[dict[str, Any]]:
    """Results in COCO's format for the boxes of one picture."""
    codec = _package("mask")
    size = (image.shape[0], image.shape[1])
    framing = make_transform(size, network.frame_size, fit)
    embedded, device = embed(network, image, framing), device_of(network)
    made = []
    for start in range(0, len(boxes), AT_ONCE):
        part = boxes[start : start + AT_ONCE]
        corners = framing.apply_coords(np.array([box.xyxy for box in part]).reshape(-1, 2, 2)).reshape(-1, 4)
        answer = network.segment(
            embedded,
            PromptBatch(
                images=torch.zeros(len(part), dtype=torch.long, device=device),
                boxes=torch.as_tensor(corners, dtype=torch.float32, device=device),
            ),
        )
        masks = (framing.logits(answer.final) > 0).cpu().numpy().transpose(1, 2, 0)
        codes = codec.encode(np.asfortranarray(masks, np.uint8))
        for box, code, quality in zip(part, codes, answer.scores.tolist(), strict=True):
            score = quality if box.score is None else box.score
            made.append({"image_id": box.image, "category_id": box.category, "segmentation": code, "score": score})
    return iter(made)


def _counted(ground_truth: Any, results: list[dict[str, Any]], images: list[int]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        counting = _package("cocoeval").COCOeval(ground_truth, ground_truth.loadRes(results), "segm")
        counting.params.imgIds = images
        counting.evaluate()
        counting.accumulate()
        counting.summarize()
    # pycocotools says -1 where there is nothing to count
    values = [float(value) if value >= 0 else math.nan for value in counting.stats[: len(FIGURES)]]
    return dict(zip(FIGURES, values, strict=True))


def _coco(path: Path) -> Any:
    content = _json(path)
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in parts):
        raise DatasetError("The file holds no instances", where=path, expected=f"lists named {', '.join(parts)}")
    coco = _package("coco").COCO()
    # LVIS has a web address in the place of the name, and no crowds
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
    needed = {"image_id", "category_id", "bbox", "score"}
    good = isinstance(content, list) and all(isinstance(d, dict) and needed <= d.keys() for d in content)
    if not good:
        raise DatasetError(
            "The file holds no detections", where=path, expected=f"a list of {', '.join(sorted(needed))}"
        )
    unknown = sorted({d["image_id"] for d in content} - ground_truth.imgs.keys())
    if unknown:
        found = f"image_id {', '.join(map(str, unknown[:5]))}"
        raise DatasetError("Detections are of pictures that the annotations do not have", where=path, found=found)
    return [
        Box(image=d["image_id"], category=d["category_id"], xyxy=_corners(d["bbox"]), score=float(d["score"]))
        for d in content
    ]


def _corners(xywh: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = map(float, xywh)
    return x, y, x + width, y + height


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DatasetError("The file is missing", where=path) from None
    except (OSError, ValueError) as error:
        raise DatasetError("The file is no JSON", where=path, found=error) from error


def _package(part: str) -> Any:
    try:
        return importlib.import_module(f"pycocotools.{part}")
    except ImportError:
        raise UsageError(
            "COCO's average precision is counted by pycocotools, which is not installed",
            remedy="pip install pycocotools, or install this package with the extra `coco`",
        ) from None
