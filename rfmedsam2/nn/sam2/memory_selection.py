"""Selecting the memories that each object attends to, and their temporal positions (RFMedSAM 2 paper, Fig. 4(2)).

SAM 2 gives every prompted frame temporal position 0, whatever its distance. In Step 2 every frame is prompted, so
position 0 is reserved for the current frame and the others get the position of their true distance: `preceding` (b),
`following` (c), `both` (d). `sam2` (a) is SAM 2's own rule, with every frame in memory as a conditioning frame.

Objects (slice, class) differ in their number of memories. They are grouped into buckets of equal numbers, without
padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.refinement.disturbance import without_some
from rfmedsam2.nn.sam2.types import Bucket, Slots
from rfmedsam2.records.model import MemoryStrategy

LONGEST_REACH = 6
"""Frames on one side that SAM 2's temporal encoding distinguishes: its seven entries minus the current one."""
CURRENT = 6
"""Entry of the temporal encoding for the current frame, and for SAM 2's conditioning frames."""
POINTER_FRAMES = 16
"""Number of frames whose pointers SAM 2 uses, including the current one (`max_obj_ptrs_in_encoder`)."""


def select(
    strategy: MemoryStrategy,
    bank: Tensor,
    objects: Tensor,
    *,
    reach: int = LONGEST_REACH,
    max_conditioning: int | None = None,
    dropout: float = 0.0,
) -> list[Bucket]:
    """Choose memories for all objects at once.

    Args:
        strategy: which frames an object attends to, besides its own.
        bank: (D, O) long: row in the memory bank of frame d and class o, or -1 if there is no memory.
        objects: (q, 2) long: (frame, class) of the objects to select memories for.
        reach: number of frames on each side, 0 to 6.
        max_conditioning: only for `sam2`: maximum number of conditioning frames, at least 2, nearest first (SAM 2's
            `max_cond_frames_in_attn`); None: all.
        dropout: not for `sam2`: probability that the memory of another frame is left out.

    Returns:
        Buckets that contain every object once. Within a bucket, objects are ordered by class, then by frame, because
        neighbors share memories. Objects without memories are in a bucket with slots of width 0.
    """
    if not 0 <= reach <= LONGEST_REACH or (max_conditioning is not None and max_conditioning < 2):
        raise UsageError(
            "reach or max_conditioning is out of range",
            expected="0 to 6 frames on each side, and at least 2 conditioning frames",
            found=f"{reach} frames and {max_conditioning} conditioning frames",
        )
    if strategy == "sam2":
        candidates = _conditioning(bank, objects, reach, max_conditioning)
    else:
        candidates = _neighbors(strategy, bank, objects, reach, dropout)
    return _buckets(candidates, objects)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """Candidate frames of q objects, w each: bank rows, entries and distances (q, w), and which of them are valid."""

    rows: Tensor
    positions: Tensor
    distances: Tensor
    maps: Tensor
    pointers: Tensor


def _neighbors(strategy: MemoryStrategy, bank: Tensor, objects: Tensor, reach: int, dropout: float) -> _Candidates:
    """The object's own frame and neighbors with a memory; maps and pointers of the same frames."""
    away = {
        "preceding": range(1, reach + 1),
        "following": range(-1, -reach - 1, -1),
        "both": [sign * d for d in range(1, reach + 1) for sign in (1, -1)],
    }[strategy]
    distances = torch.tensor([0, *away], device=bank.device).expand(len(objects), -1)
    frames = objects[:, :1] - distances
    inside = (frames >= 0) & (frames < len(bank))
    rows = torch.where(inside, bank[frames.clamp(0, len(bank) - 1), objects[:, 1:]], -1)
    rows = torch.cat([rows[:, :1], without_some(rows[:, 1:], dropout)], 1)
    positions = torch.where(distances == 0, CURRENT, distances.abs() - 1)
    return _Candidates(
        rows=rows,
        positions=positions,
        distances=distances.float() / (POINTER_FRAMES - 1),
        maps=rows >= 0,
        pointers=rows >= 0,
    )


def _conditioning(bank: Tensor, objects: Tensor, reach: int, max_conditioning: int | None) -> _Candidates:
    """SAM 2's rule (`SAM2Base._prepare_memory_conditioned_features`, eval mode); every frame in memory is conditioning.

    Selected frames all get the current frame's entry, whatever their distance, and their pointers are used if they are
    not ahead; frames that are not selected serve as ordinary memories if they are near enough.
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
    """Select frames, (q, D) bool, as SAM 2's `select_closest_cond_frames`.

    The nearest frame before and the nearest from the current one on come first, then all others by distance; on ties
    the earlier frame.
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
    """Group objects by their number of maps and pointers, with valid entries moved to the front."""
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
