"""Large-scale jitter keeps image and mask aligned, keeps the object visible, and is reproducible."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.errors import ImageError, UsageError
from segment_anything_hq.data.augment import (
    Jitter,
    Placement,
    draw_placement,
    fit_image,
    jitter_image,
    place_image,
    place_mask,
)
from segment_anything_hq.prompts.sampling import generator_of

AS_IT_IS = Jitter(scale_range=(1.0, 1.0), flip=0.0)


def image_and_mask(height=40, width=60) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose object is brighter than the background, and the object's mask."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[8:25, 20:45] = True
    image = torch.randint(0, 100, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.where(mask, image + 150, image), mask


def test_an_image_of_the_frames_size_stays_as_it_is():
    image, mask = image_and_mask(64, 64)
    frame, seen = jitter_image(image, mask, size=64, jitter=AS_IT_IS, rng=generator_of(0, 0))
    assert torch.equal(frame, image)
    assert torch.equal(seen, mask)


def test_what_is_no_image_is_grey_and_no_object():
    image, mask = image_and_mask()
    frame, seen = fit_image(image, mask, size=60)
    assert torch.equal(frame[:, :40], image)
    assert (frame[:, 40:] == 128).all()
    assert not seen[40:].any()
    assert torch.equal(seen[:40], mask)


@pytest.mark.parametrize("number", range(12))
def test_image_and_mask_stay_together(number):
    image, mask = image_and_mask()
    frame, seen = jitter_image(image, mask, size=96, jitter=Jitter(flip_vertically=0.5), rng=generator_of(0, number))
    assert frame.shape == (3, 96, 96)
    assert seen.shape == (96, 96)
    assert frame.dtype == torch.uint8
    assert seen.any()
    # bright where the object is, but for the pixels that its edge goes through; gray is 128
    bright = frame.float().mean(0) > 129
    edge = int(seen.sum()) ** 0.5 * 6 + 8
    assert int((bright != seen).sum()) <= edge


def test_flips_swap_sides():
    image, mask = image_and_mask()
    placement = Placement(height=40, width=60, top=0, left=0, flips=(-1,))
    assert torch.equal(place_image(image, placement, size=60, gray=0)[:, :40], image.flip(2))
    assert torch.equal(place_mask(mask, placement, 60)[:40], mask.flip(1))


def test_a_large_image_is_cut():
    image, mask = image_and_mask()
    placement = Placement(height=40, width=60, top=8, left=20, flips=())
    assert torch.equal(place_image(image, placement, size=16, gray=0), image[:, 8:24, 20:36])
    assert place_mask(mask, placement, 16).all()


def test_scales_and_places_are_spread_over_their_range():
    jitter = Jitter()
    placements = [draw_placement((40, 60), 100, jitter=jitter, rng=generator_of(1, number)) for number in range(2000)]
    longest = torch.tensor([p.width / 100 for p in placements])
    assert longest.min() >= 0.1
    assert longest.max() <= 2.0
    assert longest.mean().item() == pytest.approx(1.05, abs=0.05)
    assert all(abs(p.height - p.width * 40 / 60) <= 1 for p in placements)
    large = [p for p in placements if p.width > 150]
    assert all(0 <= p.left <= p.width - 100 for p in large)
    assert all(p.left == p.top == 0 for p in placements if p.width <= 100)
    shares = torch.tensor([p.left / (p.width - 100) for p in large])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.06)
    assert sum(p.flips == (-1,) for p in placements) / 2000 == pytest.approx(0.5, abs=0.05)
    assert {p.flips for p in placements} == {(), (-1,)}


def test_the_object_is_kept_in_sight():
    image, mask = torch.zeros(3, 100, 100, dtype=torch.uint8), torch.zeros(100, 100, dtype=torch.bool)
    mask[95:, 95:] = True
    for number in range(20):
        _, seen = jitter_image(image, mask, size=64, jitter=Jitter(scale_range=(0.1, 4.0)), rng=generator_of(2, number))
        assert seen.any()


def test_a_tiny_object_of_a_large_image_is_not_lost():
    image, mask = torch.zeros(3, 400, 300, dtype=torch.uint8), torch.zeros(400, 300, dtype=torch.bool)
    mask[399, 150] = True
    _, seen = jitter_image(image, mask, size=32, jitter=Jitter(scale_range=(0.1, 0.5)), rng=generator_of(0, 0))
    assert seen.sum() == 1
    assert seen[31, 12]


def test_frames_come_again_from_their_numbers():
    image, mask = image_and_mask()
    made = [jitter_image(image, mask, size=48, jitter=Jitter(), rng=generator_of(4, number)) for number in (0, 0, 1)]
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    assert not torch.equal(made[0][0], made[2][0])


def test_what_cannot_be_augmented_is_named():
    image, mask = image_and_mask()
    with pytest.raises(ImageError, match=r"another size.*\(40, 60\).*\(40, 59\)"):
        jitter_image(image, mask[:, 1:], size=32, jitter=Jitter(), rng=generator_of(0, 0))
    with pytest.raises(ImageError, match="mask is empty"):
        jitter_image(image, mask & False, size=32, jitter=Jitter(), rng=generator_of(0, 0))
    with pytest.raises(ImageError, match="Expected an RGB image"):
        jitter_image(image[:1], mask, size=32, jitter=Jitter(), rng=generator_of(0, 0))
    with pytest.raises(UsageError, match="smallest <= largest"):
        Jitter(scale_range=(2.0, 1.0))
