"""HQ-SAM 2: published names, the sum of two tokens' masks, batches, what is trained, weights, videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rfmedsam2.errors import CheckpointError
from rfmedsam2.inference.video_tracking import VideoSegmenter, as_published
from rfmedsam2.inference.zero_shot import reference_prompts
from rfmedsam2.nn.segmenter import PromptBatch, Segmenter
from rfmedsam2.records.dataset import LabelSet
from segment_anything_hq.nn.hq_sam2 import HqSam2, load_hq_sam2
from segment_anything_hq.nn.sam2_base import Sam2Segmenter, finer_levels, load_weights, prompt_embeddings

SIDE = 64
ADDED = {
    "sam_mask_decoder.hf_token.weight": (1, 256),
    **{f"sam_mask_decoder.hf_mlp.layers.{i}.weight": (256 if i < 2 else 32, 256) for i in range(3)},
    **{f"sam_mask_decoder.hf_mlp.layers.{i}.bias": (256 if i < 2 else 32,) for i in range(3)},
    "sam_mask_decoder.embedding_maskfeature.0.weight": (64, 32, 3, 3),
    "sam_mask_decoder.embedding_maskfeature.0.bias": (64,),
    "sam_mask_decoder.embedding_maskfeature.1.weight": (64,),
    "sam_mask_decoder.embedding_maskfeature.1.bias": (64,),
    "sam_mask_decoder.embedding_maskfeature.3.weight": (32, 64, 3, 3),
    "sam_mask_decoder.embedding_maskfeature.3.bias": (32,),
}
"""What sam2.1_hq_hiera_large.pt has beside the names of sam2.1_hiera_large.pt."""


def built(**options) -> HqSam2:
    torch.manual_seed(0)
    model = HqSam2("hiera_nano", frame_size=SIDE, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def frames(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def clicks() -> PromptBatch:
    points = torch.tensor([[[10.0, 12.0], [50.0, 40.0]], [[30.0, 30.0], [5.0, 5.0]], [[60.0, 2.0], [20.0, 20.0]]])
    labels = torch.tensor([[1, 0], [1, -1], [1, 1]])
    return PromptBatch(images=torch.tensor([1, 0, 2]), points=points, point_labels=labels)


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in HqSam2("hiera_l").base.state_dict().items()}
        plain = Sam2Segmenter("hiera_l").base.state_dict()
    assert {name: shape for name, shape in ours.items() if name not in plain} == ADDED
    assert all(ours[name] == tuple(t.shape) for name, t in plain.items())


@torch.no_grad()
def test_the_hq_mask_is_weights_times_features_as_the_paper_has_it() -> None:
    model, prompted = built(), clicks()
    decoder = model.decoder
    upscaled = torch.randn(3, decoder.transformer_dim // 8, 16, 16)
    weights = torch.randn(3, decoder.transformer_dim // 8)
    expected = torch.einsum("pc,pchw->phw", weights, decoder.embedding_maskfeature(upscaled))
    torch.testing.assert_close(decoder._hq_mask(upscaled, weights)[:, 0], expected, atol=1e-5, rtol=1e-4)
    result = model.segment(model.encode(frames()), prompted)
    torch.testing.assert_close(result.logits, result.extra["sam"] + result.extra["hq"])
    only = built(hq_token_only=True)
    torch.testing.assert_close(only.segment(only.encode(frames()), prompted).logits, result.extra["hq"])


@torch.no_grad()
def test_the_official_forward_gives_the_same_masks() -> None:
    model = built()
    prompted = clicks().by_click_count()[1][1]
    embedded = model.encode(frames())
    sparse, dense, positions = prompt_embeddings(model.base, prompted)
    masks, quality, tokens, scores = model.decoder(
        embedded.embedding[prompted.images],
        positions,
        sparse,
        dense,
        multimask_output=False,
        repeat_image=False,
        high_res_features=finer_levels(embedded, prompted.images),
    )
    result = model.segment(embedded, prompted)
    torch.testing.assert_close(masks[:, 0], result.logits)
    torch.testing.assert_close(quality[:, 0], result.scores)
    assert tokens.shape == (2, 1, model.channels)
    assert scores.shape == (2, 1)


@torch.no_grad()
def test_prompts_of_several_images_are_as_one_by_one() -> None:
    model, prompted = built(), clicks()
    assert isinstance(model, Segmenter)
    embedded = model.encode(frames())
    together = model.segment(embedded, prompted)
    for i in range(3):
        one = prompted.at(torch.tensor([i]))
        single = PromptBatch(images=torch.tensor([0]), points=one.points, point_labels=one.point_labels)
        alone = model.segment(embedded.at(one.images), single)
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-5, rtol=1e-4)


def test_only_what_is_added_is_trained() -> None:
    model = built().train()
    model.segment(model.encode(frames()), clicks()).extra["hq"].sum().backward()
    trained = dict(model.trained_parameters())
    assert len(trained) == len(ADDED)
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@torch.no_grad()
def test_weights_of_hq_sam2_and_of_sam2_are_loaded() -> None:
    source, model = built(), HqSam2("hiera_nano", frame_size=SIDE).eval()
    report = load_hq_sam2(model, source.base.state_dict(), where="hq.pt")
    assert not report.missing
    embedded = source.encode(frames())
    assert torch.equal(model.segment(embedded, clicks()).logits, source.segment(embedded, clicks()).logits)
    plain = Sam2Segmenter("hiera_nano", frame_size=SIDE).eval()
    load_weights(plain, {n: t for n, t in source.base.state_dict().items() if n not in ADDED}, where="sam2.pt")
    report = load_hq_sam2(model, plain.base.state_dict(), where="sam2.pt")
    assert set(report.missing) == set(ADDED)
    loaded = model.base.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.base.state_dict().items())
    part = source.base.state_dict()
    del part["sam_mask_decoder.hf_token.weight"]
    with pytest.raises(CheckpointError, match="hf_token"):
        load_hq_sam2(model, part, where="hq.pt")


@torch.no_grad()
def test_videos_are_tracked_through_the_memory() -> None:
    """The official tracking code takes the HQ decoder: its masks and memories hold the HQ token's part."""
    video = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 255
    label = np.zeros((4, SIDE, SIDE), np.uint8)
    label[:, 10:40, 20:45] = 1
    labels = LabelSet(names={"background": 0, "object": 1})
    prompts = reference_prompts(label, labels, "box")
    masks = []
    for hq_token_only in (False, True):
        model = built(hq_token_only=hq_token_only)
        model.decoder.state_dict()["pred_obj_score_head.layers.2.bias"].fill_(5)  # untrained, nothing is there
        tracked = VideoSegmenter(as_published(model.base), video, prompts, labels).run(("one",))
        masks.append(tracked["one", "unprompted"])
    assert masks[0].shape == (4, SIDE, SIDE)
    assert not np.array_equal(masks[0][3], masks[1][3])
