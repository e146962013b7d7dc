"""SAM-REF: prompt maps, the error-detail formula, windows of changes, the selector, what is trained, its size."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.sam import SamSegmenter
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented, Segmenter
from segment_anything_hq.nn.global_diff import blend_detail, dense_prompt_map
from segment_anything_hq.nn.patch_diff import change_windows, cropped, pasted
from segment_anything_hq.nn.sam2_base import Sam2Segmenter
from segment_anything_hq.nn.sam_ref import SamRef

SIDE = 64
BASES = {
    "sam": lambda side: SamSegmenter("vit_nano", frame_size=side),
    "sam2": lambda side: Sam2Segmenter("hiera_nano", frame_size=side),
}


def built(name: str = "sam", side: int = SIDE, **options) -> SamRef:
    """With weights that are not the first ones, which leave the mask nearly as it is."""
    torch.manual_seed(0)
    model = SamRef(BASES[name](side), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for heads in (model.global_diff.heads, model.patch_diff.heads):
            heads.error.weight.normal_()
            assert heads.error.bias is not None
            torch.nn.init.zeros_(heads.error.bias)
    return model


def frames(count: int = 2, side: int = SIDE) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def clicks() -> PromptBatch:
    points = torch.tensor([[[10.0, 12.0], [50.0, 40.0]], [[30.0, 30.0], [5.0, 5.0]], [[60.0, 2.0], [20.0, 20.0]]])
    return PromptBatch(
        images=torch.tensor([1, 0, 1]), points=points, point_labels=torch.tensor([[1, 0], [1, -1], [1, 1]])
    )


def before(model: SamRef, prompted: PromptBatch, *, area: int) -> Segmented:
    """A click before that left a mask of its own and an error map of so many pixels."""
    logits = torch.randn(len(prompted), model.frame_size // 4, model.frame_size // 4) * 3
    areas = torch.full((len(prompted),), area)
    return Segmented(logits=logits, scores=torch.zeros(len(prompted)), extra={"error_area": areas})


def test_error_map_shares_out_detail_and_coarse() -> None:
    coarse, detail = torch.tensor([-4.0, -4.0, -4.0]), torch.tensor([6.0, 6.0, 6.0])
    mask = blend_detail(coarse, error=torch.tensor([-100.0, 0.0, 100.0]), detail=detail)
    torch.testing.assert_close(mask, torch.tensor([-4.0, 1.0, 6.0]))


def test_clicks_are_disks_and_boxes_lines() -> None:
    prompted = PromptBatch(
        images=torch.tensor([0, 0]),
        points=torch.tensor([[[33.5, 65.5], [97.5, 97.5]], [[0.0, 0.0], [0.0, 0.0]]]),
        point_labels=torch.tensor([[1, 0], [-1, -1]]),
    )
    coarse = torch.randn(2, 32, 32)
    maps = dense_prompt_map(prompted, coarse, radius=3)
    assert maps.shape == (2, 3, 32, 32)
    assert torch.equal(maps[:, 2], coarse)
    assert not maps[1, :2].any()
    for channel, (x, y) in enumerate([(8, 16), (24, 24)]):
        across, down = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="xy")
        assert torch.equal(maps[0, channel] > 0, (across - x) ** 2 + (down - y) ** 2 <= 9)
    box = PromptBatch(images=torch.tensor([0]), boxes=torch.tensor([[16.0, 16.0, 80.0, 112.0]]))
    drawn = dense_prompt_map(box, coarse[:1])[0, :2]
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0, 3, 10]
    assert not drawn[0, 10, 10]
    assert not drawn[0, 1, 1]


@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_shapes(name: str, side: int) -> None:
    model = built(name, side).train()
    assert isinstance(model, Segmenter)
    embedded = model.encode(frames(side=side))
    result = model.segment(embedded, clicks())
    size = (3, side // 4, side // 4)
    assert result.logits.shape == result.final.shape == size
    assert result.scores.shape == (3,)
    names = ("coarse", "global_error", "global_mask", "patch_coarse", "patch_error", "patch_mask")
    assert all(result.extra[key].shape == size for key in names)
    assert result.extra["windows"].shape == (3, 4)


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_a_new_refiner_takes_a_tenth_of_the_detail_map(name: str) -> None:
    torch.manual_seed(0)
    model = SamRef(BASES[name](SIDE)).eval()
    result = model.segment(model.encode(frames()), clicks())
    coarse = result.extra["coarse"]
    torch.testing.assert_close(torch.sigmoid(result.extra["global_error"]), torch.full_like(coarse, 0.1))


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_prompts_of_several_images_are_as_one_by_one(name: str) -> None:
    model, prompted = built(name, theta=0), clicks()
    embedded = model.encode(frames())
    previous = before(model, prompted, area=0)
    together = model.segment(embedded, prompted, previous=previous)
    prepared = model.segment(model.prepare(embedded), prompted, previous=previous)
    torch.testing.assert_close(prepared.logits, together.logits, atol=1e-5, rtol=1e-4)
    for i in range(len(prompted)):
        one = prompted.at(torch.tensor([i]))
        single = PromptBatch(images=torch.tensor([0]), points=one.points, point_labels=one.point_labels)
        earlier = Segmented(logits=previous.logits[i : i + 1], scores=previous.scores[i : i + 1], extra=previous.extra)
        alone = model.segment(embedded.at(one.images), single, previous=earlier)
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_nothing_changes_outside_the_window() -> None:
    model, prompted = built(side=256, theta=0), clicks()
    embedded = model.encode(frames(side=256))
    previous = before(model, prompted, area=0)
    previous.logits.copy_(model.segment(embedded, prompted).logits)
    for i, (x, y) in enumerate([(12, 10), (7, 7), (5, 5)]):  # the last clicks in the map
        previous.logits[i, y - 4 : y + 6, x - 4 : x + 2] *= -1
    result = model.segment(embedded, prompted, previous=previous)
    windows = result.extra["windows"].long()
    for i, (x0, y0, x1, y1) in enumerate(windows.tolist()):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        assert 0 < inside.sum() < inside.numel()
        assert torch.equal(result.logits[i][~inside], previous.logits[i][~inside])
        assert (result.logits[i][inside] != previous.logits[i][inside]).all()


@torch.no_grad()
def test_the_window_alone_changes_where_the_error_map_grows() -> None:
    model, prompted = built(), clicks()
    embedded = model.encode(frames())
    area = model.segment(embedded, prompted).extra["error_area"]
    assert area.min() > 10
    previous = before(model, prompted, area=0)
    previous.extra["error_area"] = (area / torch.tensor([1.0, 1.2, 1.05])).int()
    result = model.segment(embedded, prompted, previous=previous)
    assert result.extra["rows"].tolist() == [1]
    same = [torch.equal(a, b) for a, b in zip(result.logits, result.extra["global_mask"], strict=True)]
    assert same == [True, False, True]
    never = built(theta=None).segment(embedded, prompted, previous=previous)
    assert "rows" not in never.extra


def test_windows_are_of_the_change_that_holds_the_click() -> None:
    masks, earlier = -torch.ones(5, 64, 64), -torch.ones(5, 64, 64)
    masks[:, 10:20, 30:40] = 1
    masks[:, 50:60, 2:8] = 1
    earlier[4] = masks[4] = 1
    at = torch.tensor([[35.0, 15.0], [4.0, 55.0], [60.0, 30.0], [0.0, 0.0], [0.0, 0.0]])
    prompted = PromptBatch(
        images=torch.zeros(5, dtype=torch.long),
        points=torch.stack([torch.zeros(5, 2), at * 4 + 1.5, torch.full((5, 2), 90.0)], 1),
        point_labels=torch.tensor([[1, 1, -1]] * 3 + [[-1, -1, -1]] * 2),
    )
    windows = change_windows(masks, earlier, prompted)
    assert windows[0].tolist() == [28, 8, 42, 22]  # 10 x 10, by 1.4
    assert windows[1].tolist() == [0, 48, 10, 62]  # clipped at the left
    assert windows[2].tolist() == [56, 26, 64, 34]  # the click is in no change
    assert windows[3].tolist() == [0, 0, 48, 64]  # no clicks: all that changed, 2 to 40 and 10 to 60, by 1.4
    assert windows[4].tolist() == [0, 0, 64, 64]  # nothing changed


def test_what_is_cut_out_fits_back() -> None:
    maps = torch.nn.functional.interpolate(torch.randn(2, 1, 4, 4), (32, 32), mode="bilinear")
    windows = torch.tensor([[0.0, 0.0, 32.0, 32.0], [5.0, 7.0, 21.0, 15.0]])
    patches = cropped(maps, windows)[:, 0]
    torch.testing.assert_close(patches[0], maps[0, 0])
    whole = pasted(patches, torch.zeros(2, 32, 32), windows)
    torch.testing.assert_close(whole[1, 7:15, 5:21], maps[1, 0, 7:15, 5:21], atol=0.05, rtol=0.05)
    assert not whole[1, :7].any()
    assert not whole[1, :, 21:].any()


@pytest.mark.parametrize("name", BASES)
def test_only_the_refiners_are_trained(name: str) -> None:
    model = built(name).train()
    assert not model.base.training
    result = model.segment(model.encode(frames()), clicks())
    sum(result.extra[key].sum() for key in ("global_error", "global_mask", "patch_error", "patch_mask")).backward()  # type: ignore[union-attr]
    trained = dict(model.trained_parameters())
    assert all(name.startswith(("global_diff.", "patch_diff.")) for name in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())


@pytest.mark.parametrize(("name", "millions"), [("vit_h", 0.7), ("hiera_l", 1.2)])
def test_as_many_parameters_as_the_supplement_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = SamRef(SamSegmenter("vit_h") if name == "vit_h" else Sam2Segmenter("hiera_l"))
    count = sum(p.numel() for _, p in model.trained_parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.15)


def test_embeddings_without_frames_are_refused() -> None:
    model = built()
    embedded = model.encode(frames())
    with pytest.raises(UsageError, match="with their frames"):
        model.segment(Embedded(embedding=embedded.embedding), clicks())
