"""SAM 2's steps on one video frame, for many objects as one batch: memory encoding, memory attention, decoding.

Memories are selected as in `SAM2Base._prepare_memory_conditioned_features`: all prompted frames (or the nearest
`max_cond_frames_in_attn`), maps of the six previous frames, object pointers of the fifteen previous frames. The mask
decoder is SAM 2's, HQ-SAM 2's or SAM2Refiner's.
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
"""Previous logits are clamped to this range before they become a mask prompt, as in SAM 2's predictor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectMemory:
    """Memory of one object on one frame.

    Attributes:
        map: memory map (M, s, s) bfloat16, as SAM 2's predictor keeps it; None once only the pointer is needed.
        pointer: object pointer (C,).
    """

    map: Tensor | None
    pointer: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameMasks:
    """Masks of n objects on one frame.

    Attributes:
        logits: (n, 4s, 4s) mask logits of SAM 2's decoder; far below 0 where the object is absent.
        final: (n, h, w) logits of the output mask: the refiner's if there is one, else `logits`.
        pointers: (n, C) object pointers.
        scores: (n, 1) object score logits; above 0 if the object is present.
    """

    logits: Tensor
    final: Tensor
    pointers: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedMemories:
    """Memories that one object attends to.

    Attributes:
        maps: index of the temporal encoding, and memory.
        pointers: distance in frames, and memory.
    """

    maps: list[tuple[int, ObjectMemory]]
    pointers: list[tuple[int, ObjectMemory]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePosition:
    """The position of a frame during tracking.

    Attributes:
        frame: number of the frame.
        count: number of frames in the video.
        backwards: tracking runs toward the first frame.
    """

    frame: int
    count: int
    backwards: bool = False

    def before(self, distance: int) -> int:
        """Number of the frame that tracking visited `distance` frames earlier."""
        return self.frame + distance if self.backwards else self.frame - distance


class VideoSteps:
    """SAM 2's per-frame steps with one network.

    Args:
        network: a network in evaluation mode, on its device.
        objects_at_once: maximum number of objects per batch of memory attention and decoding.
    """

    def __init__(self, network: VideoNetwork, *, objects_at_once: int) -> None:
        self.network = network
        self.objects_at_once = objects_at_once
        self.base: Base = network.sam.base if isinstance(network, SAM2Refiner) else network.base
        self._sam2 = Sam2(self.base)
        self.maps_back: int = self.base.num_maskmem - 1
        self.pointers_back: int = self.base.max_obj_ptrs_in_encoder - 1

    def segment(self, embedded: Embedded, prompted: PromptBatch) -> FrameMasks:
        """Segment prompted objects (with equal numbers of points) on an encoded frame, without memory."""
        if isinstance(self.network, SAM2Refiner):
            return self._refined(self.network, embedded, prompted, None)
        return self._decoded(embedded, embedded.embedding[prompted.images], prompted)

    def use_mask(self, embedded: Embedded, masks: Tensor) -> FrameMasks:
        """Use masks (n, S, S) of 0 and 1 as the result; the decoder only computes their object pointers."""
        bare = self._bare(embedded).expand(len(masks), -1, -1, -1)
        made = private(self.base, "_use_mask_as_output", package="sam2")(bare, _finer(embedded), masks[:, None])
        logits = made[3][:, 0]
        return FrameMasks(logits=logits, final=logits, pointers=made[5], scores=made[6])

    def track(self, embedded: Embedded, position: FramePosition, attended: Sequence[SelectedMemories]) -> FrameMasks:
        """Segment n objects on a frame from their memories, in order."""
        prepared = prepare_frames(self._sam2, self._bare(embedded))
        parts: list[FrameMasks] = []
        order: list[int] = []
        for rows in self._groups(attended):
            group = [attended[row] for row in rows]
            images = torch.zeros(len(group), dtype=torch.long, device=embedded.embedding.device)
            bank, slots = _bank(group, position, self.base)
            conditioned = condition_on_memory(self._sam2, prepared, images, bank, slots)
            prompted = PromptBatch(images=images)
            if isinstance(self.network, SAM2Refiner):
                parts.append(self._refined(self.network, embedded, prompted, conditioned))
            else:
                parts.append(self._decoded(embedded, conditioned, prompted))
            order += rows
        back = torch.tensor(order).argsort()
        names = ("logits", "final", "pointers", "scores")
        return FrameMasks(**{name: torch.cat([getattr(part, name) for part in parts])[back] for name in names})

    def encode_memory(self, embedded: Embedded, answer: FrameMasks, *, prompted: bool) -> list[ObjectMemory]:
        """Encode the memories of n objects on a frame; masks of prompted objects are binarized first."""
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
            is_mask_from_pts=False,  # already binarized above, independent of the base's configuration
        )
        kept = zip(maps.to(torch.bfloat16).unbind(), answer.pointers.unbind(), strict=True)
        return [ObjectMemory(map=one.clone(), pointer=pointer.clone()) for one, pointer in kept]

    def select_memories(
        self, position: FramePosition, given: Mapping[int, ObjectMemory], recent: Mapping[int, ObjectMemory]
    ) -> SelectedMemories:
        """Select the memories that an object attends to.

        Args:
            position: the current frame.
            given: memories by frame number where the object was prompted, without the current frame.
            recent: memories by frame number where the object was tracked.
        """
        near, far = select_closest_cond_frames(position.frame, dict(given), self.base.max_cond_frames_in_attn)
        maps = [(self.maps_back, memory) for memory in near.values()]
        for distance in range(1, self.maps_back + 1):
            memory = recent.get(position.before(distance), far.get(position.before(distance)))
            if memory is not None:
                maps.append((distance - 1, memory))
        # pointers only from the past, in the direction of tracking
        away = {frame: frame - position.frame if position.backwards else position.frame - frame for frame in near}
        pointers = [(away[frame], memory) for frame, memory in near.items() if away[frame] >= 0]
        for distance in range(1, min(position.count, self.pointers_back + 1)):
            memory = recent.get(position.before(distance), far.get(position.before(distance)))
            if memory is not None:
                pointers.append((distance, memory))
        return SelectedMemories(maps=maps, pointers=pointers)

    def _groups(self, attended: Sequence[SelectedMemories]) -> list[list[int]]:
        """Group objects with equal numbers of memories, at most `objects_at_once` each; usually there is one group."""
        alike: dict[tuple[int, int], list[int]] = {}
        for row, each in enumerate(attended):
            alike.setdefault((len(each.maps), len(each.pointers)), []).append(row)
        step = self.objects_at_once
        return [rows[i : i + step] for rows in alike.values() for i in range(0, len(rows), step)]

    def _decoded(self, embedded: Embedded, embedding: Tensor, prompted: PromptBatch) -> FrameMasks:
        """Decode with SAM 2's or HQ-SAM 2's decoder, as the official predictor does."""
        points, labels = prompted.points, prompted.point_labels
        if prompted.boxes is not None:
            corners = prompted.boxes.reshape(-1, 2, 2)
            kinds = torch.tensor([BOX_LABELS], device=corners.device)
            points = corners if points is None else torch.cat([corners, points], 1)
            labels = kinds if labels is None else torch.cat([kinds, labels], 1)
        asked = None
        if points is not None and labels is not None:
            asked = {"point_coords": points.float(), "point_labels": labels.int()}
        # tracked frames have no points; `multimask_output_for_tracking` applies to them
        *_, logits, _, pointers, scores = self.base._forward_sam_heads(
            backbone_features=embedding,
            point_inputs=asked,
            mask_inputs=None if prompted.masks is None else prompted.masks[:, None],
            high_res_features=_finer(embedded),
            multimask_output=private(self.base, "_use_multimask", package="sam2")(asked is not None, asked),
        )
        return FrameMasks(logits=logits[:, 0], final=logits[:, 0], pointers=pointers, scores=scores)

    def _refined(
        self, network: SAM2Refiner, embedded: Embedded, prompted: PromptBatch, conditioned: Tensor | None
    ) -> FrameMasks:
        """Decode with SAM2Refiner; absent objects are treated as in `SAM2Base._forward_sam_heads`."""
        made = network.segment(embedded, prompted, conditioned=conditioned)
        scores = made.extra["object_scores"][:, None]
        there = scores > 0
        pointers = made.extra["pointers"]
        return FrameMasks(
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


def _bank(group: Sequence[SelectedMemories], position: FramePosition, base: Base) -> tuple[MemoryBank, Slots]:
    """Memories of n objects that attend to equally many, one after the other, and where in there each finds its own."""
    count, device = len(group), base.device
    maps = [memory.map for each in group for _, memory in each.maps if memory.map is not None]
    pointers = [memory.pointer for each in group for _, memory in each.pointers]
    furthest = max(1, min(position.count, base.max_obj_ptrs_in_encoder) - 1)
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
