"""COCO's average precision from box prompts: known values for right and wrong masks, as pycocotools counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.samhq_commands import run_error, run_ok

from rfmedsam2.errors import DatasetError
from rfmedsam2.nn.segmenter import Embedded, Segmented
from segment_anything_hq import models
from segment_anything_hq.evaluation.average_precision import average_precision
from segment_anything_hq.evaluation.coco_format import require_annotations

pytest.importorskip("pycocotools")
SIDE = 64
BOXES = {1: [(4, 6, 30, 20), (40, 30, 20, 30)], 2: [(10, 10, 40, 40)]}
"""x, y, width, height of rectangles, by image id."""


class BoxFiller(torch.nn.Module):
    """A segmenter that predicts the whole box."""

    frame_size = SIDE

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.calls = 0

    def normalize(self, images):
        return images

    def encode(self, frames):
        self.calls += 1
        return Embedded(embedding=frames)

    def segment(self, embedded, prompted, *, previous=None):
        y, x = (torch.arange(SIDE) + 0.5)[:, None], (torch.arange(SIDE) + 0.5)[None]
        x0, y0, x1, y1 = (v[:, None, None] for v in prompted.boxes.unbind(1))
        inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
        return Segmented(logits=torch.where(inside, 8.0, -8.0), scores=torch.full((len(inside),), 0.9))


@pytest.fixture
def coco(tmp_path: Path) -> SimpleNamespace:
    images, annotations = [], []
    for number, boxes in BOXES.items():
        Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
        for x, y, w, h in boxes:
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 7, "bbox": [x, y, w, h]}
            annotations.append(entry | {"area": w * h, "segmentation": [polygon], "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "thing"}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return SimpleNamespace(root=tmp_path, path=tmp_path / "instances.json", content=content)


def test_right_masks_by_the_annotations_boxes_count_one(coco) -> None:
    network = BoxFiller()
    found = average_precision(network, coco.path, coco.root, fit="stretch")
    assert found.metrics["AP"] == pytest.approx(1.0)
    assert (found.images, found.boxes) == (2, 3)
    assert network.calls == 2, "an image is embedded once"
    assert np.isnan(found.metrics["APl"])


def test_boxes_of_a_detector_are_ranked_by_its_scores(coco) -> None:
    right = [{"image_id": p, "category_id": 7, "bbox": list(b), "score": 0.9} for p, bs in BOXES.items() for b in bs]
    wrong = [{"image_id": 1, "category_id": 7, "bbox": [0, 50, 10, 10], "score": 0.1}]
    late, early = coco.root / "late.json", coco.root / "early.json"
    late.write_text(json.dumps(right + wrong))
    early.write_text(json.dumps([*right, wrong[0] | {"score": 1.0}]))
    metrics = [
        average_precision(BoxFiller(), coco.path, coco.root, fit="stretch", detections=p).metrics for p in (late, early)
    ]
    assert metrics[0]["AP"] == pytest.approx(1.0)
    # one wrong before three right: precision is 3/4 at every recall
    assert metrics[1]["AP"] == pytest.approx(0.75, abs=0.01)


def test_a_real_network_is_masked_by_boxes(coco) -> None:
    torch.manual_seed(0)
    network = models.build("hq_sam", "vit_nano", frame_size=SIDE)
    found = average_precision(network, coco.path, coco.root, fit="pad", max_images=1)
    assert found.images == 1
    assert 0 <= found.metrics["AP"] <= 1


def test_the_command_writes_what_it_found(coco) -> None:
    out = coco.root / "ap.json"
    words = ("sam", "-b", "vit_nano", "--frame-size", 64, "--annotations", coco.path, "-i", coco.root, "-o", out)
    assert "3 in 2 images" in " ".join(run_ok("evaluate_coco", *words).out.split())
    record = json.loads(out.read_text())
    assert (record["images"], record["boxes"], record["figures"]["APl"]) == (2, 3, None)
    assert "already exists" in run_error("evaluate_coco", *words)


def test_training_images_are_marked(coco, tmp_path: Path) -> None:
    """The first image is one of the training's, the second another one of them, compressed anew."""
    data = tmp_path / "data"
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[8:40, 10:50] = 255
    for number in BOXES:
        small = np.random.default_rng(number).integers(0, 256, (7, 7, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(data / "images" / f"{number}.png")
        image.save(coco.root / f"{number}.png", compress_level=6 if number == 1 else 0)
        Image.fromarray(mask).save(data / "masks" / f"{number}.png")
    tiny = ("--set", "train.workers=0", "train.iterations_per_epoch=1", "train.epochs=1")
    size = ("-b", "vit_nano", "--frame-size", SIDE)
    run_ok("train", "hq_sam", *size, "--data", data, "--held-out", 0, *tiny, "--device", "cpu", "-o", tmp_path / "run")
    out = tmp_path / "ap.json"
    words = ("-m", tmp_path / "run" / "checkpoint_final.safetensors", "--annotations", coco.path, "-i", coco.root)
    said = run_ok("evaluate_coco", *words, "-o", out).err
    assert "Warning: the network was trained on 1 of 2 images of instances.json" in said
    assert "Warning: 1 of 2 images of instances.json look like images that the network was trained on" in said
    record = json.loads(out.read_text())
    assert (record["trained_on"], record["looks_trained_on"]) == (1, 1)


def test_wrong_files_are_errors(coco) -> None:
    def fails(match: str, **changes) -> None:
        with pytest.raises(DatasetError, match=match):
            average_precision(BoxFiller(), **{"annotations": coco.path, "images": coco.root, "fit": "pad"} | changes)

    fails("missing", annotations=coco.root / "none.json")
    (coco.root / "list.json").write_text("[]")
    fails("not an instance annotation", annotations=coco.root / "list.json")
    fails("contains no boxes", detections=coco.root / "list.json")
    (coco.root / "bad.json").write_text('[{"bbox": [1, 2, 3, 4]}]')
    fails("not in COCO's format.*0.image_id: Field required", detections=coco.root / "bad.json")
    for score in ('"high"', "NaN", "Infinity"):
        text = '[{"image_id": 1, "category_id": 7, "bbox": [0, 0, 2, 2], "score": %s}]' % score  # noqa: UP031 - braces
        (coco.root / "bad.json").write_text(text)
        fails("0.score", detections=coco.root / "bad.json")
    (coco.root / "other.json").write_text('[{"image_id": 1, "category_id": 5, "bbox": [0, 0, 2, 2], "score": 1}]')
    fails("refer to categories that are not in the annotations.*category_id 5", detections=coco.root / "other.json")
    (coco.root / "other.json").write_text('[{"image_id": 9, "category_id": 7, "bbox": [0, 0, 2, 2], "score": 1}]')
    fails("not in the annotations", detections=coco.root / "other.json")


RUNS = {"size": [SIDE, SIDE], "counts": [SIDE * SIDE - 5, 5]}


@pytest.mark.parametrize(
    ("part", "entry", "match"),
    [
        ("images", {"height": None}, "images are not in COCO's format.*0.height"),
        ("images", {"width": 0}, "0.width"),
        ("images", {"id": 2}, "the same image id.*2"),
        ("images", {"height": SIDE - 1}, "An image has another size"),
        ("categories", {"id": "7"}, "categories are not in COCO's format"),
        ("annotations", {"image_id": 9}, "images that are not in the annotations.*image_id 9"),
        ("annotations", {"category_id": 9}, "categories that are not in the annotations.*category_id 9"),
        ("annotations", {"bbox": [1, 2, -3, 4]}, "0.bbox.2"),
        ("annotations", {"bbox": [1, 2, 3]}, "0.bbox"),
        ("annotations", {"id": 2}, "the same annotation id.*2"),
        ("annotations", {"segmentation": RUNS | {"counts": [3, 2]}}, "run lengths .* do not fit"),
        ("annotations", {"segmentation": RUNS | {"counts": "xx"}}, "run lengths .* do not fit"),
        ("annotations", {"segmentation": RUNS | {"size": [9, 9]}}, "run lengths .* do not fit"),
    ],
)
def test_damaged_annotations_are_named(coco, part, entry, match) -> None:
    coco.content[part][0] |= entry
    coco.path.write_text(json.dumps(coco.content))
    with pytest.raises(DatasetError, match=match):
        average_precision(BoxFiller(), coco.path, coco.root, fit="pad")


def test_masks_of_run_lengths_are_read_in_both_forms(coco) -> None:
    """As pycocotools wrote them: a list of counts, and its compressed text with runs of many sizes."""
    codec = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = np.asfortranarray(rng.random((SIDE, SIDE)) < rng.random() ** 3, np.uint8)
        packed = codec.encode(mask)
        runs = {"size": [SIDE, SIDE], "counts": packed["counts"].decode()}
        coco.content["annotations"][0]["segmentation"] = runs
        coco.path.write_text(json.dumps(coco.content))
        require_annotations(json.loads(coco.path.read_text()), coco.path)
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    runs["counts"] = counts if not flat[0] else [0, *counts]
    require_annotations(coco.content, coco.path)
