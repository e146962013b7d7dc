"""Which object prompts (one class on one frame) a training step decodes.

While predicting, an object attends to the memories of up to six neighboring frames. Single prompts drawn at random have
hardly any neighbor among each other, so that training would not show the memory attention what it meets later. Runs of
consecutive frames do, and most of the frames between the runs need not be encoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnObjects:
    """Objects (frame, class) to decode.

    Attributes:
        learned: (q, 2) long, decoded with gradients.
        absent: (q,) bool, which of these are not on their frame.
        context: (c, 2) long, decoded without gradients, for the memories of the others.
        frames: (N,) bool, frames of `learned` if only these count in losses; None: all frames count.
    """

    learned: Tensor
    absent: Tensor
    context: Tensor
    frames: Tensor | None

    @property
    def objects(self) -> Tensor:
        """(q + c, 2): `learned`, then `context`."""
        return torch.cat([self.learned, self.context])


def all_objects(present: Tensor) -> DrawnObjects:
    """All objects that are present, (N, K) bool."""
    objects = present.nonzero()
    return DrawnObjects(learned=objects, absent=_none(objects), context=objects[:0], frames=None)


def draw_objects(present: Tensor, volumes: int, *, sampling: Sampling, config: RFMedSam2Config) -> DrawnObjects:
    """Draw the objects of a training step from torch's global RNG.

    Args:
        present: (N, K) bool, of D consecutive frames of each of `volumes`.
        volumes: number of volumes.
        sampling: limit and way of drawing; for generators without masks, the share of absent objects.
        config: the model, whose memory reaches to other frames.
    """
    asked, most = present, sampling.max_prompted_objects
    if sampling.absent_share and config.generator not in ("unet", "hierarchical_masks"):
        asked = present | (torch.rand(present.shape, device=present.device) < sampling.absent_share)
    if most is None or int(asked.sum()) <= most:
        drawn = asked
    elif sampling.prompted_runs:
        drawn = _runs(asked.unflatten(0, (volumes, -1)), most)
    else:
        objects = asked.nonzero()
        objects = objects[torch.randperm(len(objects), device=objects.device)[:most].sort().values]
        drawn = torch.zeros_like(asked)
        drawn[objects[:, 0], objects[:, 1]] = True
    learned = drawn.nonzero()
    absent = ~present[learned[:, 0], learned[:, 1]]
    if drawn is asked or not sampling.prompted_runs:
        return DrawnObjects(learned=learned, absent=absent, context=learned[:0], frames=None)
    seen = remembered(drawn.unflatten(0, (volumes, -1)), config).flatten(0, 1)
    context = (seen & present & ~drawn).nonzero()
    return DrawnObjects(learned=learned, absent=absent, context=context, frames=drawn.any(1))


def remembered(objects: Tensor, config: RFMedSam2Config) -> Tensor:
    """Frames and classes in whose memories objects (B, D, K) bool look in Step 2, in the same layout."""
    if config.refinements == 1:
        return torch.zeros_like(objects)
    if config.strategy == "sam2":
        return objects.any(1, keepdim=True).expand_as(objects)
    seen, frames = objects.clone(), objects.shape[1]
    for distance in range(1, min(config.memory_frames, frames - 1) + 1):
        if config.strategy in ("preceding", "both"):
            seen[:, :-distance] |= objects[:, distance:]
        if config.strategy in ("following", "both"):
            seen[:, distance:] |= objects[:, :-distance]
    return seen


def _runs(asked: Tensor, most: int) -> Tensor:
    """Draw one run of frames from each volume (B, D, K) bool, all together at most `most` objects; (B * D, K) bool."""
    drawn = torch.zeros_like(asked)
    counts = asked.sum(2)
    left = most
    # volumes with few objects first, so that others get what these leave
    for done, volume in enumerate(counts.sum(1).argsort().tolist()):
        share = left // (len(asked) - done)
        first, stop = _run(counts[volume].tolist(), share)
        drawn[volume, first:stop] = asked[volume, first:stop]
        if stop == first + 1 and counts[volume, first] > share:  # a frame of more objects than its share
            classes = asked[volume, first].nonzero()[:, 0]
            drawn[volume, first] = False
            drawn[volume, first, classes[torch.randperm(len(classes), device=classes.device)[:share]]] = True
        left -= int(drawn[volume].sum())
    return drawn.flatten(0, 1)


def _run(counts: list[int], share: int) -> tuple[int, int]:
    """Half-open range of frames around a random frame with objects, with at most `share` objects or of one frame.

    It grows forward first, and backward where the volume ends.
    """
    occupied = [frame for frame, count in enumerate(counts) if count]
    if not occupied:
        return 0, 0
    first = occupied[int(torch.randint(len(occupied), ()))]
    stop, held = first + 1, counts[first]
    while stop < len(counts) and held + counts[stop] <= share:
        held += counts[stop]
        stop += 1
    while stop == len(counts) and first > 0 and held + counts[first - 1] <= share:
        first -= 1
        held += counts[first]
    return first, stop


def _none(objects: Tensor) -> Tensor:
    return torch.zeros(len(objects), dtype=torch.bool, device=objects.device)
