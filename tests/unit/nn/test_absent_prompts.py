"""Prompts for classes that are not on a slice: padded or the generator's, with empty targets, in training alone."""

from __future__ import annotations

import pytest
import torch
from support.small_rfmedsam2 import network, patch
from torch import Tensor

from rfmedsam2.prompts import Prompts
from rfmedsam2.records.plan import Sampling
from rfmedsam2.tasks.refinement_losses import object_score_loss

pytestmark = pytest.mark.slow

FRAMES, CLASSES = 8, 2
GENERATORS = ["gt", "scored_object_queries", "point_embeddings"]


def boxes(present: list[int]) -> Prompts:
    """The same box on some slices, for both classes."""
    there = torch.zeros(FRAMES, CLASSES, dtype=torch.bool)
    there[present] = True
    box = torch.tensor([4.0, 6.0, 20.0, 24.0]).expand(FRAMES, CLASSES, 4)
    return Prompts(boxes=torch.where(there[..., None], box, 0), present=there)


def model(generator: str, share: float, **fields: object):
    return network(generator=generator, unet=None, sampling=Sampling(absent_share=share), **fields)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 2, 8), (1.0, 10, 10)])
def test_a_share_of_absent_prompts_teaches_object_scores(generator: str, share: float, low: int, high: int) -> None:
    torch.manual_seed(0)
    net = model(generator, share, object_scores=True).train()
    given = boxes([1, 2, 3])
    steps = net.steps(patch(frames=FRAMES), given)
    assert steps.objects is not None
    assert steps.scores is not None
    targets = given.present[steps.objects[:, 0], steps.objects[:, 1]]
    assert int(targets.sum()) == 6
    assert low <= int((~targets).sum()) <= high
    assert len(steps.scores) == len(targets)
    (found,) = object_score_loss(steps, given).values()
    by_hand = torch.where(targets, -steps.scores.sigmoid().log(), -(-steps.scores).sigmoid().log()).mean()
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("generator", GENERATORS)
def test_masks_of_absent_prompts_are_taught_to_be_empty(generator: str) -> None:
    torch.manual_seed(0)
    net = model(generator, 1.0, object_scores=False).train()
    steps = net.steps(patch(frames=FRAMES), boxes([]))
    assert isinstance(steps.logits[1], Tensor)
    empty = torch.zeros(1, FRAMES, 32, 32, dtype=torch.long)
    torch.nn.functional.cross_entropy(steps.logits[1], empty).backward()
    decoder = net.sam.base.sam_mask_decoder
    assert sum(float(p.grad.abs().sum()) for p in decoder.parameters() if p.grad is not None) > 0


def test_reference_boxes_of_absent_classes_are_padded_points(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model("gt", 1.0).train()
    tokens = []
    decode = net.sam.base.sam_mask_decoder.forward

    def spied(**given: Tensor) -> object:
        tokens.append(given["sparse_prompt_embeddings"])
        return decode(**given)

    monkeypatch.setattr(net.sam.base.sam_mask_decoder, "forward", spied)
    given = boxes([1, 2, 3])
    objects = net.steps(patch(frames=FRAMES), given, last=1).objects
    assert objects is not None
    there = given.present[objects[:, 0], objects[:, 1]]
    padding = net.sam.base.sam_prompt_encoder.not_a_point_embed.weight[0]
    padded = (torch.cat(tokens)[:, :2] == padding).all(2).all(1)  # two corners of label -1
    assert torch.equal(padded, ~there)


@pytest.mark.parametrize("generator", GENERATORS)
def test_absent_prompts_leave_prediction_alone(generator: str) -> None:
    with torch.inference_mode():
        logits = [model(generator, share)(patch(frames=FRAMES), boxes([1, 2])) for share in (0.0, 1.0)]
    assert torch.equal(*logits)


def test_padded_prompts_are_no_memories() -> None:
    net = model("gt", 1.0).train()
    seen = []
    encode = net.refiner.encode_memory
    net.refiner.encode_memory = lambda *given: seen.append(encode(*given)) or seen[-1]
    net.steps(patch(frames=FRAMES), boxes([1, 2, 3]))
    assert torch.equal(seen[0].rows[:, 0] >= 0, boxes([1, 2, 3]).present)


def test_models_whose_step_0_predicts_masks_have_its_own_absent_prompts() -> None:
    torch.manual_seed(0)
    present = []
    for share in (0.0, 1.0):
        net = network(sampling=Sampling(absent_share=share)).train()
        objects = net.steps(patch()).objects
        assert objects is not None
        present.append(len(objects))
    assert present[0] == present[1] > 0
