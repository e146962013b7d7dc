"""Zero-shot masks against the packages' own predictors on equal weights."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from rfmedsam2.nn.sam import SamSegmenter
from rfmedsam2.nn.segmenter import PromptBatch
from segment_anything_hq.nn.sam2_base import Sam2Segmenter

SIDE = 128
IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
POINTS = np.array([[30.0, 40.0], [90.0, 70.0]])
LABELS = np.array([1, 0])
BOX = np.array([10.0, 20.0, 100.0, 110.0])
MASK = np.random.default_rng(1).normal(0, 4, (SIDE // 4, SIDE // 4)).astype(np.float32)
PROMPTS = {
    "points": ("p",),
    "box": ("b",),
    "point, box, mask": ("p", "b", "m"),
    "mask": ("m",),
    "mask, point": ("p", "m"),
}


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights, none of which is zero at first."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return model.eval()


def prompted(kinds: tuple[str, ...]) -> PromptBatch:
    with_points = {"points": torch.tensor(POINTS[None]).float(), "point_labels": torch.tensor(LABELS[None])}
    return PromptBatch(
        images=torch.tensor([0]),
        boxes=torch.tensor(BOX[None]).float() if "b" in kinds else None,
        masks=torch.tensor(MASK[None]) if "m" in kinds else None,
        **(with_points if "p" in kinds else {}),
    )


def official(kinds: tuple[str, ...]) -> dict[str, Any]:
    given: dict[str, Any] = {"point_coords": POINTS, "point_labels": LABELS} if "p" in kinds else {}
    given |= {"box": BOX} if "b" in kinds else {}
    return given | ({"mask_input": MASK[None]} if "m" in kinds else {})


def official_sam(ours: SamSegmenter) -> Sam:
    """The package's Sam with ours' encoder and fresh modules of the same weights."""
    c, side = ours.channels, SIDE // 16
    transformer = TwoWayTransformer(depth=2, embedding_dim=c, mlp_dim=8 * c, num_heads=8)
    sam = Sam(
        cast(ImageEncoderViT, ours.image_encoder),
        PromptEncoder(embed_dim=c, image_embedding_size=(side, side), input_image_size=(SIDE, SIDE), mask_in_chans=16),
        MaskDecoder(transformer_dim=c, transformer=transformer, num_multimask_outputs=3),
    )
    sam.load_state_dict(ours.state_dict(), strict=False)
    return sam.eval()


@pytest.mark.parametrize("kinds", PROMPTS.values(), ids=list(PROMPTS))
@torch.no_grad()
def test_sam_equals_the_official_predictor(kinds: tuple[str, ...]) -> None:
    ours = perturbed(SamSegmenter("vit_nano", frame_size=SIDE))
    assert isinstance(ours, SamSegmenter)
    predictor = SamPredictor(official_sam(ours))
    predictor.set_image(IMAGE)
    _, scores, masks = predictor.predict(**official(kinds), multimask_output=False)
    frames = ours.normalize(torch.from_numpy(IMAGE).permute(2, 0, 1)[None])
    result = ours.segment(ours.encode(frames), prompted(kinds))
    np.testing.assert_allclose(result.logits.numpy(), masks, atol=1e-5)
    np.testing.assert_allclose(result.scores.numpy(), scores, atol=1e-5)


@pytest.mark.parametrize("kinds", PROMPTS.values(), ids=list(PROMPTS))
@torch.no_grad()
def test_sam2_equals_the_official_predictor(kinds: tuple[str, ...]) -> None:
    ours = perturbed(Sam2Segmenter("hiera_nano", frame_size=SIDE))
    assert isinstance(ours, Sam2Segmenter)
    predictor = SAM2ImagePredictor(ours.base)
    predictor._bb_feat_sizes = [(SIDE // s, SIDE // s) for s in (4, 8, 16)]
    predictor.set_image(IMAGE)
    _, scores, masks = predictor.predict(**official(kinds), multimask_output=False)
    frames = ours.normalize(torch.from_numpy(IMAGE).permute(2, 0, 1)[None])
    result = ours.segment(ours.encode(frames), prompted(kinds))
    np.testing.assert_allclose(result.logits.clamp(-32, 32).numpy(), masks, atol=1e-5)
    np.testing.assert_allclose(result.scores.numpy(), scores, atol=1e-5)
