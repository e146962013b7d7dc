"""What published light SAMs reach with boxes on real pictures and real CT, and their weights inside SAM 2's modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rfmedsam2.inference.zero_shot import reference_prompts, segment_slices
from rfmedsam2.metrics.volumes import case_metrics
from rfmedsam2.nn.sam import SamSegmenter
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.light_weights import load_light
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import ObjectPrompts
from rfmedsam2.nn.sam_weights import build_sam
from rfmedsam2.nn.segmenter import PromptBatch, at_image_size, normalized
from rfmedsam2.pipeline.evaluation.prompt_study import Look, as_images
from rfmedsam2.records.dataset import DatasetJson, LabelSet
from rfmedsam2.store.images import read_image, read_label
from rfmedsam2.store.published_weights import read_published
from rfmedsam2.system.atomic import read_record

pytestmark = pytest.mark.data
PICTURES = ("llama", "person7", "cross", "tennis")
OBJECT = LabelSet(names={"background": 0, "object": 1}, ignore=2)
SLICES = (104,)
CT = "ct-organs-totalsegmentator/Dataset110_TSAbdomenCT"


@pytest.fixture(scope="module")
def mobile_sam(data_root) -> dict[str, Tensor]:
    return read_published(data_root / "weights-mobilesam" / "mobile_sam.pt")


@pytest.fixture(scope="module")
def lite_medsam(data_root) -> dict[str, Tensor]:
    return read_published(data_root / "weights-litemedsam" / "lite_medsam.pth")


def image(root: Path, name: str) -> tuple[Tensor, np.ndarray]:
    """A picture (1, 3, H, W) and its label (1, H, W): 1 object, 2 ignored."""
    image = np.asarray(Image.open(root / "vgg-iseg-151" / "images" / f"{name}.jpg").convert("RGB"), np.float32)
    mask = read_label(root / "vgg-iseg-151" / "masks" / f"{name}.png")[0].array[0]
    label = np.where(mask == 128, 2, mask == 255).astype(np.uint8)
    return torch.from_numpy(image).permute(2, 0, 1)[None], label


def slices(root: Path) -> tuple[Tensor, np.ndarray, LabelSet]:
    """Slices of the abdominal CT, shown, and their labels."""
    image = read_image(root / CT / "imagesTr" / "ts_example_0000.nii.gz")[0].array[:, list(SLICES)]
    label = read_label(root / CT / "labelsTr" / "ts_example.nii.gz")[0].array[0][list(SLICES)]
    labels = read_record(root / CT / "dataset.json", DatasetJson).label_set
    return as_images(image, Look(channels=(0,), names=("CT",), window=None)), label, labels


def segmented(sam: SamSegmenter, frames: Tensor, label: np.ndarray, labels: LabelSet) -> dict[str, float | None]:
    """DSC of every class with boxes."""
    with torch.inference_mode():
        found = segment_slices(sam, frames, {"box": reference_prompts(label, labels, "box")}, labels)["box"]
    return {name: scores.dsc for name, scores in case_metrics(label, found, labels, (1.0, 1.0, 1.0)).items()}


def test_mobile_sam_cuts_out_pictured_objects(data_root, mobile_sam) -> None:
    sam = build_sam(mobile_sam, where="mobile_sam.pt")
    dsc = [segmented(sam, *image(data_root, name), OBJECT)["object"] for name in PICTURES]
    iou = [d / (2 - d) for d in dsc if d is not None]
    assert len(iou) == len(PICTURES)
    assert np.mean(iou) > 0.85


def test_lite_medsam_finds_organs_in_ct(data_root, lite_medsam) -> None:
    dsc = segmented(build_sam(lite_medsam, where="lite_medsam.pth"), *slices(data_root))
    assert min(dsc[name] or 0 for name in ("liver", "spleen")) > 0.9
    assert np.mean([d for d in dsc.values() if d is not None]) > 0.65


@pytest.mark.parametrize("backbone", ["mobile_sam", "lite_medsam"])
def test_sam_2_with_light_weights_sees_what_sam_sees(backbone, data_root, request) -> None:
    weights = request.getfixturevalue(backbone)
    sam = build_sam(weights, where=backbone)
    base = build_base(backbone, frame_size=1024, object_scores=False).eval()
    load_light(base, weights, where=backbone)
    side = base.image_encoder.seen(1024)
    frame = F.interpolate(slices(data_root)[0], (side, side), mode="bilinear")
    box = torch.tensor([[300.0, 200, 700, 600]])
    corners = (box.view(1, 2, 2) + 0.5) * (sam.frame_size / 1024) - 0.5
    with torch.inference_mode():
        prompt = PromptBatch(images=torch.tensor([0]), boxes=corners.flatten(1))
        low = sam.segment(sam.encode(sam.normalize(frame)), prompt).logits
        expected = at_image_size(low, frame_size=sam.frame_size, resized=(side, side), size=(side, side))
        if backbone == "mobile_sam":
            frame = normalized(frame, side)
        sam2 = Sam2(base)
        masks = sam2.decode(sam2.encode(frame), ObjectPrompts(boxes=box)).masks
    got = F.interpolate(masks[:, None], (side, side), mode="bilinear")[:, 0] > 0
    assert (got == (expected > 0)).float().mean() >= 0.9999
    assert 0.01 < got.float().mean() < 0.5
