"""Losses of SAM 2's own masks, and of the surroundings of the prompted boxes alone."""

from __future__ import annotations

import math

import pytest
import torch
from support.small_rfmedsam2 import small_unet

from rfmedsam2.nn.refinement_state import StepMasks, StepOutputs
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.pipeline.planning.rfmedsam2 import model_of
from rfmedsam2.prompts import prompts_from_members
from rfmedsam2.records.model import RefinementLoss, RFMedSam2Config
from rfmedsam2.records.plan import Compute
from rfmedsam2.tasks.refinement_losses import boxes_as_masks, counted_voxels, own_mask_losses

FRAMES, SIDE, FRAME_SIZE = 4, 32, 64


def config(**loss: float) -> RFMedSam2Config:
    planned = model_of("nano", small_unet(), SIDE, adapt_encoder=False, propagate_loss=False)
    return planned.model_copy(update={"frame_size": FRAME_SIZE, "refinement_loss": RefinementLoss(**loss)})


def members() -> torch.Tensor:
    """One class on the frames 1 and 2: rows 8 to 15, columns 4 to 11; (FRAMES, 1, SIDE, SIDE)."""
    found = torch.zeros(FRAMES, 1, SIDE, SIDE, dtype=torch.bool)
    found[1:3, 0, 8:16, 4:12] = True
    return found


def steps(masks: torch.Tensor) -> StepOutputs:
    """Step 1 of two objects, prompted by their boxes in pixels of frames twice as large."""
    objects = torch.tensor([[1, 0], [2, 0]])
    boxes = torch.tensor([[8.0, 16.0, 23.0, 31.0]]).expand(2, 4)
    logits: dict[int, torch.Tensor | list[torch.Tensor]] = {
        0: torch.zeros(1, 2, FRAMES, SIDE, SIDE),
        1: torch.zeros(1, 2, FRAMES, SIDE, SIDE),
    }
    frames = torch.tensor([False, True, True, False])
    return StepOutputs(logits=logits, frames=frames, decoded={1: StepMasks(objects=objects, boxes=boxes, masks=masks)})


def test_a_box_of_frames_is_widened_on_the_slice() -> None:
    decoded = steps(torch.zeros(2, 16, 16)).decoded[1]
    tight = boxes_as_masks(decoded, (SIDE, SIDE), frame_size=FRAME_SIZE, margin=0.0)
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[7:17, 3:13] = True  # a pixel at least on every side
    assert torch.equal(tight[0], expected)
    wide = boxes_as_masks(decoded, (SIDE, SIDE), frame_size=FRAME_SIZE, margin=0.25)
    expected[6:18, 2:14] = True
    assert torch.equal(wide[1], expected)


def test_the_surroundings_of_boxes_count_or_whole_slices_do() -> None:
    found = steps(torch.zeros(2, 16, 16))
    assert found.frames is not None
    assert torch.equal(counted_voxels(found, (SIDE, SIDE), config())[1], found.frames)
    counted = counted_voxels(found, (SIDE, SIDE), config(box_margin=0.25))
    assert list(counted) == [1]
    assert counted[1].sum((1, 2)).tolist() == [0, 144, 144, 0]


def test_masks_are_scored_by_hand() -> None:
    exact = torch.nn.functional.interpolate(members()[1:3].float(), (SIDE, SIDE))[:, 0] * 40 - 20
    parts = own_mask_losses(steps(exact), members(), config(own_masks=2.0))
    assert float(parts["step1/mask_cross_entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(parts["step1/mask_dice"]) == pytest.approx(0, abs=1e-5)
    unsure = own_mask_losses(steps(torch.zeros(2, SIDE, SIDE)), members(), config(own_masks=2.0, box_margin=0.25))
    assert float(unsure["step1/mask_cross_entropy"]) == pytest.approx(2 * math.log(2))
    # inside the widened box: 144 voxels of 0.5, 64 of them of the object
    assert float(unsure["step1/mask_dice"]) == pytest.approx(2 * (1 - 65 / 137))
    emptied = own_mask_losses(steps(torch.full((2, SIDE, SIDE), -1024.0)), members(), config(own_masks=1.0))
    assert float(emptied["step1/mask_cross_entropy"]) < 10


def test_own_masks_train_the_decoder_behind_a_shut_gate() -> None:
    torch.manual_seed(0)
    compute = Compute(checkpointing=False)  # the graph is walked twice
    network = RFMedSam2(config(own_masks=1.0), channels=1, outputs=2, compute=compute).train()
    reference = members()
    step0 = torch.where(reference, 4.0, -4.0).permute(1, 0, 2, 3)[None]
    found = network.steps(torch.randn(1, 1, FRAMES, SIDE, SIDE), step0=step0)
    assert prompts_from_members(reference).present.sum() == len(found.decoded[1].objects)
    decoder = network.sam.base.sam_mask_decoder
    own = [p for p in decoder.parameters() if p.requires_grad]
    for number, logits in found.logits.items():
        if number:
            assert isinstance(logits, torch.Tensor)
            gradients = torch.autograd.grad(logits.sum(), own, retain_graph=True, allow_unused=True)
            assert not any(g is not None and g.any() for g in gradients)
    parts = own_mask_losses(found, reference, network.config)
    assert set(parts) == {f"step{n}/mask_{name}" for n in (1, 2) for name in ("cross_entropy", "dice")}
    gradients = torch.autograd.grad(sum(parts.values(), torch.zeros(())), own, allow_unused=True)
    assert any(g is not None and g.any() for g in gradients)
