"""Which object prompts a training step decodes, encodes slices for, and counts in its losses."""

from __future__ import annotations

import pytest
import torch
from support.small_rfmedsam2 import network
from torch import Tensor

from rfmedsam2.nn.refinement.object_sampling import draw_objects
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.prompts import Prompts
from rfmedsam2.records.plan import Sampling

pytestmark = pytest.mark.slow

VOLUMES, FRAMES, CLASSES = 2, 16, 4
RUNS = Sampling(max_prompted_objects=24, prompted_runs=True)


def present() -> Tensor:
    """Classes on consecutive slices, as organs are: (VOLUMES * FRAMES, CLASSES)."""
    found = torch.zeros(VOLUMES, FRAMES, CLASSES, dtype=torch.bool)
    for volume in range(VOLUMES):
        for k in range(CLASSES):
            found[volume, k + volume : FRAMES - 2 * k] = True
    return found.flatten(0, 1)


def boxes() -> Prompts:
    box = torch.tensor([4.0, 6.0, 20.0, 24.0]).expand(VOLUMES * FRAMES, CLASSES, 4)
    return Prompts(boxes=torch.where(present()[..., None], box, 0), present=present())


def patch() -> Tensor:
    return torch.randn(VOLUMES, 1, FRAMES, 32, 32, generator=torch.Generator().manual_seed(1))


def model(sampling: Sampling, **fields: object) -> RFMedSam2:
    return network(
        outputs=CLASSES + 1, sampling=sampling, **{"generator": "gt", "unet": None, "output": "replace", **fields}
    )


def counted(net: RFMedSam2, monkeypatch: pytest.MonkeyPatch, *, training: bool, steps: int = 1) -> tuple[float, float]:
    """Mean number of preceding memories of an object in Step 2, and of slices encoded in a step."""
    memories, encoded = [], []
    pyramid = Sam2.pyramid

    def conditioned(sam, prepared, frames, bank, slots):
        memories.extend([slots.maps.shape[1] - 1] * len(frames))
        return prepared.embedding[frames]

    monkeypatch.setattr("rfmedsam2.nn.refiner.condition_on_memory", conditioned)
    monkeypatch.setattr(Sam2, "pyramid", lambda sam, frames: encoded.append(len(frames)) or pyramid(sam, frames))
    # masks that fill the box, so that Step 2 finds all objects again
    decode = net.sam.decode

    def certain(features, prompts, *, embedding=None):
        found = decode(features, prompts, embedding=embedding)
        masks = torch.full_like(found.masks, 5.0) + 0 * found.masks
        return type(found)(masks=masks, pointers=found.pointers, scores=found.scores, quality=found.quality)

    monkeypatch.setattr(net.sam, "decode", certain)
    monkeypatch.setattr(
        "rfmedsam2.nn.refiner.prompts_of",
        lambda logits, regions: Prompts(
            boxes=torch.zeros(*logits.shape[:2], 4) + 8, present=(logits > 0).flatten(2).any(2)
        ),
    )
    for _ in range(steps):
        with torch.set_grad_enabled(training):
            net.steps(patch(), boxes())
    return sum(memories) / len(memories), sum(encoded) / steps


def test_training_sees_nearly_as_many_memories_as_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    predicting, _ = counted(model(RUNS).eval(), monkeypatch, training=False)
    training, encoded = counted(model(RUNS).train(), monkeypatch, training=True, steps=8)
    random = Sampling(max_prompted_objects=24)
    before, all_encoded = counted(model(random).train(), monkeypatch, training=True, steps=8)
    assert predicting > 3.5
    assert before < 0.4 * predicting  # single prompts, as drawn before
    assert training > 0.8 * predicting
    assert all_encoded == VOLUMES * FRAMES
    assert encoded < 0.75 * VOLUMES * FRAMES


@pytest.mark.parametrize("strategy", ["preceding", "following", "both", "sam2"])
@pytest.mark.parametrize("seed", range(5))
def test_runs_are_whole_slices_one_after_another_and_a_share_of_every_volume(strategy: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = model(RUNS, strategy=strategy).config
    drawn = draw_objects(present(), VOLUMES, sampling=RUNS, config=config)
    assert drawn.frames is not None
    chosen = torch.zeros_like(present())
    chosen[drawn.learned[:, 0], drawn.learned[:, 1]] = True
    assert torch.equal(chosen, present() & drawn.frames[:, None])
    assert 16 < len(drawn.learned) <= 24
    for frames, classes in zip(drawn.frames.unflatten(0, (VOLUMES, -1)), chosen.split(FRAMES), strict=True):
        places = frames.nonzero()[:, 0]
        assert len(places) == places[-1] - places[0] + 1
        assert 8 <= classes.sum() <= 14
    assert not drawn.absent.any()
    reach = {"preceding": (6, 0), "following": (0, 6), "both": (6, 6), "sam2": (FRAMES, FRAMES)}[strategy]
    expected = {
        (frame, k)
        for frame, k in present().nonzero().tolist()
        if not chosen[frame, k]
        and any(
            chosen[other, k] and other // FRAMES == frame // FRAMES and -reach[1] <= other - frame <= reach[0]
            for other in range(VOLUMES * FRAMES)
        )
    }
    assert {tuple(pair) for pair in drawn.context.tolist()} == expected


def test_a_slice_of_more_objects_than_the_limit_gives_some_of_them() -> None:
    sampling = Sampling(max_prompted_objects=3, prompted_runs=True)
    drawn = draw_objects(torch.ones(8, 5).bool(), 1, sampling=sampling, config=model(RUNS).config)
    assert len(drawn.learned) == 3
    assert len(drawn.learned[:, 0].unique()) == 1


def test_patches_without_objects_and_those_within_the_limit_are_taken_whole() -> None:
    config = model(RUNS).config
    for asked in (torch.zeros(8, 3).bool(), torch.ones(8, 3).bool()):
        drawn = draw_objects(asked, 2, sampling=RUNS, config=config)
        assert torch.equal(drawn.learned, asked.nonzero())
        assert drawn.frames is None
        assert not len(drawn.context)


def test_context_gives_memories_but_no_gradients_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = model(RUNS).train()
    kept = []
    encode = net.sam.encode_memory
    monkeypatch.setattr(net.sam, "encode_memory", lambda *given: kept.append(encode(*given)) or kept[-1])
    steps = net.steps(patch(), boxes())
    assert isinstance(steps.logits[2], Tensor)
    with_, without = ([m for m in kept if m.requires_grad is wanted] for wanted in (True, False))
    assert sum(map(len, with_)) == len(steps.objects)
    assert sum(map(len, without)) > 5
    steps.logits[2].square().sum().backward()
