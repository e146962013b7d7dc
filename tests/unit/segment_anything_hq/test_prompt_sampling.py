"""Training prompts lie where they should, come as often as they should, and come again from the same numbers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rfmedsam2.errors import UsageError
from segment_anything_hq.prompts.sampling import (
    HQ_SAM,
    KINDS,
    MASK_LOGIT,
    SAM2_REFINER,
    PromptMix,
    boxes_of,
    degraded,
    draw_kind,
    generator_of,
    prompts_of_kind,
    random_points,
    surroundings,
    training_prompts,
)

SIDE = 64
IMAGES = torch.tensor([0, 0, 1])


def some_masks() -> torch.Tensor:
    """A rectangle, a ring and a single pixel."""
    masks = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    masks[0, 10:30, 20:50] = True
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    radius = ((x - 32) ** 2 + (y - 30) ** 2).sqrt()
    masks[1] = (radius > 12) & (radius < 20)
    masks[2, 63, 0] = True
    return masks


def test_boxes_hold_the_first_and_the_last_pixel():
    assert boxes_of(some_masks()).tolist() == [[20, 10, 49, 29], [13, 11, 51, 49], [0, 63, 0, 63]]


def test_an_empty_object_is_named():
    masks = some_masks()
    masks[1] = False
    with pytest.raises(UsageError, match=r"without a pixel.*objects \[1\] of 3"):
        training_prompts(masks, IMAGES, mix=HQ_SAM, rng=generator_of(0, 0))


@pytest.mark.parametrize("count", [1, 10])
def test_points_lie_on_their_objects_and_differ(count):
    masks = some_masks()
    points, found = random_points(masks, count, generator_of(0, 0))
    assert found.all()
    x, y = points.long().unbind(-1)
    assert masks[torch.arange(3)[:, None], y, x].all()
    assert points[:2].unique(dim=1).shape[1] == count
    assert all(len(set(map(tuple, rows.tolist()))) == count for rows in points[:2])
    # the single pixel is all that the third has
    assert (points[2] == torch.tensor([0.0, 63.0])).all()


def test_every_pixel_is_equally_likely():
    region = torch.zeros(1, 4, 5, dtype=torch.bool)
    region[0, 1, 1:4] = region[0, 3, 0] = region[0, 0, 4] = True
    points, _ = random_points(region.expand(6000, -1, -1), 2, generator_of(1, 0))
    assert (points[:, 0] != points[:, 1]).any(1).all()
    counts = Counter(map(tuple, points.flatten(0, 1).tolist()))
    assert set(counts) == {(1, 1), (2, 1), (3, 1), (0, 3), (4, 0)}
    # 12000 draws of 5 pixels, 2 of 5 without repetition: a deviation of 38
    assert all(abs(count - 2400) < 200 for count in counts.values())


def test_regions_of_just_enough_pixels_are_drawn_whole():
    region = torch.zeros(1, 3, 3, dtype=torch.bool)
    region[0, 0] = True
    points, _ = random_points(region, 3, generator_of(0, 0))
    assert sorted(points[0].tolist()) == [[0, 0], [1, 0], [2, 0]]


def test_empty_regions_give_no_point():
    points, found = random_points(torch.zeros(2, 4, 4, dtype=torch.bool), 3, generator_of(0, 0))
    assert not found.any()
    assert not points.any()


def test_surroundings_are_near_and_off_the_object():
    masks = some_masks()
    around = surroundings(masks, 0.1)
    assert not (around & masks).any()
    # 30 x 20 pixels and a tenth more to every side
    assert boxes_of(around[:1]).tolist() == [[17, 8, 52, 31]]
    # one pixel more at least, and nothing beyond the frame
    assert boxes_of(around[2:]).tolist() == [[0, 62, 1, 63]]


def test_masks_are_degraded_at_the_boundary_alone():
    mask = torch.zeros(1, 256, 256, dtype=torch.bool)
    mask[0, 64:192, 64:192] = True
    coarse = degraded(mask, 64, generator_of(0, 0))
    assert coarse.shape == (1, 64, 64)
    assert set(coarse.unique().tolist()) == {MASK_LOGIT, -MASK_LOGIT}
    wrong = (coarse > 0) != mask[:, ::4, ::4]
    assert 20 < wrong.sum() < 500
    assert not wrong[0, 26:38, 26:38].any()
    assert not wrong[0, :6].any()
    assert torch.equal(degraded(mask, 64, generator_of(0, 0), noise=0.0) > 0, mask[:, ::4, ::4])


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_prompts(kind):
    masks = some_masks()
    prompted = prompts_of_kind(kind, masks, IMAGES, mix=SAM2_REFINER, rng=generator_of(0, 0))
    assert torch.equal(prompted.images, IMAGES)
    assert (prompted.boxes is not None) == (kind in ("box", "box_and_points", "box_and_negatives"))
    assert (prompted.masks is not None) == (kind == "mask")
    has_points = kind in ("points", "box_and_points", "box_and_negatives")
    assert (prompted.points is not None) == (prompted.point_labels is not None) == has_points
    if prompted.masks is not None:
        assert prompted.masks.shape == (3, SIDE // 4, SIDE // 4)
    if prompted.points is not None and prompted.point_labels is not None:
        x, y = prompted.points.long().unbind(-1)
        assert prompted.points.shape == (3, 10, 2)
        assert torch.equal(masks[torch.arange(3)[:, None], y, x], prompted.point_labels == 1)
        assert (prompted.point_labels >= 0).all()


def test_where_nothing_is_around_an_object_its_points_are_padding():
    everywhere = torch.ones(1, 16, 16, dtype=torch.bool)
    prompted = prompts_of_kind("box_and_negatives", everywhere, IMAGES[:1], mix=SAM2_REFINER, rng=generator_of(0, 0))
    assert prompted.point_labels is not None
    assert (prompted.point_labels == -1).all()


def test_kinds_come_as_often_as_the_paper_has_them():
    counts = Counter(draw_kind(SAM2_REFINER, generator_of(5, number)) for number in range(3000))
    for kind, share in zip(KINDS, (0.3, 0.2, 0.2, 0.2, 0.1), strict=True):
        assert abs(counts[kind] / 3000 - share) < 0.03
    assert {draw_kind(HQ_SAM, generator_of(5, number)) for number in range(50)} == {"box", "points", "mask"}


def test_batches_come_again_from_their_numbers():
    masks = some_masks()

    def drawn(seed, number):
        made = training_prompts(masks, IMAGES, mix=SAM2_REFINER, rng=generator_of(seed, number))
        return [t for t in (made.points, made.point_labels, made.boxes, made.masks) if t is not None]

    for number in range(8):
        assert all(torch.equal(a, b) for a, b in zip(drawn(3, number), drawn(3, number), strict=True))
    numbers = {float(torch.rand(1, generator=generator_of(seed, n))) for seed in range(5) for n in range(20)}
    assert len(numbers) == 100


def test_shares_that_cannot_be_drawn_from_are_refused():
    with pytest.raises(UsageError, match="shares of 0 or more"):
        PromptMix(box=0, points=0, mask=0)
