"""SAM 2's steps on one frame of a video, for many objects as one batch: remember, recall, decode.

What is remembered and attended to is `SAM2Base._prepare_memory_conditioned_features`'s choice: all prompted frames (or
the nearest `max_cond_frames_in_attn`), maps of the six frames before, object pointers of the fifteen before. The mask
decoder is SAM 2's, HQ-SAM 2's, or SAM 2's with SAM2Refiner around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from sam2.modeling.sam2_utils import select_closest_cond_frames
from torch import Tensor

from rfmedsam2.nn.sam2.build import Base
from rfmedsam2.nn.sam2.memory_attention import condition_on_memory, prepare_frames
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import MemoryBank, Slots
from rfmedsam2.nn.segmenter import Embedded, PromptBatch
from rfmedsam2.system.private_apis import private
from segment_anything_hq.nn.hq_sam2 import HqSam2
from segment_anything_hq.nn.sam2_base import BOX_LABELS, Sam2Segmenter
from segment_anything_hq.nn.sam2_refiner import SAM2Refiner

VideoNetwork = Sam2Segmenter | HqSam2 | SAM2Refiner
LOGIT_CLAMP = 32.0
"""Logits of an earlier answer go in as a mask prompt no larger than this, as in SAM 2's predictor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectMemory:
    """One object on one frame.

    Attributes:
        map: (M, s, s) bfloat16, as SAM 2's predictor keeps it; None: only its pointer is still of use.
        pointer: (C,).
    """

    map: Tensor | None
    pointer: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Masks of n objects on one frame.

    Attributes:
        logits: (n, 4s, 4s) of SAM 2's decoder, where an object is not there far below 0.
        final: (n, h, w) logits to be shown: the refiner's, else `logits`.
        pointers: (n, C).
        scores: (n, 1) object score logits; above 0: the object is there.
    """

    logits: Tensor
    final: Tensor
    pointers: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedMemories:
    """What one object attends to: (entry of the temporal encoding, memory), and (frames away, memory)."""

    maps: list[tuple[int, ObjectMemory]]
    pointers: list[tuple[int, ObjectMemory]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A frame in its video.

    Attributes:
        frame: its number.
        count: frames of the video.
        backwards: it is reached from later frames.
    """

    frame: int
    count: int
    backwards: bool = False

    def before(self, distance: int) -> int:
        """The frame that was reached so many frames earlier."""
        return self.frame + distance if self.backwards else self.frame - distance


class VideoSteps:
    """One network's steps.

    Args:
        network: in evaluation mode, on its device.
        objects_at_once: more attend and are decoded in groups.
    """

    def __init__(self, network: VideoNetwork, *, objects_at_once: int) -> None:
        self.network = network
        self.objects_at_once = objects_at_once
        self.base: Base = network.sam.base if isinstance(network, SAM2Refiner) else network.base
        self._sam2 = Sam2(self.base)
        self.maps_back: int = self.base.num_maskmem - 1
        self.pointers_back: int = self.base.max_obj_ptrs_in_encoder - 1

    def answer(self, embedded: Embedded, prompted: PromptBatch) -> Answer:
        """Mask prompted objects (equally many points each) of the one frame embedded, without memory."""
        if isinstance(self.network, SAM2Refiner):
            return self._refined(self.network, embedded, prompted, None)
        return self._decoded(embedded, embedded.embedding[prompted.images], prompted)

    def given(self, embedded: Embedded, masks: Tensor) -> Answer:
        """Take masks (n, S, S) of 0 and 1 for the answer; the decoder makes their pointers alone."""
        bare = self._bare(embedded).expand(len(masks), -1, -1, -1)
        made = private(self.base, "_use_mask_as_output", package="sam2")(bare, _finer(embedded), masks[:, None])
        logits = made[3][:, 0]
        return Answer(logits=logits, final=logits, pointers=made[5], scores=made[6])

    def track(self, embedded: Embedded, place: Place, attended: Sequence[SelectedMemories]) -> Answer:
        """Mask n objects on a frame from their memories, in their order."""
        prepared = prepare_frames(self._sam2, self._bare(embedded))
        parts: list[Answer] = []
        order: list[int] = []
        for rows in self._groups(attended):
            group = [attended[row] for row in rows]
            images = torch.zeros(len(group), dtype=torch.long, device=embedded.embedding.device)
            bank, slots = _bank(group, place, self.base)
            conditioned = condition_on_memory(self._sam2, prepared, images, bank, slots)
            prompted = PromptBatch(images=images)
            if isinstance(self.network, SAM2Refiner):
                parts.append(self._refined(self.network, embedded, prompted, conditioned))
            else:
                parts.append(self._decoded(embedded, conditioned, prompted))
            order += rows
        back = torch.tensor(order).argsort()
        names = ("logits", "final", "pointers", "scores")
        return Answer(**{name: torch.cat([getattr(part, name) for part in parts])[back] for name in names})

    def encode_memory(self, embedded: Embedded, answer: Answer, *, prompted: bool) -> list[ObjectMemory]:
        """Memories of n objects on a frame; of prompted ones the mask is what was seen, not how sure it is."""
        side = self.base.image_size
        large = F.interpolate(answer.logits[:, None], (side, side), mode="bilinear", align_corners=False)
        if prompted:
            large = torch.where(large > 0, torch.inf, -torch.inf)
        bare = self._bare(embedded).expand(len(large), -1, -1, -1)
        maps, _ = self.base._encode_new_memory(
            current_vision_feats=[bare.flatten(2).permute(2, 0, 1)],
            feat_sizes=[tuple(bare.shape[2:])],
            pred_masks_high_res=large,
            object_score_logits=answer.scores,
            is_mask_from_pts=False,  # done above, whatever the base is set to
        )
        kept = zip(maps.to(torch.bfloat16).unbind(), answer.pointers.unbind(), strict=True)
        return [ObjectMemory(map=one.clone(), pointer=pointer.clone()) for one, pointer in kept]

    def attended(
        self, place: Place, given: Mapping[int, ObjectMemory], recent: Mapping[int, ObjectMemory]
    ) -> SelectedMemories:
        """Choose what an object attends to.

        Args:
            place: the frame.
            given: of frames where the object was prompted; not of this one.
            recent: of frames where it was tracked.
        """
        near, far = select_closest_cond_frames(place.frame, dict(given), self.base.max_cond_frames_in_attn)
        maps = [(self.maps_back, memory) for memory in near.values()]
        for distance in range(1, self.maps_back + 1):
            memory = recent.get(place.before(distance), far.get(place.before(distance)))
            if memory is not None:
                maps.append((distance - 1, memory))
        # pointers of the past alone, where it is the past in the direction of tracking
        away = {frame: frame - place.frame if place.backwards else place.frame - frame for frame in near}
        pointers = [(away[frame], memory) for frame, memory in near.items() if away[frame] >= 0]
        for distance in range(1, min(place.count, self.pointers_back + 1)):
            memory = recent.get(place.before(distance), far.get(place.before(distance)))
            if memory is not None:
                pointers.append((distance, memory))
        return SelectedMemories(maps=maps, pointers=pointers)

    def _groups(self, attended: Sequence[SelectedMemories]) -> list[list[int]]:
        """Rows of objects that attend to equally much: most often all of them."""
        alike: dict[tuple[int, int], list[int]] = {}
        for row, each in enumerate(attended):
            alike.setdefault((len(each.maps), len(each.pointers)), []).append(row)
        step = self.objects_at_once
        return [rows[i : i + step] for rows in alike.values() for i in range(0, len(rows), step)]

    def _decoded(self, embedded: Embedded, embedding: Tensor, prompted: PromptBatch) -> Answer:
        """By SAM 2's or HQ-SAM 2's decoder, as the official predictor asks it."""
        points, labels = prompted.points, prompted.point_labels
        if prompted.boxes is not None:
            corners = prompted.boxes.reshape(-1, 2, 2)
            kinds = torch.tensor([BOX_LABELS], device=corners.device)
            points = corners if points is None else torch.cat([corners, points], 1)
            labels = kinds if labels is None else torch.cat([kinds, labels], 1)
        asked = None
        if points is not None and labels is not None:
            asked = {"point_coords": points.float(), "point_labels": labels.int()}
        # frames that are tracked have no points: what counts for them is `multimask_output_for_tracking`
        *_, logits, _, pointers, scores = self.base._forward_sam_heads(
            backbone_features=embedding,
            point_inputs=asked,
            mask_inputs=None if prompted.masks is None else prompted.masks[:, None],
            high_res_features=_finer(embedded),
            multimask_output=private(self.base, "_use_multimask", package="sam2")(asked is not None, asked),
        )
        return Answer(logits=logits[:, 0], final=logits[:, 0], pointers=pointers, scores=scores)

    def _refined(
        self, network: SAM2Refiner, embedded: Embedded, prompted: PromptBatch, conditioned: Tensor | None
    ) -> Answer:
        """By SAM2Refiner; objects that are not there are treated as `SAM2Base._forward_sam_heads` does."""
        made = network.segment(embedded, prompted, conditioned=conditioned)
        scores = made.extra["object_scores"][:, None]
        there = scores > 0
        pointers = made.extra["pointers"]
        return Answer(
            logits=torch.where(there[..., None], made.logits, NO_OBJ_SCORE),
            final=torch.where(there[..., None], made.final, NO_OBJ_SCORE),
            pointers=torch.where(there, pointers, self.base.no_obj_ptr.to(pointers.dtype)),
            scores=scores,
        )

    def _bare(self, embedded: Embedded) -> Tensor:
        """(1, C, s, s) as memory has to do with it: not marked as without memory."""
        return embedded.embedding - self.base.no_mem_embed.reshape(1, -1, 1, 1)


def _finer(embedded: Embedded) -> list[Tensor]:
    """Levels of strides 4 and 8 of one frame, for all of its objects."""
    assert embedded.fine is not None
    assert embedded.middle is not None
    return [embedded.fine, embedded.middle]


def _bank(group: Sequence[SelectedMemories], place: Place, base: Base) -> tuple[MemoryBank, Slots]:
    """Memories of n objects that attend to equally many, one after the other, and where in there each finds its own."""
    count, device = len(group), base.device
    maps = [memory.map for each in group for _, memory in each.maps if memory.map is not None]
    pointers = [memory.pointer for each in group for _, memory in each.pointers]
    furthest = max(1, min(place.count, base.max_obj_ptrs_in_encoder) - 1)
    away = [[distance / furthest for distance, _ in each.pointers] for each in group]
    bank = MemoryBank(
        maps=torch.stack(maps).float(),
        pointers=torch.stack(pointers) if pointers else torch.zeros(0, base.hidden_dim, device=device),
    )
    slots = Slots(
        maps=torch.arange(len(maps), device=device).view(count, -1),
        positions=torch.tensor([[position for position, _ in each.maps] for each in group], device=device),
        pointers=torch.arange(len(pointers), device=device).view(count, len(pointers) // count),
        distances=torch.tensor(away, device=device, dtype=torch.float32).view(count, len(pointers) // count),
    )
    return bank, slots
