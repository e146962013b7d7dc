"""SAM and SAM 2 as segmenters: batches equal single prompts, sizes, what is trained, weights that fit or do not."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.errors import CheckpointError, PlanError, UsageError
from rfmedsam2.nn.sam import SamSegmenter
from rfmedsam2.nn.sam_weights import build_sam, load_sam
from rfmedsam2.nn.segmenter import PromptBatch, Segmenter
from segment_anything_hq.nn.sam2_base import Sam2Segmenter, build_sam2

SIDE = 64
BUILDERS = {"sam": lambda **o: SamSegmenter("vit_nano", **o), "sam2": lambda **o: Sam2Segmenter("hiera_nano", **o)}


def built(name: str, **options) -> SamSegmenter | Sam2Segmenter:
    torch.manual_seed(0)
    model = BUILDERS[name](**{"frame_size": SIDE} | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def clicks() -> PromptBatch:
    """Five objects of three images with three, one, no, two and one clicks, boxes and masks."""
    g = torch.Generator().manual_seed(2)
    labels = torch.tensor([[1, 0, 1], [-1, 1, -1], [-1, -1, -1], [0, 1, -1], [1, -1, -1]])
    corner = torch.rand(5, 2, generator=g) * 30
    return PromptBatch(
        images=torch.tensor([2, 0, 0, 1, 2]),
        points=torch.rand(5, 3, 2, generator=g) * SIDE,
        point_labels=labels,
        boxes=torch.cat([corner, corner + 25], 1),
        masks=torch.randn(5, SIDE // 4, SIDE // 4, generator=g) * 5,
    )


def frames(count: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def stripped(prompted: PromptBatch) -> PromptBatch:
    """One prompt without its padding."""
    assert prompted.points is not None
    assert prompted.point_labels is not None
    given = prompted.point_labels[0] >= 0
    some = {"points": prompted.points[:, given], "point_labels": prompted.point_labels[:, given]} if given.any() else {}
    return PromptBatch(images=prompted.images, boxes=prompted.boxes, masks=prompted.masks, **some)


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_prompts_of_several_images_are_as_one_by_one(name: str) -> None:
    model, prompted = built(name), clicks()
    together = model.segment(model.encode(frames()), prompted)
    assert together.logits.shape == (5, SIDE // 4, SIDE // 4)
    assert together.final is together.logits
    for i in range(5):
        one = stripped(prompted.at(torch.tensor([i])))
        alone = model.encode(frames()[one.images])
        single = PromptBatch(
            images=torch.tensor([0]),
            points=one.points,
            point_labels=one.point_labels,
            boxes=one.boxes,
            masks=one.masks,
        )
        result = model.segment(alone, single)
        torch.testing.assert_close(together.logits[i], result.logits[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.scores[i], result.scores[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_each_kind_of_prompt_may_be_left_out(name: str) -> None:
    model, full = built(name), clicks()
    embedded = model.encode(frames())
    kinds = {
        "nothing": PromptBatch(images=full.images),
        "boxes": PromptBatch(images=full.images, boxes=full.boxes),
        "points": PromptBatch(images=full.images, points=full.points, point_labels=full.point_labels),
        "masks": PromptBatch(images=full.images, masks=full.masks),
    }
    results = [model.segment(embedded, prompted).logits for prompted in kinds.values()]
    assert all(torch.isfinite(r).all() for r in results)
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_a_single_point_may_be_the_best_of_three_masks(name: str) -> None:
    plain, best = built(name), built(name, best_of_three=True)
    for model in (plain, best):
        if isinstance(model, Sam2Segmenter):  # else of weights like these SAM 2 always takes the best of three
            model.base.sam_mask_decoder.dynamic_multimask_via_stability = False
    point = PromptBatch(
        images=torch.tensor([0, 1]), points=torch.rand(2, 1, 2) * 60, point_labels=torch.ones(2, 1, dtype=torch.long)
    )
    box = PromptBatch(images=torch.tensor([0]), boxes=torch.tensor([[4.0, 4.0, 40.0, 40.0]]))
    embedded = plain.encode(frames())
    assert not torch.equal(plain.segment(embedded, point).logits, best.segment(embedded, point).logits)
    assert torch.equal(plain.segment(embedded, box).logits, best.segment(embedded, box).logits)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("side", [64, 256])
@torch.no_grad()
def test_frames_of_other_sizes(name: str, side: int) -> None:
    model = built(name, frame_size=side)
    assert isinstance(model, Segmenter)
    seen = model.normalize(torch.randint(0, 256, (1, 3, side, side - 16), dtype=torch.uint8))
    assert seen.shape == (1, 3, side, side)
    assert (seen[..., -16:] == 0).all()
    embedded = model.encode(seen)
    assert embedded.embedding.shape == (1, model.channels, side // 16, side // 16)
    mask = model.segment(embedded, PromptBatch(images=torch.tensor([0]), boxes=torch.tensor([[4.0, 4.0, 40.0, 40.0]])))
    assert mask.logits.shape == (1, side // 4, side // 4)


@pytest.mark.parametrize("name", BUILDERS)
def test_only_the_decoder_is_trained_and_only_if_asked(name: str) -> None:
    assert not list(built(name).trained_parameters())
    model = built(name, trained="decoder")
    model.segment(model.encode(frames()), clicks()).logits.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= {n for n, _ in model.trained_parameters()}
    assert all("mask_decoder." in n for n, _ in model.trained_parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for _, p in model.trained_parameters())
    embedded = model.encode(frames())  # does not depend on what is trained: it may be kept
    maps = (embedded.embedding, embedded.fine, embedded.middle, embedded.early)
    assert not any(t.requires_grad for t in maps if t is not None)


def test_points_need_labels() -> None:
    with pytest.raises(UsageError, match="Every point needs a label"):
        PromptBatch(images=torch.tensor([0]), points=torch.zeros(1, 1, 2))


@pytest.mark.parametrize(("name", "side"), [("sam", 72), ("sam", 48), ("sam2", 80)])
def test_frame_sizes_that_cannot_be_are_refused(name: str, side: int) -> None:
    with pytest.raises(PlanError, match="Invalid frame size"):
        BUILDERS[name](frame_size=side)


@torch.no_grad()
def test_weights_of_another_frame_size_are_fitted() -> None:
    large = built("sam", frame_size=128)
    small = SamSegmenter("vit_nano", frame_size=64).eval()
    load_sam(small, large.state_dict(), where="here")
    kept = [n for n, t in small.state_dict().items() if t.shape == large.state_dict()[n].shape]
    assert all(torch.equal(small.state_dict()[n], large.state_dict()[n]) for n in kept)
    changed = set(small.state_dict()) - set(kept)
    assert changed
    assert all(n.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")) for n in changed)


def test_weights_of_something_else_get_a_sentence() -> None:
    with pytest.raises(CheckpointError, match="no SAM that is known"):
        build_sam({"a": torch.zeros(1)}, where="file.pt")
    vit_b = {"image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16)}
    with pytest.raises(CheckpointError, match="another backbone"):
        load_sam(SamSegmenter("vit_tiny", frame_size=64), vit_b, where="x")
    with pytest.raises(CheckpointError, match="another backbone"):
        build_sam2({"a": torch.zeros(1)}, backbone="hiera_nano", where="file.pt", frame_size=64)
