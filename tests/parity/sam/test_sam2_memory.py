"""Our batched memory attention against SAM 2's own, cell by cell, on equal weights and memories."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("sam2")

from rfmedsam2.nn.sam2.adapted import adapters_of, inject
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.memory_attention import condition_on_memory, prepare_frames
from rfmedsam2.nn.sam2.memory_selection import select
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import MemoryBank
from rfmedsam2.records.model import AdapterConfig

FRAMES, OBJECTS, SIDE = 18, 2, 4
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def far_from_start(sam: Sam2) -> Sam2:
    """Weights and biases all of some size, so that no part can be left out unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sam.base.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return sam.eval()


@pytest.fixture(scope="module", params=["nano", "sam2_tiny"])
def sam(request) -> Sam2:
    return far_from_start(Sam2(build_base(request.param, frame_size=16 * SIDE)))


def memories(sam: Sam2, pattern: str) -> tuple[MemoryBank, Tensor]:
    """A bank, and its rows (D, O), for a pattern of presence."""
    present = torch.ones(FRAMES, OBJECTS, dtype=torch.bool)
    if pattern == "gaps":
        present[torch.arange(FRAMES) % 3 == 1, 0] = False
        present[4:11, 1] = False
    if pattern == "late":
        present[:9] = False
    rows = torch.where(present, present.flatten().cumsum(0).view(present.shape) - 1, -1)
    rng = torch.Generator().manual_seed(2)
    count = int(present.sum())
    maps = torch.randn(count, sam.memory_channels, SIDE, SIDE, generator=rng)
    return MemoryBank(maps=maps, pointers=torch.randn(count, sam.channels, generator=rng)), rows


def embeddings(sam: Sam2) -> Tensor:
    return torch.randn(FRAMES, sam.channels, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def ours(sam: Sam2, bank: MemoryBank, rows: Tensor, objects: Tensor, strategy, **choice) -> Tensor:
    """(q, C, s, s) of cells, in their order."""
    embedding = embeddings(sam)
    prepared = prepare_frames(sam, embedding)
    result = torch.full((len(objects), *embedding.shape[1:]), torch.nan)
    for bucket in select(strategy, rows, objects, **choice):
        result[bucket.objects] = condition_on_memory(sam, prepared, objects[bucket.objects, 0], bank, bucket.slots)
    return result


def official(sam: Sam2, frame: int, conditioning: dict[int, dict], others: dict[int, dict]) -> Tensor:
    """(C, s, s) of one cell by the official code, from output dictionaries as its video predictor keeps them."""
    embedding = embeddings(sam)[frame : frame + 1]
    flat = embedding.flatten(2).permute(2, 0, 1)
    result = sam.base._prepare_memory_conditioned_features(
        frame_idx=frame,
        is_init_cond_frame=False,
        current_vision_feats=[flat],
        current_vision_pos_embeds=[sam.image_position().flatten(1).T[:, None]],
        feat_sizes=[(SIDE, SIDE)],
        output_dict={"cond_frame_outputs": conditioning, "non_cond_frame_outputs": others},
        num_frames=FRAMES,
    )
    return (result + embedding if sam.residual_memory else result)[0]


def outputs(sam: Sam2, bank: MemoryBank, rows: Tensor, kind: int) -> dict[int, dict]:
    """What the official predictor would keep of one object, by frame."""
    kept = [(frame, row) for frame, row in enumerate(rows[:, kind].tolist()) if row >= 0]
    position = sam.position()[None]
    return {
        frame: {
            "maskmem_features": bank.maps[row : row + 1],
            "maskmem_pos_enc": [position],
            "obj_ptr": bank.pointers[row : row + 1],
        }
        for frame, row in kept
    }


@torch.no_grad()
@pytest.mark.parametrize("most", [None, 4])
@pytest.mark.parametrize("pattern", ["all", "gaps", "late"])
def test_strategy_sam2_equals_the_official_code(sam, pattern, most, monkeypatch):
    monkeypatch.setattr(sam.base, "max_cond_frames_in_attn", -1 if most is None else most)
    bank, rows = memories(sam, pattern)
    objects = torch.cartesian_prod(torch.arange(0, FRAMES, 2), torch.arange(OBJECTS))
    found = ours(sam, bank, rows, objects, "sam2", max_conditioning=most)
    for obj, (frame, kind) in enumerate(objects.tolist()):
        expected = official(sam, frame, outputs(sam, bank, rows, kind), {})
        torch.testing.assert_close(found[obj], expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["all", "gaps"])
def test_preceding_equals_official_tracking_with_the_current_frame_conditioning(sam, pattern):
    bank, rows = memories(sam, pattern)
    objects = (rows >= 0).nonzero()[::2]
    found = ours(sam, bank, rows, objects, "preceding")
    for obj, (frame, kind) in enumerate(objects.tolist()):
        kept = outputs(sam, bank, rows, kind)
        before = {t: out for t, out in kept.items() if frame - 6 <= t < frame}
        torch.testing.assert_close(found[obj], official(sam, frame, {frame: kept[frame]}, before), **TOLERANCE)


@torch.no_grad()
def test_following_is_preceding_with_time_reversed_but_for_the_sign_of_pointers(sam):
    bank, rows = memories(sam, "gaps")
    bank = MemoryBank(maps=bank.maps, pointers=torch.zeros_like(bank.pointers))
    objects = (rows >= 0).nonzero()
    # pointers far ahead and far behind differ in their encoding alone: without its projection they agree
    projection = sam.base.obj_ptr_tpos_proj
    kept = projection.weight.clone()
    projection.weight.zero_()
    forward = ours(sam, bank, rows, objects, "following")
    mirrored = objects.clone()
    mirrored[:, 0] = FRAMES - 1 - objects[:, 0]
    embedding = embeddings(sam).flip(0)
    prepared = prepare_frames(sam, embedding)
    for bucket in select("preceding", rows.flip(0), mirrored):
        backward = condition_on_memory(sam, prepared, mirrored[bucket.objects, 0], bank, bucket.slots)
        torch.testing.assert_close(forward[bucket.objects], backward, **TOLERANCE)
    projection.weight.copy_(kept)


@torch.no_grad()
def test_results_do_not_depend_on_which_cells_go_together(sam):
    bank, rows = memories(sam, "gaps")
    objects = (rows >= 0).nonzero()
    together = ours(sam, bank, rows, objects, "both")
    alone = torch.cat([ours(sam, bank, rows, objects[i : i + 1], "both") for i in range(0, len(objects), 3)])
    torch.testing.assert_close(together[::3], alone, **TOLERANCE)


@torch.no_grad()
def test_cells_without_memory_are_marked_so(sam):
    bank, rows = memories(sam, "late")
    objects = torch.tensor([[2, 0], [3, 1]])
    found = ours(sam, bank, rows, objects, "preceding")
    expected = embeddings(sam)[objects[:, 0]] + sam.base.no_mem_embed.view(1, -1, 1, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("blocks", ["dwconv", "plain"])
def test_adapters_of_memory_attention_take_part_as_in_the_official_order(blocks):
    sam = Sam2(build_base("nano", frame_size=16 * SIDE))
    inject(sam.base, AdapterConfig(blocks=blocks))
    far_from_start(sam)
    bank, rows = memories(sam, "all")
    objects = torch.tensor([[9, 0], [17, 1]])
    with torch.no_grad():
        found = ours(sam, bank, rows, objects, "sam2")
        for obj, (frame, kind) in enumerate(objects.tolist()):
            expected = official(sam, frame, outputs(sam, bank, rows, kind), {})
            torch.testing.assert_close(found[obj], expected, **TOLERANCE)
    ours(sam, bank, rows, objects, "sam2").sum().backward()
    adapters = {name: module for name, module in adapters_of(sam.base).items() if name.startswith("memory_attention")}
    assert len(adapters) == 6
    assert all(p.grad is not None and p.grad.any() for module in adapters.values() for p in module.parameters())


def test_gradients_equal_those_of_the_official_code(sam):
    bank, rows = memories(sam, "gaps")
    objects = torch.tensor([[0, 0], [6, 0], [12, 1]])
    learned = {name: p for name, p in sam.base.named_parameters() if "memory_attention" in name or "tpos" in name}

    def gradients(result: Tensor) -> list[Tensor]:
        weights = torch.linspace(-1, 1, result.numel()).view_as(result)
        return list(torch.autograd.grad((result * weights).sum() / 100, [*learned.values(), bank.maps]))

    bank.maps.requires_grad_()
    mine = gradients(ours(sam, bank, rows, objects, "sam2"))
    theirs = gradients(
        torch.stack([official(sam, frame, outputs(sam, bank, rows, kind), {}) for frame, kind in objects.tolist()])
    )
    for name, a, b in zip([*learned, "maps"], mine, theirs, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=2e-5, msg=lambda text, at=name: f"{at}: {text}")
