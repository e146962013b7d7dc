"""RFMedSAM 2 (seed 004): prompts from a generator, SAM 2 on them, SAM 2 again with memories at their true distances.

Step 0 predicts class maps (or boxes), Step 1 decodes every prompted cell (one class on one frame) from the current frame
alone, Step 2 decodes it again with the memories that Step 1 left on the neighbouring frames. Since those come from
Step 1, Step 2 is one batched call over all cells and not a loop in time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rfmedsam2.errors import PlanError, UsageError
from rfmedsam2.nn.adapters import ChannelAdapter
from rfmedsam2.nn.cell_memory import CellSizes, at_once, frame_bytes
from rfmedsam2.nn.generators import HierarchicalMasks, ObjectQueries, PointEmbeddings
from rfmedsam2.nn.sam2.adapted import inject
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.frozen import pretrained_parameters
from rfmedsam2.nn.sam2.parts import CellPrompts, FrameFeatures, MemoryBank
from rfmedsam2.nn.sam2.recall import prepare_frames, recall
from rfmedsam2.nn.sam2.sam2 import Sam2
from rfmedsam2.nn.sam2.selection import select
from rfmedsam2.nn.steps import (
    ABSENT,
    FirstStep,
    Memory,
    Start,
    enlarged,
    one_against_rest,
    placed,
    prompts_of,
    reduced,
    relative_to_background,
    with_background,
)
from rfmedsam2.nn.unet import UNet
from rfmedsam2.prompts import Prompts, resized
from rfmedsam2.records.model import RFMedSam2Config

Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What all steps of patches give.

    Attributes:
        logits: step -> (B, outputs, D, H, W); Step 0 is missing for generators without masks, and a list with deep
            supervision.
        scores: (q,) object score logits of Step 1, and
        cells: (q, 2) the (frame, class) that they are of.
        found: (N, K, 4) boxes that a generator found, xyxy in [0, 1] of the frame; None for others.
        presence: (N, K) logits that go with them.
    """

    logits: dict[int, Tensor | list[Tensor]]
    scores: Tensor | None = None
    cells: Tensor | None = None
    found: Tensor | None = None
    presence: Tensor | None = None


class RFMedSam2(nn.Module):
    """The whole model.

    Args:
        config: its record.
        channels: M, input channels.
        outputs: channels of the logits: K classes and background, or K regions.
        regions: which of the two.

    Attributes:
        classes: K.
        step: whose logits `forward` gives: 0, 1, 2, or None for the last.
        memory_mb: working memory for what SAM 2 treats at once.
        checkpointing: compute activations of SAM 2 again in the backward pass.
    """

    def __init__(self, config: RFMedSam2Config, *, channels: int, outputs: int, regions: bool = False) -> None:
        super().__init__()
        self.config, self.outputs, self.regions = config, outputs, regions
        self.classes = outputs if regions else outputs - 1
        if self.classes < 1:
            raise PlanError("There is no class to segment", expected="at least one foreground class", found="none")
        self.step: int | None = None
        self.memory_mb = 2048
        self.checkpointing = True
        self.channel_adapter = ChannelAdapter(channels, config.adapters.channel_hidden)
        base = build_base(config.backbone, frame_size=config.frame_size, fitted_windows=config.fitted_windows)
        if config.output == "correct" and config.backbone == "nano":
            _silence(base)
        if config.freeze_backbone:
            for parameter in pretrained_parameters(base, config.backbone).values():
                parameter.requires_grad_(False)
        inject(base, config.adapters)
        self.sam = Sam2(base, object_scores=config.object_scores)
        self.unet = None if config.unet is None else UNet(config.unet, channels=channels, outputs=outputs)
        self.generator = self._generator()

    def _generator(self) -> nn.Module | None:
        sam = self.sam
        match self.config.generator:
            case "object_queries" | "scored_object_queries":
                return ObjectQueries(self.classes, sam.channels, sam.side)
            case "point_embeddings":
                return PointEmbeddings(self.classes, sam.channels, sam.side)
            case "hierarchical_masks":
                return HierarchicalMasks(self.outputs, sam.channels)
            case _:
                return None

    @property
    def last_step(self) -> int:
        """Number of the last step."""
        return self.config.refinements

    @property
    def deep_supervision(self) -> bool:
        """Whether Step 0's U-Net gives all its resolutions."""
        return self.unet is not None and self.unet.deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, wanted: bool) -> None:
        if self.unet is not None:
            self.unet.deep_supervision = wanted

    @property
    def encoder_learns(self) -> bool:
        """Whether gradients are needed through the image encoder."""
        return self.config.adapters.encoder or not self.config.freeze_backbone

    # ---- the steps, over frames

    def prompt_volumes(self, volumes: Tensor) -> Tensor | list[Tensor]:
        """Step 0 of the U-Net: (B, M, D, H, W) -> logits (B, outputs, D, H, W), or with deep supervision a list."""
        assert self.unet is not None and self.config.unet is not None
        if self.config.unet.dimensions == 3:
            return self.unet(volumes)
        frames = volumes.transpose(1, 2).flatten(0, 1)
        results = self.unet(frames)
        if isinstance(results, Tensor):
            return _as_volumes(results, len(volumes))
        return [_as_volumes(result, len(volumes)) for result in results]

    def encode(self, frames: Tensor) -> FrameFeatures:
        """(N, M, H, W) -> features; frames are resized to the frame size and encoded in chunks."""
        size = self.config.frame_size
        training = self.encoder_learns and torch.is_grad_enabled()
        count = at_once(self.memory_mb, frame_bytes(self.config.backbone, size, training=training))

        def chunk(part: Tensor) -> tuple[Tensor, ...]:
            part = self.channel_adapter(part)
            if tuple(part.shape[-2:]) != (size, size):
                part = F.interpolate(part, (size, size), mode="bilinear", align_corners=False)
            return self.sam.pyramid(part)

        with torch.set_grad_enabled(training):
            levels = [self._run(chunk, part) for part in frames.split(count)]
        return self.sam.features(tuple(torch.cat(level) for level in zip(*levels, strict=True)))

    def start_from_logits(self, logits: Tensor) -> Start:
        """Begin with Step 0's logits (N, outputs, H, W)."""
        evidence = relative_to_background(logits.float(), regions=self.regions)
        masks = one_against_rest(logits.float(), regions=self.regions) if self.config.mask_prompt else None
        return Start(prompts=prompts_of(evidence, regions=self.regions), evidence=evidence, masks=masks)

    def start_from_boxes(self, prompts: Prompts, size: Size, *, tokens: Tensor | None = None) -> Start:
        """Begin with boxes in pixels of frames of `size`: nothing else is known of the masks."""
        evidence = prompts.boxes.new_full((*prompts.present.shape, *size), ABSENT)
        return Start(prompts=prompts, evidence=evidence, tokens=tokens)

    def first(self, features: FrameFeatures, start: Start) -> FirstStep:
        """Step 1: decode every prompted cell of N frames."""
        cells = start.prompts.present.nonzero()
        size = _size(start.evidence)
        prompts = self._prompts(start.prompts, cells, size)

        def chunk(part: Tensor, boxes: Tensor | None) -> tuple[Tensor, ...]:
            frames, classes = part.unbind(1)
            given = CellPrompts(
                boxes=boxes,
                masks=None if start.masks is None else self._reduced(start.masks[frames, classes]),
                tokens=None if start.tokens is None else start.tokens[frames, classes],
            )
            decoded = self.sam.decode(features.at(frames), given)
            return decoded.masks, decoded.pointers, decoded.scores

        count = at_once(self.memory_mb, self._cell_sizes().decode())
        masks, pointers, scores = self._cells(chunk, cells, prompts, count)
        values = self._output(masks, start.evidence, start.masks, cells)
        logits = placed(start.evidence, cells, values)
        return FirstStep(logits=logits, cells=cells, masks=masks, pointers=pointers, scores=scores)

    def remember(self, features: FrameFeatures, first: FirstStep, volumes: int) -> Memory:
        """Memories of what Step 1 decoded (M1.8); the N frames are D of each of `volumes`."""

        def chunk(frames: Tensor, masks: Tensor, scores: Tensor) -> Tensor:
            return self.sam.remember(features.embedding[frames], masks, scores)

        count = at_once(self.memory_mb, self._cell_sizes().remember())
        parts = zip(first.cells[:, 0].split(count), first.masks.split(count), first.scores.split(count), strict=True)
        maps = [self._run(chunk, *part) for part in parts] if len(first.cells) else [self._no_memory(features)]
        rows = torch.full(first.logits.shape[:2], -1, dtype=torch.long, device=first.cells.device)
        rows[first.cells[:, 0], first.cells[:, 1]] = torch.arange(len(first.cells), device=rows.device)
        rows = rows.unflatten(0, (volumes, -1)).transpose(0, 1)
        return Memory(bank=MemoryBank(maps=torch.cat(maps), pointers=first.pointers), rows=rows)

    def second(self, features: FrameFeatures, logits: Tensor, memory: Memory, *, first_frame: int = 0) -> Tensor:
        """Step 2: decode again, with memories, what Step 1's class map predicts.

        Args:
            features: of N = B * n frames.
            logits: (N, K, H, W) class map of Step 1 on the same frames.
            memory: of a window of frames that these n of each volume begin in at `first_frame`.

        Returns:
            (N, K, H, W) class map.
        """
        prompts = prompts_of(logits, regions=self.regions)
        volumes = memory.rows.shape[1]
        each = len(logits) // volumes
        rows = memory.rows[first_frame : first_frame + each].transpose(0, 1).flatten(0, 1)
        cells = (prompts.present & (rows >= 0)).nonzero()
        if not len(cells):
            return logits
        boxes = self._prompts(prompts, cells, _size(logits))
        values = self._recalled(features, logits, memory, cells=cells, boxes=boxes, first_frame=first_frame)
        asked = logits if self.config.mask_prompt else None
        return placed(logits, cells, self._output(values, logits, asked, cells))

    def _recalled(
        self,
        features: FrameFeatures,
        logits: Tensor,
        memory: Memory,
        *,
        cells: Tensor,
        boxes: Tensor,
        first_frame: int,
    ) -> Tensor:
        """Masks (q, 4s, 4s) of cells with memories."""
        volumes, classes = memory.rows.shape[1:]
        each = len(logits) // volumes
        frames, kinds = cells.unbind(1)
        places = torch.stack([first_frame + frames % each, frames // each * classes + kinds], 1)
        buckets = select(self.config.strategy, memory.rows.flatten(1), places, reach=self.config.memory_frames)
        prepared = self._run(lambda embedding: prepare_frames(self.sam, embedding), features.embedding)

        def chunk(part: Tensor, slots: Any) -> Tensor:
            at = frames[part]
            embedding = recall(self.sam, prepared, at, memory.bank, slots)
            asked = self._reduced(logits[at, kinds[part]]) if self.config.mask_prompt else None
            return self.sam.decode(
                features.at(at), CellPrompts(boxes=boxes[part], masks=asked), embedding=embedding
            ).masks

        sizes, training = self._cell_sizes(), torch.is_grad_enabled()
        order, masks = [], []
        for bucket in buckets:
            memories = bucket.slots.maps.shape[1]
            count = at_once(self.memory_mb, sizes.recall(memories, training=training))
            for part in torch.arange(len(bucket.cells), device=cells.device).split(count):
                order.append(bucket.cells[part])
                masks.append(self._run(chunk, bucket.cells[part], bucket.slots.at(part)))
        placeholder = torch.cat(masks)
        return torch.empty_like(placeholder).index_copy(0, torch.cat(order), placeholder)

    # ---- whole patches

    def steps(self, volumes: Tensor, boxes: Prompts | None = None) -> Steps:
        """All steps of patches (B, M, D, H, W).

        Args:
            volumes: patches.
            boxes: of the B * D frames, for the generator gt; for generators of boxes the presence to decode by while
                training (what the reference holds), else their own.
        """
        count, size = len(volumes), (volumes.shape[-2], volumes.shape[-1])
        logits: dict[int, Tensor | list[Tensor]] = {}
        if self.config.generator == "unet":
            outputs = logits[0] = self.prompt_volumes(volumes)
            if self.step == 0 and not self.training:
                return Steps(logits=logits)
            full = outputs if isinstance(outputs, Tensor) else outputs[0]
            start = self.start_from_logits(full.transpose(1, 2).flatten(0, 1))
        features = self.encode(volumes.transpose(1, 2).flatten(0, 1))
        if self.config.generator != "unet":
            start = self.start(features, size, boxes)
            if self.config.generator == "hierarchical_masks":
                logits[0] = with_background(start.evidence, count, regions=self.regions)
        first = self.first(features, start)
        logits[1] = with_background(first.logits, count, regions=self.regions)
        if self.last_step > 1 and (self.training or self.step != 1):
            memory = self.remember(features, first, count)
            second = self.second(features, first.logits, memory)
            logits[2] = with_background(second, count, regions=self.regions)
        return Steps(
            logits=logits, scores=first.scores, cells=first.cells, found=start.found, presence=start.presence
        )

    def start(self, features: FrameFeatures, size: Size, boxes: Prompts | None) -> Start:
        """Begin without a U-Net: with given boxes, or with what a generator makes of the frames' features."""
        match self.config.generator:
            case "gt":
                if boxes is None:
                    raise UsageError(
                        "This model is prompted with boxes, and none were given",
                        expected="boxes of reference labels, or a person's",
                        remedy="Give them with rfmed_predict --boxes (a folder of label maps, or a JSON of boxes)",
                    )
                return self.start_from_boxes(boxes, size)
            case "hierarchical_masks":
                assert self.generator is not None
                logits = self._run(self.generator, features)
                return self.start_from_logits(F.interpolate(logits.float(), size, mode="bilinear", align_corners=False))
            case _:
                return self._start_from_queries(features, size, boxes)

    def _start_from_queries(self, features: FrameFeatures, size: Size, teacher: Prompts | None) -> Start:
        assert self.generator is not None
        found, presence = self.generator(features)
        present = presence.detach() > 0 if teacher is None else teacher.present
        if self.config.generator == "point_embeddings":
            empty = found.new_zeros((*present.shape, 4))
            start = self.start_from_boxes(Prompts(boxes=empty, present=present), size, tokens=found)
            return replace(start, presence=presence)
        scale = found.new_tensor([size[1], size[0], size[1], size[0]]) - 1
        start = self.start_from_boxes(Prompts(boxes=found.float() * scale, present=present), size)
        return replace(start, found=found, presence=presence)

    def forward(self, volumes: Tensor, boxes: Prompts | None = None) -> Tensor:
        """(B, M, D, H, W) -> logits (B, outputs, D, H, W) of `step`."""
        results = self.steps(volumes, boxes).logits
        step = self.last_step if self.step is None else self.step
        if step not in results:
            raise UsageError(
                "This model has no such step",
                where=f"step {step}",
                expected=f"one of {', '.join(map(str, results))}",
            )
        found = results[step]
        return found if isinstance(found, Tensor) else found[0]

    # ---- parts

    def _output(self, masks: Tensor, base: Tensor, asked: Tensor | None, cells: Tensor) -> Tensor:
        """Put SAM 2's masks (q, 4s, 4s) at the size of the class map, by `config.output`: (q, H, W)."""
        size = _size(base)
        # where object scores empty a mask, it becomes as unlikely as a class that nothing speaks for
        large = enlarged(torch.where(masks > NO_OBJ_SCORE, masks, ABSENT), size)
        frames, classes = cells.unbind(1)
        match self.config.output:
            case "correct":
                return base[frames, classes] + large
            case "detail" if asked is not None:
                prompt = asked[frames, classes]
                return large + prompt - enlarged(self._reduced(prompt), size)
            case _:
                return large

    def _prompts(self, prompts: Prompts, cells: Tensor, size: Size) -> Tensor:
        """Boxes (q, 4) of cells in pixels of SAM 2's frames."""
        frame = (self.config.frame_size, self.config.frame_size)
        return resized(prompts, size, frame).boxes[cells[:, 0], cells[:, 1]]

    def _reduced(self, masks: Tensor) -> Tensor:
        side = 4 * self.sam.side
        return reduced(masks, (side, side))

    def _cells(self, chunk: Callable[..., tuple[Tensor, ...]], cells: Tensor, boxes: Tensor, count: int) -> list[Tensor]:
        """Run a function of cells in chunks and join what it gives."""
        if not len(cells):
            sam = self.sam
            return [boxes.new_zeros(0, 4 * sam.side, 4 * sam.side), boxes.new_zeros(0, sam.channels), boxes.new_zeros(0)]
        parts = [self._run(chunk, *part) for part in zip(cells.split(count), boxes.split(count), strict=True)]
        return [torch.cat(results) for results in zip(*parts, strict=True)]

    def _no_memory(self, features: FrameFeatures) -> Tensor:
        side = self.sam.side
        return features.embedding.new_zeros(0, self.sam.memory_channels, side, side)

    def _cell_sizes(self) -> CellSizes:
        attention = self.sam.base.memory_attention
        return CellSizes(
            side=self.sam.side,
            channels=self.sam.channels,
            memory_channels=self.sam.memory_channels,
            memory_layers=attention.num_layers,
            memory_width=attention.layers[0].linear1.out_features,
        )

    def _run(self, function: Callable[..., Any], *tensors: Any) -> Any:
        """Call a function of tensors; where gradients are wanted, keep only what goes in."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
        return function(*tensors)


def _size(maps: Tensor) -> Size:
    return maps.shape[-2], maps.shape[-1]


def _as_volumes(frames: Tensor, volumes: int) -> Tensor:
    """(B * D, C, H, W) -> (B, C, D, H, W)."""
    return frames.unflatten(0, (volumes, -1)).transpose(1, 2)


def _silence(base: SAM2Base) -> None:
    """Let a decoder that is trained from scratch begin with masks of zero, so that corrections start at none."""
    last = base.sam_mask_decoder.output_hypernetworks_mlps[0].layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
