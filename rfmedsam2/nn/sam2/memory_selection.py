"""Which memories each cell attends to, and at which temporal position (RFMedSAM 2 paper, Fig. 4(2)).

SAM 2 gives every prompted frame temporal position 0, however far it is. In Step 2 every frame is prompted, so position
0 is left to the current frame and the others take the place of their true distance: `preceding` (b), `following` (c),
`both` (d). `sam2` (a) is SAM 2's own rule, with every remembered frame a conditioning frame.

Cells differ in how many memories they have. They are put into buckets of equal numbers, so that nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.sam2.types import Bucket, Slots
from rfmedsam2.records.model import MemoryStrategy

LONGEST_REACH = 6
"""Frames on one side that SAM 2's temporal encoding tells apart: its seven entries less the current frame's."""
CURRENT = 6
"""Entry of the temporal encoding for the current frame, and for SAM 2's conditioning frames."""
POINTER_FRAMES = 16
"""Frames that SAM 2 takes pointers from, the current one counted (`max_obj_ptrs_in_encoder`)."""


def select(
    strategy: MemoryStrategy,
    bank: Tensor,
    objects: Tensor,
    *,
    reach: int = LONGEST_REACH,
    max_conditioning: int | None = None,
) -> list[Bucket]:
    """Choose memories for all cells at once.

    Args:
        strategy: which frames a cell looks at, beside its own.
        bank: (D, O) long: for frame d and object o its row of the memory bank, or -1 where nothing is remembered.
        objects: (q, 2) long: (frame, object) of the cells asked about.
        reach: frames looked at on a side, 0 to 6.
        max_conditioning: `sam2` only: attend to at most so many conditioning frames, 2 or more, the nearest first
            (SAM 2's `max_cond_frames_in_attn`); None: to all.

    Returns:
        Buckets that hold every cell once. Within a bucket cells are ordered by object, then by frame, because
        neighbors share memories. A cell without any memory is in a bucket of slots of width 0.
    """
    if not 0 <= reach <= LONGEST_REACH or (max_conditioning is not None and max_conditioning < 2):
        raise UsageError(
            "Memories cannot be chosen so",
            expected="0 to 6 frames on a side, and 2 conditioning frames or more",
            found=f"{reach} frames and {max_conditioning} conditioning frames",
        )
    if strategy == "sam2":
        candidates = _conditioning(bank, objects, reach, max_conditioning)
    else:
        candidates = _neighbors(strategy, bank, objects, reach)
    return _buckets(candidates, objects)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """Frames that q cells may look at, w each: bank rows, entries and distances (q, w), and which of them count."""

    rows: Tensor
    positions: Tensor
    distances: Tensor
    maps: Tensor
    pointers: Tensor


def _neighbors(strategy: MemoryStrategy, bank: Tensor, objects: Tensor, reach: int) -> _Candidates:
    """The cell's own frame and those around it that are remembered; pointers of the same frames as maps."""
    away = {
        "preceding": range(1, reach + 1),
        "following": range(-1, -reach - 1, -1),
        "both": [sign * d for d in range(1, reach + 1) for sign in (1, -1)],
    }[strategy]
    distances = torch.tensor([0, *away], device=bank.device).expand(len(objects), -1)
    frames = objects[:, :1] - distances
    inside = (frames >= 0) & (frames < len(bank))
    rows = torch.where(inside, bank[frames.clamp(0, len(bank) - 1), objects[:, 1:]], -1)
    positions = torch.where(distances == 0, CURRENT, distances.abs() - 1)
    return _Candidates(
        rows=rows,
        positions=positions,
        distances=distances.float() / (POINTER_FRAMES - 1),
        maps=rows >= 0,
        pointers=rows >= 0,
    )


def _conditioning(bank: Tensor, objects: Tensor, reach: int, max_conditioning: int | None) -> _Candidates:
    """SAM 2's rule (`SAM2Base._prepare_memory_conditioned_features`, eval mode), every remembered frame conditioning.

    Selected frames all take the current frame's entry, whatever their distance, and lend their pointers if they are not
    ahead; frames not selected serve as ordinary memories where they are near enough.
    """
    rows = bank[:, objects[:, 1]].T
    frames = torch.arange(len(bank), device=bank.device)
    distances = objects[:, :1] - frames
    chosen = _closest(rows >= 0, distances, max_conditioning)
    others = (rows >= 0) & ~chosen & (distances >= 1)
    span = max(1, min(len(bank), POINTER_FRAMES) - 1)
    return _Candidates(
        rows=rows,
        positions=torch.where(chosen, CURRENT, distances - 1),
        distances=distances.float() / span,
        maps=chosen | (others & (distances <= reach)),
        pointers=(chosen & (distances >= 0)) | (others & (distances <= span)),
    )


def _closest(remembered: Tensor, distances: Tensor, most: int | None) -> Tensor:
    """Give (q, D) bool as SAM 2's `select_closest_cond_frames`.

    The nearest frame before comes first, with the nearest from here on, then all others by distance; of two equally
    far ones the earlier.
    """
    if most is None:
        return remembered
    width = distances.shape[1]
    far = width * width + width
    order = distances.abs() * width + torch.arange(width, device=distances.device)
    before, after = (torch.where(remembered & side, order, far) for side in (distances > 0, distances <= 0))
    first = (order == before.amin(1, keepdim=True)) | (order == after.amin(1, keepdim=True))
    ranks = torch.where(remembered, torch.where(first, -1, order), far).argsort(dim=1, stable=True).argsort(dim=1)
    return remembered & (ranks < most)


def _buckets(candidates: _Candidates, objects: Tensor) -> list[Bucket]:
    """Cells by how many maps and pointers they have, what counts moved to the front."""
    rows = candidates.rows
    maps, pointers = candidates.maps.sum(1), candidates.pointers.sum(1)
    map_order, pointer_order = (
        (~counted).to(torch.uint8).argsort(dim=1, stable=True) for counted in (candidates.maps, candidates.pointers)
    )
    by_object = (
        (objects[:, 1] * (objects[:, 0].amax() + 1) + objects[:, 0]).argsort() if len(objects) else objects[:, 0]
    )
    width = rows.shape[1] + 1
    kinds = maps * width + pointers
    buckets = []
    for kind in kinds.unique().tolist():
        members = by_object[kinds[by_object] == kind]
        chosen_maps, chosen_pointers = map_order[members, : kind // width], pointer_order[members, : kind % width]
        slots = Slots(
            maps=rows[members].gather(1, chosen_maps),
            positions=candidates.positions[members].gather(1, chosen_maps),
            pointers=rows[members].gather(1, chosen_pointers),
            distances=candidates.distances[members].gather(1, chosen_pointers),
        )
        buckets.append(Bucket(objects=members, slots=slots))
    return buckets
