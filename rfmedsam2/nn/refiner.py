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

from rfmedsam2.nn.disturbance import jittered
from rfmedsam2.nn.memory_budget import ObjectSizes, chunk_size
from rfmedsam2.nn.refinement_state import (
    ABSENT,
    Memory,
    RefinementInput,
    Size,
    Step1Output,
    downsample,
    prompts_of,
    scatter_masks,
    size_of,
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
        config: configuration of the whole model.
        regions: whether classes overlap.
        compute: memory budget of SAM 2's chunks, and activation checkpointing.
        max_objects: with gradients enabled, maximum number of object prompts decoded per batch, drawn at random; None:
            all.
    """

    def __init__(
        self, sam: Sam2, config: RFMedSam2Config, *, regions: bool, compute: Compute, max_objects: int | None
    ) -> None:
        self.sam, self.config, self.regions = sam, config, regions
        self.compute, self.max_objects = compute, max_objects

    def first(self, features: FrameFeatures, start: RefinementInput) -> Step1Output:
        """Step 1: decode every object prompt of N frames."""
        objects = self._sampled(start.prompts.present.nonzero())
        size = size_of(start.base_logits)
        prompts = self._prompts(start.prompts, objects, size)

        def chunk(part: Tensor, boxes: Tensor | None) -> tuple[Tensor, ...]:
            frames, classes = part.unbind(1)
            given = ObjectPrompts(
                boxes=boxes,
                masks=None if start.masks is None else self._downsampled(start.masks[frames, classes]),
                tokens=None if start.tokens is None else start.tokens[frames, classes],
            )
            decoded = self.sam.decode(features.at(frames), given)
            return decoded.masks, decoded.pointers, decoded.scores

        count = chunk_size(self.compute.memory_mb, self._object_sizes().decode(training=torch.is_grad_enabled()))
        masks, pointers, scores = self._in_chunks(chunk, objects, prompts, count)
        values = self._output(masks, start.base_logits, start.masks, objects)
        logits = scatter_masks(start.base_logits, objects, values)
        return Step1Output(logits=logits, objects=objects, masks=masks, pointers=pointers, scores=scores)

    def encode_memory(self, features: FrameFeatures, first: Step1Output, volumes: int) -> Memory:
        """Memories of the masks decoded in Step 1; the N frames are D consecutive ones of each of `volumes`."""

        def chunk(frames: Tensor, masks: Tensor, scores: Tensor) -> Tensor:
            return self.sam.encode_memory(features.embedding[frames], masks, scores)

        count = chunk_size(self.compute.memory_mb, self._object_sizes().encode_memory(training=torch.is_grad_enabled()))
        parts = zip(first.objects[:, 0].split(count), first.masks.split(count), first.scores.split(count), strict=True)
        maps = [self.run(chunk, *part) for part in parts] if len(first.objects) else [self._no_memory(features)]
        rows = torch.full(first.logits.shape[:2], -1, dtype=torch.long, device=first.objects.device)
        rows[first.objects[:, 0], first.objects[:, 1]] = torch.arange(len(first.objects), device=rows.device)
        rows = rows.unflatten(0, (volumes, -1)).transpose(0, 1)
        return Memory(bank=MemoryBank(maps=torch.cat(maps), pointers=first.pointers), rows=rows)

    def second(self, features: FrameFeatures, logits: Tensor, memory: Memory, *, at: Tensor | None = None) -> Tensor:
        """Step 2: decode the objects in Step 1's class map again, with memories.

        Args:
            features: features of N = B * n frames.
            logits: (N, K, H, W) class map of Step 1 on the same frames.
            memory: memories of a window of frames that contains these.
            at: (n,) long, indices of the n frames of each volume in that window; None: all frames of it, in order.

        Returns:
            (N, K, H, W) class map.
        """
        prompts = prompts_of(logits, regions=self.regions)
        at = torch.arange(len(memory.rows), device=logits.device) if at is None else at
        rows = memory.rows[at].transpose(0, 1).flatten(0, 1)
        objects = (prompts.present & (rows >= 0)).nonzero()
        if not len(objects):
            return logits
        boxes = self._prompts(prompts, objects, size_of(logits))
        values = self._with_memory(features, logits, memory, objects=objects, boxes=boxes, at=at)
        asked = logits if self.config.mask_prompt else None
        return scatter_masks(logits, objects, self._output(values, logits, asked, objects))

    def _with_memory(
        self,
        features: FrameFeatures,
        logits: Tensor,
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
            embedding = condition_on_memory(self.sam, prepared, own, memory.bank, slots)
            asked = self._downsampled(logits[own, kinds[part]]) if self.config.mask_prompt else None
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

    def _output(self, masks: Tensor, base: Tensor, asked: Tensor | None, objects: Tensor) -> Tensor:
        """Resize SAM 2's masks (q, 4s, 4s) to the class map and combine them by `config.output`: (q, H, W)."""
        size = size_of(base)
        # a mask emptied by its object score gets the logit of an absent class
        large = upsample(torch.where(masks > NO_OBJ_SCORE, masks, ABSENT), size)
        frames, classes = objects.unbind(1)
        match self.config.output:
            case "correct":
                return base[frames, classes] + large
            case "detail" if asked is not None:
                prompt = asked[frames, classes]
                return large + prompt - upsample(self._downsampled(prompt), size)
            case _:
                return large

    def _sampled(self, objects: Tensor) -> Tensor:
        """Sample at most `max_objects`: an untrained prompt generator predicts every class on every frame."""
        most = self.max_objects
        if most is None or len(objects) <= most or not torch.is_grad_enabled():
            return objects
        return objects[torch.randperm(len(objects), device=objects.device)[:most].sort().values]

    def _prompts(self, prompts: Prompts, objects: Tensor, size: Size) -> Tensor:
        """Boxes (q, 4) of objects in pixels of SAM 2's frames."""
        if self.sam.training:
            prompts = jittered(prompts, self.config.disturbance.box_jitter, size)
        frame = (self.config.frame_size, self.config.frame_size)
        return resized(prompts, size, frame).boxes[objects[:, 0], objects[:, 1]]

    def _downsampled(self, masks: Tensor) -> Tensor:
        side = 4 * self.sam.side
        return downsample(masks, (side, side))

    def _in_chunks(
        self, chunk: Callable[..., tuple[Tensor, ...]], objects: Tensor, boxes: Tensor, count: int
    ) -> list[Tensor]:
        """Run a function of objects in chunks and concatenate its results."""
        if not len(objects):
            sam = self.sam
            return [
                boxes.new_zeros(0, 4 * sam.side, 4 * sam.side),
                boxes.new_zeros(0, sam.channels),
                boxes.new_zeros(0),
            ]
        parts = [self.run(chunk, *part) for part in zip(objects.split(count), boxes.split(count), strict=True)]
        return [torch.cat(results) for results in zip(*parts, strict=True)]

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

    The engine computes small maps in float32 by such a mode (`engine.runtime.SmallMapsInFp32`).
    """
    modes = private(torch.overrides, "_get_current_function_mode_stack", package="torch")()

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as held:
            for mode in modes:
                held.enter_context(mode)
            yield

    return nullcontext(), again()
