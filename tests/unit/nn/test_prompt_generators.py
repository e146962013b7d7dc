"""Prompt generators: shapes, bounds, and that they can learn what they are for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rfmedsam2.nn.prompt_generators import HierarchicalMasks, ObjectQueries, PointEmbeddings
from rfmedsam2.nn.sam2.types import FrameFeatures

pytestmark = pytest.mark.slow

CLASSES, CHANNELS, SIDE = 3, 32, 4


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def features(frames: int = 2) -> FrameFeatures:
    return FrameFeatures(
        embedding=torch.randn(frames, CHANNELS, SIDE, SIDE),
        middle=torch.randn(frames, CHANNELS // 4, 2 * SIDE, 2 * SIDE),
        fine=torch.randn(frames, CHANNELS // 8, 4 * SIDE, 4 * SIDE),
    )


def test_object_queries_give_boxes_inside_the_frame_the_right_way_round():
    generator = ObjectQueries(CLASSES, CHANNELS, SIDE)
    torch.nn.init.normal_(generator.box.layers[-1].weight, std=5.0)  # far from the middle, where sigmoids saturate
    boxes, presence = generator(features())
    assert boxes.shape == (2, CLASSES, 4)
    assert presence.shape == (2, CLASSES)
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert (boxes[..., 2:] >= boxes[..., :2]).all()
    assert boxes[:, 0].ne(boxes[:, 1]).any()


def test_point_embeddings_give_two_tokens_a_class():
    tokens, presence = PointEmbeddings(CLASSES, CHANNELS, SIDE)(features())
    assert tokens.shape == (2, CLASSES, 2, CHANNELS)
    assert presence.shape == (2, CLASSES)


def test_hierarchical_masks_have_the_decoders_resolution():
    assert HierarchicalMasks(CLASSES + 1, CHANNELS)(features()).shape == (2, CLASSES + 1, 4 * SIDE, 4 * SIDE)


@pytest.mark.parametrize("level", ["embedding", "middle", "fine"])
def test_hierarchical_masks_use_every_level(level):
    generator, given = HierarchicalMasks(CLASSES, CHANNELS), features(1)
    before = generator(given)
    getattr(given, level)[0, :, 0, 0] += 5.0
    assert not torch.allclose(before, generator(given), atol=1e-4)


@pytest.mark.parametrize("kind", [ObjectQueries, PointEmbeddings])
def test_queries_see_where_things_are(kind):
    generator = kind(CLASSES, CHANNELS, SIDE)
    given = features(1)
    moved = FrameFeatures(embedding=given.embedding.roll(1, 3), middle=given.middle, fine=given.fine)
    assert not torch.allclose(generator(given)[0], generator(moved)[0], atol=1e-5)


@pytest.mark.parametrize(
    "generator",
    [
        ObjectQueries(CLASSES, CHANNELS, SIDE),
        PointEmbeddings(CLASSES, CHANNELS, SIDE),
        HierarchicalMasks(CLASSES, CHANNELS),
    ],
    ids=lambda g: type(g).__name__,
)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_every_parameter_learns(generator, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        results = generator(features())
    outputs = [results] if isinstance(results, torch.Tensor) else results
    sum(output.float().square().sum() for output in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())


def test_object_queries_learn_to_find_a_bright_square():
    generator = ObjectQueries(1, CHANNELS, 8)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3)
    direction = torch.randn(CHANNELS, 1, 1)
    for _ in range(300):
        corner = torch.randint(0, 6, (16, 2))
        embedding = 0.3 * torch.randn(16, CHANNELS, 8, 8)
        for image, (x, y) in zip(embedding, corner.tolist(), strict=True):
            image[:, y : y + 3, x : x + 3] += direction
        wanted = torch.cat([corner, corner + 3], 1) / 8
        given = FrameFeatures(embedding=embedding, middle=embedding, fine=embedding)
        loss = F.l1_loss(generator(given)[0][:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # a box that ignores the image is off by 0.19 on average
    assert loss.item() < 0.09
