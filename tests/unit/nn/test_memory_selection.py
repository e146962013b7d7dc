"""Which memories cells get: by strategy, presence and distance; and SAM 2's own rule against its own code."""

from __future__ import annotations

import pytest
import torch
from sam2.modeling.sam2_utils import select_closest_cond_frames

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.sam2.memory_selection import select
from rfmedsam2.nn.sam2.types import Bucket


def bank_of(present: torch.Tensor) -> torch.Tensor:
    """(D, O) bool -> rows numbered in order."""
    rows = present.flatten().cumsum(0).view(present.shape) - 1
    return torch.where(present, rows, -1)


def all_objects(frames: int, objects: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(frames), torch.arange(objects))


def memories_of(buckets: list[Bucket], obj: int) -> tuple[set, set]:
    """{(row, position)} and {(row, distance in fifteenths)} of one cell."""
    (bucket,) = [bucket for bucket in buckets if obj in bucket.objects.tolist()]
    slots, at = bucket.slots, bucket.objects.tolist().index(obj)
    fifteenths = (slots.distances[at] * 15).round().long().tolist()
    maps = set(zip(slots.maps[at].tolist(), slots.positions[at].tolist(), strict=True))
    return maps, set(zip(slots.pointers[at].tolist(), fifteenths, strict=True))


def random_presence(frames: int = 12, objects: int = 3, seed: int = 0) -> torch.Tensor:
    present = torch.rand(frames, objects, generator=torch.Generator().manual_seed(seed)) < 0.5
    present[0] = True
    return present


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("preceding", {10: 6, 9: 0, 8: 1, 7: 2, 6: 3, 5: 4, 4: 5}),
        ("following", {10: 6, 11: 0, 12: 1, 13: 2, 14: 3, 15: 4, 16: 5}),
        ("both", {10: 6, **{10 - d: d - 1 for d in range(1, 7)}, **{10 + d: d - 1 for d in range(1, 7)}}),
    ],
)
def test_neighbors_take_the_position_of_their_distance(strategy, expected):
    buckets = select(strategy, torch.arange(20)[:, None], all_objects(20, 1))
    maps, pointers = memories_of(buckets, 10)
    assert maps == set(expected.items())
    assert pointers == {(row, 10 - row) for row in expected}


def test_reach_bounds_how_far_a_cell_looks():
    maps, _ = memories_of(select("both", torch.arange(20)[:, None], all_objects(20, 1), reach=2), 10)
    assert {row for row, _ in maps} == {8, 9, 10, 11, 12}
    alone, _ = memories_of(select("preceding", torch.arange(20)[:, None], all_objects(20, 1), reach=0), 10)
    assert alone == {(10, 6)}


def test_frames_without_memory_are_left_out_but_keep_distances():
    present = torch.ones(10, 2, dtype=torch.bool)
    present[[3, 5, 6], 1] = False
    bank = bank_of(present)
    maps, _ = memories_of(select("preceding", bank, all_objects(10, 2)), 6 * 2 + 1)
    assert maps == {(int(bank[4, 1]), 1), (int(bank[2, 1]), 3), (int(bank[1, 1]), 4), (int(bank[0, 1]), 5)}


def test_objects_never_see_one_anothers_memories():
    present = random_presence()
    bank, objects = bank_of(present), all_objects(*present.shape)
    for bucket in select("both", bank, objects):
        owners = torch.full((int(present.sum()),), -1)
        owners[bank[present]] = present.nonzero()[:, 1]
        assert (owners[bucket.slots.maps] == objects[bucket.objects, 1:]).all()


@pytest.mark.parametrize("strategy", ["preceding", "following", "both", "sam2"])
def test_every_cell_is_in_one_bucket(strategy):
    present = random_presence()
    objects = present.nonzero()
    buckets = select(strategy, bank_of(present), objects)
    assert torch.cat([bucket.objects for bucket in buckets]).sort().values.tolist() == list(range(len(objects)))
    assert len({(b.slots.maps.shape[1], b.slots.pointers.shape[1]) for b in buckets}) == len(buckets)
    assert all((bucket.slots.maps >= 0).all() for bucket in buckets)


def test_cells_without_any_memory_get_empty_slots():
    (bucket,) = select("preceding", torch.full((4, 1), -1), all_objects(4, 1))
    assert bucket.slots.maps.shape == (4, 0)
    assert bucket.slots.pointers.shape == (4, 0)


def test_no_cells_no_buckets():
    assert select("both", torch.zeros(4, 1, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long)) == []


def official(present: torch.Tensor, frame: int, most: int) -> tuple[set, set]:
    """What SAM 2 takes for one cell: the frames and entries of its maps, frames and distances of its pointers."""
    frames = len(present)
    remembered = {t: t for t in range(frames) if present[t]}
    chosen, rest = select_closest_cond_frames(frame, remembered, most)
    maps = {(t, 6) for t in chosen} | {(frame - d, d - 1) for d in range(1, 7) if frame - d in rest}
    span = min(frames, 16) - 1
    pointers = {(t, round((frame - t) / span * 15)) for t in chosen if t <= frame}
    return maps, pointers | {(frame - d, round(d / span * 15)) for d in range(1, span + 1) if frame - d in rest}


@pytest.mark.parametrize("most", [None, 2, 3, 4])
@pytest.mark.parametrize("frames", [5, 16, 24])
def test_sam2_chooses_as_the_official_code(frames, most):
    present = random_presence(frames, 3, seed=frames)
    # rows are told by frame: one object's bank at a time
    for kind in range(present.shape[1]):
        bank = torch.where(present[:, kind : kind + 1], torch.arange(frames)[:, None], -1)
        buckets = select("sam2", bank, all_objects(frames, 1), max_conditioning=most)
        for frame in range(frames):
            assert memories_of(buckets, frame) == official(present[:, kind], frame, -1 if most is None else most)


def test_impossible_requests_get_a_sentence():
    bank, objects = torch.zeros(4, 1, dtype=torch.long), all_objects(4, 1)
    with pytest.raises(UsageError, match="0 to 6 frames"):
        select("both", bank, objects, reach=7)
    with pytest.raises(UsageError, match="at least 2 conditioning frames"):
        select("sam2", bank, objects, max_conditioning=1)
