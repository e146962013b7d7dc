"""Random changes in training: how far boxes move, how strong and how smooth noise is, how many memories are dropped."""

from __future__ import annotations

import torch

from rfmedsam2.nn.refinement.disturbance import jittered, with_noise, without_some
from rfmedsam2.nn.sam2.memory_selection import CURRENT, select
from rfmedsam2.prompts import Prompts


def test_sides_of_boxes_move_by_whole_pixels_and_stay_in_the_frame() -> None:
    torch.manual_seed(0)
    given = torch.tensor([[0.0, 10.0, 1.0, 31.0], [12.0, 8.0, 20.0, 24.0]]).expand(500, 2, 4).clone()
    present = torch.ones(500, 2, dtype=torch.bool)
    present[0, 1] = False
    moved = jittered(Prompts(boxes=given, present=present), 3, (32, 32)).boxes
    assert torch.equal(moved[0, 1], given[0, 1])  # absent
    change = (moved - given)[1:, 1]
    assert set(change.unique().tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert abs(float(change.mean())) < 0.2
    x0, y0, x1, y1 = moved.unbind(-1)
    assert bool(((x0 >= 0) & (y0 >= 0) & (x0 <= x1) & (y0 <= y1) & (x1 <= 31) & (y1 <= 31)).all())
    assert jittered(Prompts(boxes=given, present=present), 0, (32, 32)).boxes is given


def test_noise_is_as_strong_as_asked_and_smooth() -> None:
    torch.manual_seed(0)
    logits = torch.zeros(2, 3, 16, 32, 32)
    noise = with_noise(logits, 2.0, 8)
    assert abs(float(noise.square().mean().sqrt()) - 2.0) < 1e-3
    neighbors = (noise[..., 1:] - noise[..., :-1]).square().mean().sqrt()
    assert float(neighbors) < 0.6  # of white noise of this strength: 2.8
    assert with_noise(logits, 0.0, 8) is logits


def test_memories_of_other_slices_are_dropped_and_the_own_one_never() -> None:
    torch.manual_seed(0)
    bank = torch.arange(400)[:, None]
    objects = torch.stack([torch.arange(6, 400), torch.zeros(394, dtype=torch.long)], 1)
    for share, low, high in ((0.0, 6, 6), (0.5, 2.7, 3.3)):
        buckets = select("preceding", bank, objects, dropout=share)
        others = sum(int((bucket.slots.positions != CURRENT).sum()) for bucket in buckets) / len(objects)
        own = sum(int((bucket.slots.positions == CURRENT).sum()) for bucket in buckets)
        assert low <= others <= high
        assert own == len(objects)
    assert int((without_some(torch.ones(1000), 0.25) == -1).sum()) in range(200, 300)
