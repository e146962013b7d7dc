"""Steps 1 and 2 of RFMedSAM 2: SAM 2 on all object prompts of many frames in batches, without and with memory.

An object prompt is one class on one frame. Objects are decoded in chunks that fit a memory budget; what depends only on
the frame is computed once for all its classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rfmedsam2.nn.memory_budget import ObjectSizes, chunk_size
from rfmedsam2.nn.refinement.disturbance import jittered
from rfmedsam2.nn.refinement.object_sampling import DrawnObjects, all_objects
from rfmedsam2.nn.refinement.step_gates import StepGates
from rfmedsam2.nn.refinement_state import (
    ABSENT,
    Memory,
    RefinementInput,
    Size,
    Step1Output,
    Step2Output,
    StepMasks,
    downsample,
    log_odds,
    prompts_of,
    scatter_masks,
    size_of,
    total_evidence,
    upsample,
)
from rfmedsam2.nn.sam2.memory_attention import condition_on_memory, prepare_frames
from rfmedsam2.nn.sam2.memory_selection import select
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import FrameFeatures, MemoryBank, ObjectPrompts, Slots
from rfmedsam2.prompts import Prompts, resized
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Compute
from rfmedsam2.system.private_apis import private


class Refiner:
    """Runs SAM 2 twice: Step 1 and Step 2.

    Args:
        sam: SAM 2; registered as a module elsewhere.
        gates: gates of the output `gated`, registered elsewhere too.
        config: configuration of the whole model.
        regions: whether classes overlap.
        compute: memory budget of SAM 2's chunks, and activation checkpointing.
    """

    def __init__(
        self, sam: Sam2, gates: StepGates | None, config: RFMedSam2Config, *, regions: bool, compute: Compute
    ) -> None:
        self.sam, self.gates, self.config, self.regions, self.compute = sam, gates, config, regions, compute

    def first(self, features: FrameFeatures, start: RefinementInput, drawn: DrawnObjects | None = None) -> Step1Output:
        """Step 1: decode object prompts of N frames, those `drawn`, or all that are present."""
        drawn = all_objects(start.prompts.present) if drawn is None else drawn
        results = self._decoded(features, start, drawn.learned, drawn.absent)
        if len(drawn.context):
            with torch.no_grad():
                more = self._decoded(features, start, drawn.context, torch.zeros_like(drawn.context[:, 0]).bool())
            results = [torch.cat(both) for both in zip(results, more, strict=True)]
        boxes, masks, pointers, scores = results
        objects, asked = drawn.objects, None
        if self.config.output == "detail" and start.masks is not None:
            asked = start.masks[objects[:, 0], objects[:, 1]]
        values = self._output(masks, objects, size_of(start.base_logits), evidence=start.evidence, asked=asked, step=1)
        logits = scatter_masks(start.base_logits, objects, values)
        decoded = StepMasks(objects=objects, boxes=boxes, masks=masks)
        return Step1Output(logits=logits, drawn=drawn, decoded=decoded, pointers=pointers, scores=scores)

    def _decoded(
        self, features: FrameFeatures, start: RefinementInput, objects: Tensor, absent: Tensor
    ) -> list[Tensor]:
        """Boxes (q, 4), masks (q, 4s, 4s), pointers (q, C), scores (q,); `absent` (q,): which their frame lacks."""
        sam, size = self.sam, size_of(start.base_logits)
        prompts = start.prompts
        if absent.any():  # their boxes, from a generator, are resized as well
            prompts = Prompts(boxes=prompts.boxes, present=torch.ones_like(prompts.present))
        boxes = self._prompts(prompts, objects, size)
        if not len(objects):
            return [
                boxes,
                *(boxes.new_zeros(0, *shape) for shape in ((4 * sam.side, 4 * sam.side), (sam.channels,), ())),
            ]
        pads = self.config.generator == "gt" and bool(absent.any())

        def chunk(part: Tensor, boxes: Tensor, absent: Tensor) -> tuple[Tensor, ...]:
            frames, classes = part.unbind(1)
            given = ObjectPrompts(
                boxes=boxes,
                padded=absent if pads else None,
                masks=None if start.masks is None else self._downsampled(start.masks[frames, classes]),
                tokens=None if start.tokens is None else start.tokens[frames, classes],
            )
            decoded = sam.decode(features.at(frames), given)
            return decoded.masks, decoded.pointers, decoded.scores

        count = chunk_size(self.compute.memory_mb, self._object_sizes().decode(training=torch.is_grad_enabled()))
        chunks = zip(objects.split(count), boxes.split(count), absent.split(count), strict=True)
        results = zip(*(self.run(chunk, *part) for part in chunks), strict=True)
        return [boxes, *(torch.cat(parts) for parts in results)]

    def encode_memory(self, features: FrameFeatures, first: Step1Output, volumes: int) -> Memory:
        """Memories of Step 1's masks; the N frames are D consecutive ones of each of `volumes`.

        Where SAM 2's masks are added to Step 0's, they are of the sum: SAM 2's alone are not the object's mask.
        """
        objects, learned = first.drawn.objects, len(first.drawn.learned)
        composed = self.config.output == "gated"
        total = self._total(first.logits) if composed else None

        def chunk(part: Tensor, masks: Tensor, scores: Tensor) -> Tensor:
            if composed:
                masks = self._downsampled(self._odds(first.logits, total, part))
            return self.sam.encode_memory(features.embedding[features.rows_of(part[:, 0])], masks, scores)

        count = chunk_size(self.compute.memory_mb, self._object_sizes().encode_memory(training=torch.is_grad_enabled()))
        maps = []
        for own in (slice(learned), slice(learned, None)):
            parts = zip(*(t[own].split(count) for t in (objects, first.decoded.masks, first.scores)), strict=True)
            with torch.set_grad_enabled(torch.is_grad_enabled() and own.start is None):
                maps += [self.run(chunk, *part) for part in parts if len(part[0])]
        rows = torch.full(first.logits.shape[:2], -1, dtype=torch.long, device=objects.device)
        rows[objects[:, 0], objects[:, 1]] = torch.arange(len(objects), device=objects.device)
        if self.config.generator == "gt":  # while predicting, what has no box has no memory
            absent = first.drawn.learned[first.drawn.absent]
            rows[absent[:, 0], absent[:, 1]] = -1
        rows = rows.unflatten(0, (volumes, -1)).transpose(0, 1)
        bank = MemoryBank(maps=torch.cat(maps) if maps else self._no_memory(features), pointers=first.pointers)
        return Memory(bank=bank, rows=rows)

    def second(
        self,
        features: FrameFeatures,
        logits: Tensor,
        memory: Memory,
        *,
        evidence: Tensor | None,
        at: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Step2Output:
        """Step 2: decode the objects in Step 1's class map again, with memories.

        Args:
            features: features of N = B * n frames.
            logits: (N, K, H, W) class map of Step 1 on the same frames.
            memory: memories of a window of frames that contains these.
            evidence: `RefinementInput.evidence` of the same frames.
            at: (n,) long, indices of the n frames of each volume in that window; None: all frames of it, in order.
            only: (N,) bool, frames whose objects are decoded; None: all.
        """
        prompts = prompts_of(logits, regions=self.regions)
        at = torch.arange(len(memory.rows), device=logits.device) if at is None else at
        rows = memory.rows[at].transpose(0, 1).flatten(0, 1)
        wanted = prompts.present & (rows >= 0)
        objects = (wanted if only is None else wanted & only[:, None]).nonzero()
        if not len(objects):
            return Step2Output(logits=logits, decoded=None)
        boxes = self._prompts(prompts, objects, size_of(logits))
        against_all = self.config.step2_mask_prompt == "one_against_rest" and not self.regions
        total = self._total(logits) if against_all and self.config.mask_prompt else None
        masks = self._with_memory(features, logits, total, memory, objects=objects, boxes=boxes, at=at)
        asked = None
        if self.config.output == "detail" and self.config.mask_prompt:
            asked = self._odds(logits, total, objects)
        if evidence is not None and self.config.output == "correct":
            evidence = logits
        values = self._output(masks, objects, size_of(logits), evidence=evidence, asked=asked, step=2)
        decoded = StepMasks(objects=objects, boxes=boxes, masks=masks)
        return Step2Output(logits=scatter_masks(logits, objects, values), decoded=decoded)

    def _with_memory(
        self,
        features: FrameFeatures,
        logits: Tensor,
        total: Tensor | None,
        memory: Memory,
        *,
        objects: Tensor,
        boxes: Tensor,
        at: Tensor,
    ) -> Tensor:
        """Masks (q, 4s, 4s) of objects decoded with memories."""
        volumes, classes = memory.rows.shape[1:]
        each = len(logits) // volumes
        frames, kinds = objects.unbind(1)
        places = torch.stack([at[frames % each], frames // each * classes + kinds], 1)
        buckets = select(
            self.config.strategy,
            memory.rows.flatten(1),
            places,
            reach=self.config.memory_frames,
            dropout=self.config.disturbance.memory_dropout if self.sam.training else 0.0,
        )
        prepared = self.run(lambda embedding: prepare_frames(self.sam, embedding), features.embedding)

        def chunk(part: Tensor, slots: Slots) -> Tensor:
            own = frames[part]
            embedding = condition_on_memory(self.sam, prepared, features.rows_of(own), memory.bank, slots)
            asked = self._downsampled(self._odds(logits, total, objects[part])) if self.config.mask_prompt else None
            return self.sam.decode(
                features.at(own), ObjectPrompts(boxes=boxes[part], masks=asked), embedding=embedding
            ).masks

        sizes, training = self._object_sizes(), torch.is_grad_enabled()
        order, masks = [], []
        for bucket in buckets:
            memories = bucket.slots.maps.shape[1]
            count = chunk_size(self.compute.memory_mb, sizes.condition_on_memory(memories, training=training))
            for part in torch.arange(len(bucket.objects), device=objects.device).split(count):
                order.append(bucket.objects[part])
                masks.append(self.run(chunk, bucket.objects[part], bucket.slots.at(part)))
        placeholder = torch.cat(masks)
        return torch.empty_like(placeholder).index_copy(0, torch.cat(order), placeholder)

    def _output(
        self,
        masks: Tensor,
        objects: Tensor,
        size: Size,
        *,
        evidence: Tensor | None,
        asked: Tensor | None,
        step: int,
    ) -> Tensor:
        """Resize SAM 2's masks (q, 4s, 4s) to the class map and combine them by `config.output`: (q, H, W).

        Args:
            masks: SAM 2's masks.
            objects: (q, 2), which they are of.
            size: rows and columns of the class map.
            evidence: class map that they are added to; None: they replace it.
            asked: (q, H, W), mask prompts whose detail is kept.
            step: 1 or 2.
        """
        # a mask emptied by its object score gets the logit of an absent class
        large = upsample(torch.where(masks > NO_OBJ_SCORE, masks, ABSENT), size)
        if evidence is None:
            return large
        frames, classes = objects.unbind(1)
        match self.config.output:
            case "gated":
                assert self.gates is not None
                return evidence[frames, classes] + self.gates(large, classes, step)
            case "correct":
                return evidence[frames, classes] + large
            case "detail" if asked is not None:
                return large + asked - upsample(self._downsampled(asked), size)
            case _:
                return large

    def _total(self, logits: Tensor) -> Tensor | None:
        """Evidence for everything together in a class map; None: regions, which do not exclude each other."""
        return None if self.regions else total_evidence(logits)

    def _odds(self, logits: Tensor, total: Tensor | None, objects: Tensor) -> Tensor:
        """Logits (q, H, W) of objects in a class map, against all others if their `total` evidence is given."""
        frames, classes = objects.unbind(1)
        own = logits[frames, classes]
        return own if total is None else log_odds(own, total[frames])

    def _prompts(self, prompts: Prompts, objects: Tensor, size: Size) -> Tensor:
        """Boxes (q, 4) of objects in pixels of SAM 2's frames."""
        if self.sam.training:
            prompts = jittered(prompts, self.config.disturbance.box_jitter, size)
        frame = (self.config.frame_size, self.config.frame_size)
        return resized(prompts, size, frame).boxes[objects[:, 0], objects[:, 1]]

    def _downsampled(self, masks: Tensor) -> Tensor:
        side = 4 * self.sam.side
        return downsample(masks, (side, side))

    def _no_memory(self, features: FrameFeatures) -> Tensor:
        side = self.sam.side
        return features.embedding.new_zeros(0, self.sam.memory_channels, side, side)

    def _object_sizes(self) -> ObjectSizes:
        attention = self.sam.base.memory_attention
        return ObjectSizes(
            side=self.sam.side,
            channels=self.sam.channels,
            memory_channels=self.sam.memory_channels,
            memory_layers=attention.num_layers,
            memory_width=attention.layers[0].linear1.out_features,
        )

    def run(self, function: Callable[..., Any], *tensors: Any) -> Any:
        """Call a function of tensors; with gradients enabled, use activation checkpointing if configured."""
        if self.compute.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False, context_fn=_same_modes)
        return function(*tensors)


def _same_modes() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a checkpointed function and of its recomputation, in which torch forgets its function modes.

    The engine trains in bf16 on a CPU in such a mode (`engine.cpu_bf16.CpuBf16`).
    """
    modes = private(torch.overrides, "_get_current_function_mode_stack", package="torch")()

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as held:
            for mode in modes:
                held.enter_context(mode)
            yield

    return nullcontext(), again()
