"""RFMedSAM 2: a prompt generator (Step 0), SAM 2 on its prompts (Step 1), SAM 2 with memories of neighbors (Step 2).

Step 0 predicts class maps (or boxes). Step 1 decodes every object prompt (one class on one frame) from the current
frame only. Step 2 decodes it again with Step 1's memories of the neighboring frames, at their true distances. Since
these memories come from Step 1, Step 2 is one batched call over all objects, not a loop over time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from rfmedsam2.errors import PlanError, UsageError
from rfmedsam2.nn.adapters import ChannelAdapter
from rfmedsam2.nn.feature_cache import FeatureCache
from rfmedsam2.nn.loading import LoadReport
from rfmedsam2.nn.memory_budget import chunk_size, frame_bytes
from rfmedsam2.nn.prompt_generators import HierarchicalMasks, ObjectQueries, PointEmbeddings
from rfmedsam2.nn.refinement.object_sampling import DrawnObjects, all_objects, draw_objects
from rfmedsam2.nn.refinement.step_gates import StepGates
from rfmedsam2.nn.refinement_state import (
    ABSENT,
    RefinementInput,
    Size,
    StepOutputs,
    one_against_rest,
    prompts_of,
    relative_to_background,
    with_background,
)
from rfmedsam2.nn.refiner import Refiner
from rfmedsam2.nn.sam2.adapted import inject, remove
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.light_weights import load_light
from rfmedsam2.nn.sam2.model import Pyramid, Sam2
from rfmedsam2.nn.sam2.types import FrameFeatures
from rfmedsam2.nn.sam2.weights import load_sam2, memory_parameters, pretrained_parameters
from rfmedsam2.nn.unet import UNet
from rfmedsam2.prompts import Prompts
from rfmedsam2.records.model import LIGHT_BACKBONES, RFMedSam2Config
from rfmedsam2.records.plan import Compute, Sampling


class RFMedSam2(nn.Module):
    """The complete RFMedSAM 2 model.

    Args:
        config: configuration of the model.
        channels: M, number of input channels.
        outputs: number of channels of the logits: K classes and background, or K regions.
        regions: whether outputs are regions.
        compute: memory budget of SAM 2's chunks, and activation checkpointing.
        sampling: with gradients enabled, which object prompts are decoded; None: all.
        deep_supervision: whether Step 0's U-Net returns all its resolutions in training mode.
        cache: cache of a frozen image encoder's features; None: no cache.

    Attributes:
        classes: K.
        refiner: Steps 1 and 2.
    """

    def __init__(
        self,
        config: RFMedSam2Config,
        *,
        channels: int,
        outputs: int,
        regions: bool = False,
        compute: Compute | None = None,
        sampling: Sampling | None = None,
        deep_supervision: bool = False,
        cache: FeatureCache | None = None,
    ) -> None:
        super().__init__()
        self.config, self.outputs, self.regions, self.cache = config, outputs, regions, cache
        self.sampling = sampling or Sampling()
        self.classes = outputs if regions else outputs - 1
        if self.classes < 1:
            raise PlanError("The model has no foreground class", expected="at least one", found="none")
        self.channel_adapter = ChannelAdapter(channels, config.adapters.channel_hidden)
        base = build_base(
            config.backbone,
            frame_size=config.frame_size,
            fitted_windows=config.fitted_windows,
            object_scores=config.object_scores,
            encoder_size=config.encoder_size,
            memory_layers=config.memory_layers,
            memory_width=config.memory_width,
        )
        if config.output == "correct" and config.backbone == "nano":
            _silence(base)
        if config.freeze_backbone:
            for parameter in pretrained_parameters(base, config.backbone).values():
                parameter.requires_grad_(False)
        inject(base, config.adapters)
        # parameters without gradients must not get weight decay either
        if not config.gradients_in_encoder:
            self.channel_adapter.requires_grad_(False)
        if not config.encoder_learns:
            base.image_encoder.requires_grad_(False)
        if config.refinements == 1:
            for parameter in memory_parameters(base):
                parameter.requires_grad_(False)
        self.sam = Sam2(base, object_scores=config.object_scores)
        self.gates = StepGates(config.refinements, self.classes) if config.output == "gated" else None
        self.refiner = Refiner(self.sam, self.gates, config, regions=regions, compute=compute or Compute())
        self.unet = None
        if config.unet is not None:
            self.unet = UNet(config.unet, channels=channels, outputs=outputs, deep_supervision=deep_supervision)
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

    def load_backbone(self, weights: Mapping[str, Tensor], *, where: Path) -> LoadReport:
        """Load published weights of the backbone; adapters are newly initialized.

        Raises:
            CheckpointError: the weights are of another model.
        """
        remove(self.sam.base)
        load = load_light if self.config.backbone in LIGHT_BACKBONES else load_sam2
        report = load(self.sam.base, weights, where=where)
        inject(self.sam.base, self.config.adapters)
        return report

    # ---- the steps, over frames

    def prompt_volumes(self, volumes: Tensor) -> Tensor | list[Tensor]:
        """Step 0 of the U-Net: (B, M, D, H, W) -> logits (B, outputs, D, H, W), or with deep supervision a list."""
        assert self.unet is not None
        assert self.config.unet is not None
        if self.config.unet.dimensions == 3:
            return self.unet(volumes)
        frames = volumes.transpose(1, 2).flatten(0, 1)
        results = self.unet(frames)
        if isinstance(results, Tensor):
            return _as_volumes(results, len(volumes))
        return [_as_volumes(result, len(volumes)) for result in results]

    def encode(self, frames: Tensor) -> FrameFeatures:
        """(N, M, H, W) -> features; frames are resized to the encoder's size and encoded in chunks."""
        return self.sam.features(self._levels(frames, self.sam.pyramid))

    @torch.no_grad()
    def frozen_levels(self, frames: Tensor) -> tuple[Tensor, ...]:
        """What a frozen image encoder computes for frames (N, M, H, W), to be cached and given to `steps`."""
        return self._levels(frames, self.sam.frozen)

    def _levels(self, frames: Tensor, encode: Callable[[Tensor], Pyramid]) -> Pyramid:
        size = self.config.encoder_size or self.config.frame_size
        training = self.config.gradients_in_encoder and torch.is_grad_enabled()
        side = frames.shape[-1]
        each = frame_bytes(
            self.config.backbone,
            self.config.frame_size,
            side=side,
            training=training,
            encoder_size=self.config.encoder_size,
        )
        count = chunk_size(self.refiner.compute.memory_mb, each)
        resized = side != size and not self.sam.resizes_frames

        def chunk(part: Tensor) -> tuple[Tensor, ...]:
            part = self.channel_adapter(part)
            if resized:
                part = F.interpolate(part, (size, size), mode="bilinear", align_corners=False)
            return encode(part)

        def encoded(frames: Tensor) -> tuple[Tensor, ...]:
            levels = [self.refiner.run(chunk, part) for part in frames.split(count)]
            return tuple(torch.cat(level) for level in zip(*levels, strict=True))

        with torch.set_grad_enabled(training):
            fine, middle, embedding = encoded(frames) if self.cache is None else self.cache.levels(frames, encoded)
        return fine, middle, embedding

    def start_from_logits(self, logits: Tensor) -> RefinementInput:
        """Refinement input from Step 0's logits (N, outputs, H, W)."""
        if not self.config.propagate_loss:
            logits = logits.detach()
        base_logits = relative_to_background(logits.float(), regions=self.regions)
        masks = one_against_rest(logits.float(), regions=self.regions) if self.config.mask_prompt else None
        return RefinementInput(
            prompts=prompts_of(base_logits, regions=self.regions), base_logits=base_logits, masks=masks
        )

    def with_boxes(self, start: RefinementInput, boxes: Prompts) -> RefinementInput:
        """Refinement input with boxes from a person in place of its own prompts (`config.given_boxes`)."""
        if self.config.given_boxes == "composed":
            return replace(start, prompts=boxes)
        return replace(start, prompts=boxes, masks=None, given=True)

    def start_from_boxes(self, prompts: Prompts, size: Size, *, tokens: Tensor | None = None) -> RefinementInput:
        """Refinement input from boxes in pixels of frames of `size`, without mask prompts."""
        base_logits = prompts.boxes.new_full((*prompts.present.shape, *size), ABSENT)
        return RefinementInput(prompts=prompts, base_logits=base_logits, tokens=tokens)

    # ---- whole patches

    def steps(
        self,
        volumes: Tensor,
        boxes: Prompts | None = None,
        *,
        last: int | None = None,
        step0: Tensor | None = None,
        levels: tuple[Tensor, ...] | None = None,
    ) -> StepOutputs:
        """Run the steps on patches (B, M, D, H, W).

        Args:
            volumes: patches.
            boxes: of the B * D frames: for the generators gt and unet the boxes that are given; for generators of boxes
                the presence to decode by while training (what the reference holds), else their own.
            last: last step to run; None: all steps.
            step0: fixed class maps (B, K, D, H, W) instead of the U-Net's; None: the U-Net runs.
            levels: `frozen_levels` of the B * D frames, in any precision; None: they are encoded.
        """
        last = self.last_step if last is None else min(last, self.last_step)
        count, size = len(volumes), (volumes.shape[-2], volumes.shape[-1])
        logits: dict[int, Tensor | list[Tensor]] = {}
        frames = volumes.transpose(1, 2).flatten(0, 1)
        if self.config.generator == "unet":
            outputs = self.prompt_volumes(volumes) if step0 is None else self._with_background_channel(step0)
            logits[0] = outputs
            if last == 0:
                return StepOutputs(logits=logits)
            full = outputs if isinstance(outputs, Tensor) else outputs[0]
            start = self.start_from_logits(full.transpose(1, 2).flatten(0, 1))
            start = start if boxes is None else self.with_boxes(start, boxes)
            drawn = self._drawn(start, count)
            features = self._encoded(frames, drawn, levels)
        elif self.config.generator == "gt":
            start = self.start(None, size, boxes)
            drawn = self._drawn(start, count)
            features = self._encoded(frames, drawn, levels)
        else:
            features = self.encode(frames) if levels is None else self._features_of(levels)
            start = self.start(features, size, boxes)
            drawn = self._drawn(start, count)
            if self.config.generator == "hierarchical_masks":
                logits[0] = with_background(start.base_logits, count, regions=self.regions)
        first = self.refiner.first(features, start, drawn)
        logits[1] = with_background(first.logits, count, regions=self.regions)
        learned = len(drawn.learned)
        decoded = {1: first.decoded.first(learned)}
        if last > 1:
            memory = self.refiner.encode_memory(features, first, count)
            second = self.refiner.second(features, first.logits, memory, evidence=start.evidence, only=drawn.frames)
            logits[2] = with_background(second.logits, count, regions=self.regions)
            if second.decoded is not None:
                decoded[2] = second.decoded
        return StepOutputs(
            logits=logits,
            scores=first.scores[:learned],
            objects=drawn.learned,
            frames=drawn.frames,
            decoded=decoded,
            found=start.found,
            presence=start.presence,
        )

    def _with_background_channel(self, class_maps: Tensor) -> Tensor:
        return class_maps if self.regions else F.pad(class_maps, (0, 0, 0, 0, 0, 0, 1, 0))

    def _drawn(self, start: RefinementInput, volumes: int) -> DrawnObjects:
        present = start.prompts.present
        if not torch.is_grad_enabled():
            return all_objects(present)
        return draw_objects(present, volumes, sampling=self.sampling, config=self.config)

    def _features_of(self, levels: Sequence[Tensor], used: Tensor | None = None) -> FrameFeatures:
        """Features of cached levels, of the frames `used` (n,); None: of all."""
        fine, middle, embedding = (level if used is None else level[used] for level in levels)
        return self.sam.features_of((fine.float(), middle.float(), embedding.float()))

    def _encoded(self, frames: Tensor, drawn: DrawnObjects, levels: Sequence[Tensor] | None) -> FrameFeatures:
        """Features of the frames with objects to decode; of all if objects are not drawn in runs of frames."""
        objects = drawn.objects
        if not self.sampling.prompted_runs or not len(objects):
            return self.encode(frames) if levels is None else self._features_of(levels)
        used = objects[:, 0].unique()
        rows = torch.full((len(frames),), -1, device=used.device)
        rows[used] = torch.arange(len(used), device=used.device)
        features = self.encode(frames[used]) if levels is None else self._features_of(levels, used)
        return replace(features, rows=rows)

    def start(self, features: FrameFeatures | None, size: Size, boxes: Prompts | None) -> RefinementInput:
        """Refinement input without a U-Net: from given boxes, or from a generator on the frames' features."""
        match self.config.generator:
            case "gt":
                if boxes is None:
                    raise UsageError(
                        "This model needs boxes as prompts, and none were given",
                        expected="boxes from reference labels, or drawn by a user",
                        remedy="Give boxes: label maps of what to segment, or a list of boxes",
                    )
                return self.start_from_boxes(boxes, size)
            case "hierarchical_masks":
                assert self.generator is not None
                assert features is not None
                logits = self.refiner.run(self.generator, features)
                return self.start_from_logits(F.interpolate(logits.float(), size, mode="bilinear", align_corners=False))
            case _:
                assert features is not None
                return self._start_from_queries(features, size, boxes)

    def _start_from_queries(self, features: FrameFeatures, size: Size, teacher: Prompts | None) -> RefinementInput:
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

    def forward(self, volumes: Tensor, boxes: Prompts | None = None, *, step: int | None = None) -> Tensor:
        """(B, M, D, H, W) -> logits (B, outputs, D, H, W) of Step 0, 1 or 2; None: of the last step."""
        step = self.last_step if step is None else step
        results = self.steps(volumes, boxes, last=step).logits
        if step not in results:
            raise UsageError(
                "This model does not have this step",
                where=f"step {step}",
                expected=f"one of {', '.join(map(str, results))}",
            )
        found = results[step]
        return found if isinstance(found, Tensor) else found[0]


def _as_volumes(frames: Tensor, volumes: int) -> Tensor:
    """(B * D, C, H, W) -> (B, C, D, H, W)."""
    return frames.unflatten(0, (volumes, -1)).transpose(1, 2)


def _silence(base: SAM2Base) -> None:
    """Initialize a decoder trained from scratch to masks of zero, so that corrections start at zero."""
    last = base.sam_mask_decoder.get_parameter("output_hypernetworks_mlps.0.layers.2.weight")
    nn.init.zeros_(last)
    nn.init.zeros_(base.sam_mask_decoder.get_parameter("output_hypernetworks_mlps.0.layers.2.bias"))
