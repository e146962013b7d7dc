"""Estimate of the memory of one training step from the plan, without building the network.

Used for planning and to warn before a training runs out of memory. The terms count what a step stores for its backward
pass. The U-Net's term follows nnU-Net's measure, the others count the tensors of RFMedSAM 2's steps with every class
present on every slice. Compared with the peaks of five steps in float32 on the CPU (nano and tiny, 0.9 to 4 GiB, with
and without checkpointing) they were between 14 % too low and 40 % too high; nothing has been measured on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from typing_extensions import assert_never

from rfmedsam2.nn.memory_budget import ObjectSizes, frame_bytes
from rfmedsam2.nn.sam2.sizes import sizes_of
from rfmedsam2.pipeline.planning.topology import feature_map_size
from rfmedsam2.records.model import (
    PRIMUS_SIZES,
    CustomConfig,
    LibraryConfig,
    LibraryNetwork,
    PrimusConfig,
    RFMedSam2Config,
    SegResNetConfig,
    SwinUNETRConfig,
    UNetConfig,
)
from rfmedsam2.records.plan import Stage

FLOAT = 4
FEATURE_BYTES = {False: 12.5, True: 7.1}
"""Bytes per value of the U-Net's feature maps, float32 and 16 bit: a float32 step of nnU-Net on 32x256x256 (6989 MiB,
587 million values), and nnU-Net's 560 million values for 8 GB at batch 2. Includes gradients and workspaces."""
CLASS_MAP_FACTOR = 8
"""Full-size maps per class and step: upsampled masks, class map, softmax, cross-entropy, Dice, their gradients."""
PYRAMID_FACTOR = 25
"""Stored features per frame, in tensors of (C, s, s): three levels at 1, 4 and 16 times the positions and their
reduced copies."""
BACKWARD = 2
"""Memory of a chunk's backward pass relative to its activations: the activations and as much in gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTerm:
    """One part of the estimate."""

    name: str
    gib: float
    rule: str
    """How the term is computed, as text."""


def activation_terms(stage: Stage, *, outputs: int, classes: int, half: bool) -> tuple[MemoryTerm, ...]:
    """Terms of the activations that one training step stores.

    Args:
        stage: stage of a plan.
        outputs: number of channels of the logits.
        classes: K, number of foreground classes or regions.
        half: whether activations have 16 bit (mixed precision).
    """
    match stage.model:
        case UNetConfig():
            return (_unet_term(stage.model, stage, outputs=outputs, half=half),)
        case RFMedSam2Config():
            terms = _refinement_terms(stage.model, stage, classes=classes, half=half)
            if stage.model.unet is None:
                return terms
            return (_unet_term(stage.model.unet, stage, outputs=outputs, half=half), *terms)
        case LibraryConfig():
            return (_library_term(stage.model, stage, half=half),)
        case CustomConfig():
            return ()  # only its own package knows
        case _:
            assert_never(stage.model)


def weight_terms(stage: Stage, *, parameters: int, trained: int, half: bool) -> tuple[MemoryTerm, ...]:
    """Terms of weights, gradients and optimizer state."""
    kept = stage.train.optimizer.moments
    state = FLOAT * trained * (1 + kept)
    copies = parameters * FLOAT // 2 if half else 0
    return (
        _term("weights", parameters * FLOAT + copies, "4 bytes per parameter, and 2 for mixed precision's copies"),
        _term("gradients and optimizer", state, f"{1 + kept} x 4 bytes per trained parameter"),
    )


def total_gib(terms: tuple[MemoryTerm, ...]) -> float:
    """Sum of the terms in GiB."""
    return sum(term.gib for term in terms)


def _unet_term(network: UNetConfig, stage: Stage, *, outputs: int, half: bool) -> MemoryTerm:
    patch, samples = stage.patch_size, stage.batch_size
    if len(patch) > network.dimensions:  # a 2D network on single slices
        patch, samples = patch[1:], samples * patch[0]
    values = feature_map_size(network, patch, outputs=outputs) * samples
    rule = f"{values / 1e6:.0f} million values of feature maps x {FEATURE_BYTES[half]} bytes"
    return _term("U-Net", values * FEATURE_BYTES[half], rule)


def _library_term(network: LibraryNetwork, stage: Stage, *, half: bool) -> MemoryTerm:
    """Tensors kept for the backward pass, counted in float32 and bfloat16 on patches of 64 x 64 x 64 voxels."""
    match network:
        case SegResNetConfig():
            # coarser stages have a quarter of the positions in 2D, an eighth in 3D
            each = (47 if half else 95) if network.dimensions == 2 else (32 if half else 63)
            size = each * network.features
        case SwinUNETRConfig():
            # attention over windows, in float32 in any case, has no share of the width
            size = 3445 + 42 * network.features if half else 2310 + 83 * network.features
        case PrimusConfig():
            width, layers, _ = PRIMUS_SIZES[network.size]
            size = 35 + 0.124 * width * layers if half else 59 + 0.207 * width * layers
        case _:
            assert_never(network)
    voxels = stage.batch_size * math.prod(stage.patch_size)
    return _term(network.kind, voxels * size, f"{voxels / 1e6:.2f} million voxels x {size:.0f} bytes")


def _refinement_terms(model: RFMedSam2Config, stage: Stage, *, classes: int, half: bool) -> tuple[MemoryTerm, ...]:
    frames, pixels = stage.batch_size * stage.patch_size[0], math.prod(stage.patch_size[1:])
    side = model.frame_size // 16
    every = frames * classes
    objects = min(every, stage.sampling.max_prompted_objects or every)
    sizes = sizes_of(model.backbone)
    value = FLOAT / 2 if half else FLOAT
    maps = every * pixels * FLOAT * CLASS_MAP_FACTOR * model.refinements
    features = frames * PYRAMID_FACTOR * sizes.channels * side**2 * value
    memories = objects * (sizes.memory_channels * side**2 + sizes.channels + 6 * 16 * side**2) * FLOAT
    return (
        _term("class maps and losses", maps, f"{every} (slice, class) pairs x {CLASS_MAP_FACTOR} maps per step"),
        _term("features of slices", features, f"{frames} slices x three levels"),
        _term("masks and memories of objects", memories, f"{objects} object prompts"),
        _working_term(model, stage, frames=frames, objects=objects, half=half),
    )


def _working_term(model: RFMedSam2Config, stage: Stage, *, frames: int, objects: int, half: bool) -> MemoryTerm:
    """SAM 2's activations: those of one chunk with checkpointing, else all."""
    sizes = sizes_of(model.backbone, memory_layers=model.memory_layers, memory_width=model.memory_width)
    share = 0.5 if half else 1.0
    sizing = ObjectSizes(
        side=model.frame_size // 16,
        channels=sizes.channels,
        memory_channels=sizes.memory_channels,
        memory_layers=sizes.memory_layers,
        memory_width=sizes.memory_width,
    )
    sees = model.memory_frames * (2 if model.strategy == "both" else 1) + 1
    learns = model.gradients_in_encoder
    frame = frame_bytes(
        model.backbone,
        model.frame_size,
        side=stage.patch_size[-1],
        training=learns,
        encoder_size=model.encoder_size,
    )
    parts = [(frames if learns else 0, frame), (objects, sizing.decode())]
    if model.refinements > 1:
        parts += [(objects, sizing.encode_memory()), (objects, sizing.condition_on_memory(sees, training=True))]
    if stage.compute.checkpointing:
        budget = stage.compute.memory_mb * 1e6
        chunk = max(frame, *(max(each, min(budget, count * each)) for count, each in parts))
        return _term("SAM 2's activations", chunk * BACKWARD * share, "the largest chunk (compute.memory_mb), twice")
    everything = sum(count * each for count, each in parts)
    rule = f"{frames} slices, {objects} object prompts, no recomputation"
    return _term("SAM 2's activations", everything * share, rule)


def _term(name: str, amount: float, rule: str) -> MemoryTerm:
    return MemoryTerm(name=name, gib=amount / 2**30, rule=rule)
