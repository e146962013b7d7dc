"""Estimates of working memory against counted bytes, of every part of SAM 2 that works in chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from support.live_storage import LiveStorage, kept_by_autograd
from torch import Tensor

from rfmedsam2.choices import Backbone
from rfmedsam2.nn.memory_budget import ObjectSizes, chunk_size, frame_bytes
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.sam2.memory_attention import condition_on_memory, prepare_frames
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import FrameFeatures, MemoryBank, ObjectPrompts, Slots
from rfmedsam2.records.model import AdapterConfig, RFMedSam2Config

LEAST, MOST = 0.7, 2.0
"""Estimate over count."""
NETWORKS: list[tuple[Backbone, int, bool]] = [
    ("nano", 64, False),
    ("nano", 128, False),
    ("nano", 256, False),
    ("nano", 64, True),
    ("nano", 256, True),
    ("sam2_tiny", 64, True),
    ("sam2_tiny", 128, True),
    ("sam2_tiny", 256, True),
    ("sam2_tiny", 128, False),
]
OBJECTS, MEMORIES = 4, 7
Part = Callable[[], Tensor]


@cache
def sam_of(backbone: Backbone, size: int, adapted: bool) -> Sam2:
    adapters = AdapterConfig() if adapted else AdapterConfig(blocks="none", convolutions="none")
    fields = {"generator": "gt", "unet": None, "freeze_backbone": False, "adapters": adapters}
    config = RFMedSam2Config(backbone=backbone, frame_size=size, **fields)
    return RFMedSam2(config, channels=1, outputs=2).train().sam


def sizes_of(sam: Sam2) -> ObjectSizes:
    attention = sam.base.memory_attention
    first = attention.layers[0]
    return ObjectSizes(
        side=sam.side,
        channels=sam.channels,
        memory_channels=sam.memory_channels,
        memory_layers=attention.num_layers,
        memory_width=first.linear1.out_features,
    )


def features_of(sam: Sam2, frames: int) -> FrameFeatures:
    c, s = sam.channels, sam.side
    return FrameFeatures(
        embedding=torch.randn(frames, c, s, s, requires_grad=True),
        middle=torch.randn(frames, c // 4, 2 * s, 2 * s, requires_grad=True),
        fine=torch.randn(frames, c // 8, 4 * s, 4 * s, requires_grad=True),
    )


def decoding(sam: Sam2) -> Part:
    features, frames = features_of(sam, 2), torch.arange(OBJECTS) % 2
    masks = torch.randn(OBJECTS, 4 * sam.side, 4 * sam.side)
    boxes = torch.tensor([4.0, 6.0, 40.0, 50.0]).expand(OBJECTS, 4)
    return lambda: sam.decode(features.at(frames), ObjectPrompts(boxes=boxes, masks=masks)).masks


def remembering(sam: Sam2) -> Part:
    features, frames = features_of(sam, 2), torch.arange(OBJECTS) % 2
    masks, scores = torch.randn(OBJECTS, 4 * sam.side, 4 * sam.side), torch.ones(OBJECTS)
    return lambda: sam.encode_memory(features.embedding[frames], masks, scores)


def recalling(sam: Sam2, memories: int) -> Part:
    """Cells of successive frames, each with the memories of the frames before."""
    features, frames = features_of(sam, OBJECTS), torch.arange(OBJECTS)
    known = OBJECTS + memories - 1
    bank = MemoryBank(
        maps=torch.randn(known, sam.memory_channels, sam.side, sam.side, requires_grad=True),
        pointers=torch.randn(known, sam.channels, requires_grad=True),
    )
    seen = frames[:, None] + torch.arange(memories)
    slots = Slots(
        maps=seen,
        positions=torch.arange(memories).expand(OBJECTS, memories),
        pointers=seen,
        distances=torch.rand(OBJECTS, memories),
    )
    prepared = prepare_frames(sam, features.embedding)
    boxes = torch.tensor([4.0, 6.0, 40.0, 50.0]).expand(OBJECTS, 4)
    return lambda: (
        sam.decode(
            features.at(frames),
            ObjectPrompts(boxes=boxes),
            embedding=condition_on_memory(sam, prepared, frames, bank, slots),
        ).masks
    )


def counted(sam: Sam2, part: Part, *, training: bool) -> float:
    """Bytes that autograd keeps of a part, or that are alive at once in it."""
    if training:
        with kept_by_autograd(besides=[*sam.parameters(), *sam.buffers()]) as kept:
            held = part()
        assert held.requires_grad
        return kept.bytes
    with LiveStorage() as live, torch.no_grad():
        part()
    return live.peak


def assert_close(name: str, estimate: float, count: float) -> None:
    assert LEAST <= estimate / count <= MOST, f"{name}: {estimate / 2**20:.2f} of {count / 2**20:.2f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("backbone", "size", "adapted"), NETWORKS)
def test_estimates_of_cells_are_near_what_is_counted(
    backbone: Backbone, size: int, adapted: bool, training: bool
) -> None:
    sam = sam_of(backbone, size, adapted)
    sizes = sizes_of(sam)
    parts = {
        "decode": (decoding(sam), sizes.decode(training=training)),
        "remember": (remembering(sam), sizes.encode_memory(training=training)),
        "recall one": (recalling(sam, 1), sizes.condition_on_memory(1, training=training)),
        "recall many": (recalling(sam, MEMORIES), sizes.condition_on_memory(MEMORIES, training=training)),
    }
    for name, (part, estimate) in parts.items():
        assert_close(name, estimate, counted(sam, part, training=training) / OBJECTS)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("backbone", "size", "adapted"),
    [*NETWORKS, ("mobile_sam", 64, True), ("mobile_sam", 128, True), ("lite_medsam", 64, False)],
)
def test_estimates_of_frames_are_near_what_is_counted(
    backbone: Backbone, size: int, adapted: bool, training: bool
) -> None:
    sam = sam_of(backbone, size, adapted)
    frames = torch.randn(2, 3, size, size)
    count = counted(sam, lambda: sam.pyramid(frames)[0], training=training) / len(frames)
    assert_close("encode", frame_bytes(backbone, size, side=size, training=training), count)


def test_lite_medsam_sees_larger_frames_no_larger() -> None:
    each = [frame_bytes("lite_medsam", size, side=size, training=False) for size in (256, 512, 1024, 2048)]
    assert each[0] == each[1] == each[2] < each[3]


def test_lite_medsam_sees_no_more_than_small_frames_hold() -> None:
    each = [frame_bytes("lite_medsam", 256, side=side, training=False) for side in (32, 64, 128, 256)]
    assert each[0] == each[1] < each[2] < each[3]


def test_storages_are_counted_until_they_are_freed() -> None:
    with LiveStorage() as live:
        first = torch.zeros(1000)
        view, double = first.view(10, 100), first * 2
        assert live.now == 8000
        del double, first
        assert live.now == 4000
        del view
    assert (live.now, live.peak) == (0, 8000)


def test_autograd_keeps_a_storage_once() -> None:
    weight, x = torch.ones(3, requires_grad=True), torch.ones(100, 3)
    with kept_by_autograd(besides=[weight]) as kept:
        hidden = (x * weight).exp()
        result = hidden * hidden
    assert result.requires_grad
    assert kept.bytes == 2 * 4 * 300  # x and what exp gave


def test_at_least_one_is_treated_at_once() -> None:
    assert chunk_size(64, 10**12) == 1
    assert chunk_size(64, 10**6) == 64
