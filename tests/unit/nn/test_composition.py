"""What Steps 1 and 2 make of Step 0: gates that start at 0, masks in memories and prompts, a person's boxes."""

from __future__ import annotations

import pytest
import torch
from support.small_rfmedsam2 import small_unet
from torch import Tensor

from rfmedsam2.inference.refined_tiles import RefinedTiles, Request, Tiling
from rfmedsam2.inference.sliding_window import Execution, Slab
from rfmedsam2.nn.refinement_state import downsample, one_against_rest
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.sam2.types import DecodedMasks
from rfmedsam2.pipeline.planning.rfmedsam2 import model_of
from rfmedsam2.prompts import Prompts, prompts_from_labels
from rfmedsam2.records.model import Backbone
from rfmedsam2.records.plan import Inference

pytestmark = pytest.mark.slow

FRAMES, SIDE, CLASSES = 5, 32, 3


def planned(backbone: Backbone = "nano", **fields: object) -> RFMedSam2:
    """The planner's model at a small size, with a decoder that says something."""
    torch.manual_seed(0)
    config = model_of(backbone, small_unet(), SIDE, adapt_encoder=False, propagate_loss=False)
    config = config.model_copy(update={"frame_size": 64, **fields})
    network = RFMedSam2(config, channels=1, outputs=CLASSES + 1).eval()
    with torch.no_grad():
        hyper = network.sam.base.sam_mask_decoder.get_submodule("output_hypernetworks_mlps.0.layers.2")
        hyper.weight.mul_(300)
    return network


def labels() -> Tensor:
    """Three rectangles that move along the slices, (FRAMES, SIDE, SIDE)."""
    found = torch.zeros(FRAMES, SIDE, SIDE, dtype=torch.long)
    for frame in range(FRAMES):
        for k in range(CLASSES):
            found[frame, 2 + 10 * k : 9 + 10 * k, 3 + frame + 5 * k : 14 + frame + 5 * k] = k + 1
    return found


def step0(height: float = 4.0) -> Tensor:
    """Logits (1, outputs, FRAMES, SIDE, SIDE) of a Step 0 that knows the rectangles."""
    noise = torch.randn(1, CLASSES + 1, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    return noise + height * torch.nn.functional.one_hot(labels(), CLASSES + 1).permute(3, 0, 1, 2)[None]


def image() -> Tensor:
    return torch.randn(1, 1, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def with_step0(network: RFMedSam2, monkeypatch: pytest.MonkeyPatch, logits: Tensor) -> RFMedSam2:
    monkeypatch.setattr(network, "prompt_volumes", lambda _: logits)
    return network


def open_gates(network: RFMedSam2, *values: float) -> None:
    assert network.gates is not None
    with torch.no_grad():
        network.gates.weight.copy_(torch.tensor(values)[:, None].expand_as(network.gates.weight))


def dsc(one: Tensor, other: Tensor) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


@pytest.mark.parametrize("backbone", ["nano", "mobile_sam", "lite_medsam", "sam2_tiny"])
def test_every_step_starts_as_step_0_to_the_bit(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    network = with_step0(planned(backbone, output="gated"), monkeypatch, step0())
    with torch.inference_mode():
        steps = network.steps(image())
    relative = step0() - step0()[:, :1]
    assert steps.objects is not None
    assert len(steps.objects) == FRAMES * CLASSES
    for step in (1, 2):
        assert torch.equal(steps.logits[step], relative)


@pytest.mark.parametrize("backbone", ["nano", "mobile_sam", "lite_medsam"])
def test_the_planner_gates_decoders_that_are_no_better_than_step_0(backbone: Backbone) -> None:
    network = planned(backbone)
    assert network.config.output == "gated"
    assert network.gates is not None
    assert network.gates.weight.shape == (2, CLASSES)
    assert not network.gates.weight.any()


def test_a_closed_gate_learns_and_an_open_one_lets_the_decoder_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    network = with_step0(planned().train(), monkeypatch, step0())
    decoder = network.sam.base.sam_mask_decoder
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    target = labels()[None]
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        steps = network.steps(image())
        sum(torch.nn.functional.cross_entropy(steps.logits[step], target) for step in (1, 2)).backward()
        assert network.gates is not None
        assert network.gates.weight.grad is not None
        assert (network.gates.weight.grad != 0).all()
        gradients.append(sum(float(p.grad.abs().sum()) for p in decoder.parameters() if p.grad is not None))
        optimizer.step()
    assert gradients[0] == 0
    assert gradients[1] > 0


def test_step_2_corrects_step_0_and_not_step_1(monkeypatch: pytest.MonkeyPatch) -> None:
    network = with_step0(planned(), monkeypatch, step0())
    open_gates(network, 0.05, 0.0)
    with torch.inference_mode():
        logits = network.steps(image()).logits
    assert isinstance(logits[1], Tensor)
    relative = step0() - step0()[:, :1]
    assert (logits[1] - relative).abs().max() > 0.5
    assert (logits[1].argmax(1) != 0).any()
    assert torch.equal(logits[2], relative)


@pytest.mark.parametrize("gate", [0.0, 0.05])
def test_memories_are_of_the_mask_of_step_1(gate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network = with_step0(planned(), monkeypatch, step0(6.0))
    open_gates(network, gate, gate)
    given, encode = [], network.sam.encode_memory

    def spied(embedding: Tensor, masks: Tensor, scores: Tensor) -> Tensor:
        given.append((masks, encode(embedding, masks, scores)))
        return given[-1][1]

    monkeypatch.setattr(network.sam, "encode_memory", spied)
    with torch.inference_mode():
        steps = network.steps(image())
    assert isinstance(steps.logits[1], Tensor)
    assert steps.objects is not None
    masks = torch.cat([masks for masks, _ in given])
    frames, classes = steps.objects.unbind(1)
    class_map = steps.logits[1][0].transpose(0, 1)
    expected = downsample(one_against_rest(class_map, regions=False)[frames, classes], (masks.shape[-1],) * 2)
    torch.testing.assert_close(masks, expected, atol=1e-3, rtol=1e-4)
    said = (class_map.argmax(1)[frames] == classes[:, None, None] + 1)[:, None].float()
    said = torch.nn.functional.interpolate(said, masks.shape[-2:], mode="bilinear", antialias=True)[:, 0] > 0.5
    assert dsc(masks > 0, said) > 0.9
    maps = torch.cat([maps for _, maps in given])[frames == 0]
    assert (maps[0] - maps[1]).abs().max() > 0.1


def test_both_steps_ask_with_a_class_against_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    network = with_step0(planned(), monkeypatch, step0(1.5))
    open_gates(network, 0.02, 0.02)
    asked, decode = [], network.sam.decode

    def spied(features: object, prompts: object, **more: object) -> object:
        asked.append(prompts.masks)
        return decode(features, prompts, **more)

    monkeypatch.setattr(network.sam, "decode", spied)
    with torch.inference_mode():
        steps = network.steps(image())
    side = 4 * network.sam.side
    first = one_against_rest(step0(1.5)[0].transpose(0, 1), regions=False)
    second = one_against_rest(steps.logits[1][0].transpose(0, 1), regions=False)
    expected = [downsample(maps.flatten(0, 1), (side, side)) for maps in (first, second)]
    objects = FRAMES * CLASSES
    for found, wanted in zip(torch.cat(asked).split(objects), expected, strict=True):
        # the second step's objects are in another order: memories bring them into buckets
        distance = (found[:, None] - wanted[None]).abs().amax((2, 3))
        assert distance.min(1).values.max() < 1e-4
        assert len(distance.argmin(1).unique()) == objects


def rectangles(features: object, prompts: object, **_: object) -> DecodedMasks:
    """A decoder that fills boxes: 4 within, -4 around; in frames of 64 pixels and masks of 16."""
    grid = torch.arange(16) * 4 + 1.5
    x0, y0, x1, y1 = (side[:, None] for side in prompts.boxes.unbind(1))
    inside = ((grid >= y0) & (grid <= y1))[:, :, None] & ((grid >= x0) & (grid <= x1))[:, None]
    count = len(prompts.boxes)
    masks = torch.where(inside, 4.0, -4.0)
    zero = torch.zeros(count)
    return DecodedMasks(masks=masks, pointers=torch.zeros(count, 64), scores=zero + 1, quality=zero)


def predicted(network: RFMedSam2, boxes: Prompts, step: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Labels (FRAMES, SIDE, SIDE) by the steps on a patch, and by prediction in tiles."""
    sure = torch.zeros(1, CLASSES + 1, FRAMES, SIDE, SIDE)
    sure[:, 0] = 10
    with_step0(network, monkeypatch, sure)
    with torch.inference_mode():
        patch = network.steps(image(), boxes).logits[step]
    tiling = Tiling(patch_size=(FRAMES, SIDE, SIDE), inference=Inference(mirror=False), mirror_axes=())
    request = Request(step=step, boxes=boxes, frames_at_once=2)
    tiles = RefinedTiles([network], image()[0], tiling=tiling, device=torch.device("cpu"), request=request)
    slabs = [slab.logits for slab in tiles.slabs([Slab(start=0, logits=sure[0])], Execution())]
    assert isinstance(patch, Tensor)
    return [patch[0].argmax(0), torch.cat(slabs, 1).argmax(0)]


@pytest.mark.parametrize("output", ["gated", "replace", "detail", "correct"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_persons_boxes_win_over_a_sure_step_0(output: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = planned(output=output)
    masks = []

    def spied(features: object, prompts: object, *, embedding: Tensor | None = None) -> DecodedMasks:
        masks.append((embedding is None, prompts.masks))
        return rectangles(features, prompts)

    monkeypatch.setattr(network.sam, "decode", spied)
    for found in predicted(network, prompts_from_labels(labels(), CLASSES), step, monkeypatch):
        for k in range(1, CLASSES + 1):
            assert dsc(found == k, labels() == k) > 0.7
    assert all(mask is None for is_first, mask in masks if is_first)
    assert all(mask is not None for is_first, mask in masks if not is_first)


def test_boxes_are_composed_with_step_0_where_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    network = planned(given_boxes="composed")
    monkeypatch.setattr(network.sam, "decode", lambda f, p, embedding=None: rectangles(f, p))
    for found in predicted(network, prompts_from_labels(labels(), CLASSES), 2, monkeypatch):
        assert not found.any()
