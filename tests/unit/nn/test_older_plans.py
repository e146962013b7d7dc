"""Plans without the fields of the gated composition train and predict as they did when they were written.

The steps are written out here as they were: prompts at random, memories of SAM 2's own masks, Step 2's mask prompt and
evidence from Step 1's class map.
"""

from __future__ import annotations

import pytest
import torch
from support.small_rfmedsam2 import NO_ADAPTERS, network, small_unet
from torch import Tensor

from rfmedsam2.nn.refinement_state import (
    downsample,
    one_against_rest,
    prompts_of,
    relative_to_background,
    scatter_masks,
    upsample,
    with_background,
)
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.sam2.memory_attention import condition_on_memory, prepare_frames
from rfmedsam2.nn.sam2.memory_selection import select
from rfmedsam2.nn.sam2.types import MemoryBank, ObjectPrompts
from rfmedsam2.prompts import resized
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Compute, Sampling

pytestmark = pytest.mark.slow

FRAME, SIZE = 64, (32, 32)
OLD = {
    "kind": "rfmedsam2",
    "generator": "unet",
    "backbone": "nano",
    "frame_size": FRAME,
    "refinements": 2,
    "strategy": "preceding",
    "memory_frames": 6,
    "object_scores": False,
    "mask_prompt": True,
    "propagate_loss": True,
    "freeze_backbone": False,
    "fitted_windows": False,
    "adapters": NO_ADAPTERS.model_dump(include={"blocks", "convolutions", "encoder", "ratio", "channel_hidden"}),
}
"""A model as plans of formats 1 and 2 have it, without any field that came later."""


def combined(output: str, masks: Tensor, base: Tensor, asked: Tensor, objects: Tensor) -> Tensor:
    large, (frames, classes) = upsample(masks, SIZE), objects.unbind(1)
    if output == "correct":
        return base[frames, classes] + large
    if output == "detail":
        prompt = asked[frames, classes]
        return large + prompt - upsample(downsample(prompt, (16, 16)), SIZE)
    return large


def steps_as_before(model: RFMedSam2, volumes: Tensor, most: int | None) -> list[Tensor]:
    """Class maps of Steps 1 and 2 of a batch."""
    sam, output, count = model.sam, model.config.output, len(volumes)
    logits = model.prompt_volumes(volumes)
    logits = (logits if isinstance(logits, Tensor) else logits[0]).transpose(1, 2).flatten(0, 1)
    features = model.encode(volumes.transpose(1, 2).flatten(0, 1))
    base = relative_to_background(logits.float(), regions=False)
    masks = one_against_rest(logits.float(), regions=False)
    prompts = prompts_of(base, regions=False)
    objects = prompts.present.nonzero()
    if most is not None and torch.is_grad_enabled():
        objects = objects[torch.randperm(len(objects))[:most].sort().values]
    frames, classes = objects.unbind(1)
    boxes = resized(prompts, SIZE, (FRAME, FRAME)).boxes[frames, classes]
    asked = ObjectPrompts(boxes=boxes, masks=downsample(masks[frames, classes], (16, 16)))
    first = sam.decode(features.at(frames), asked)
    one = scatter_masks(base, objects, combined(output, first.masks, base, masks, objects))
    # the order of use is the order in which gradients are summed
    step_1 = with_background(one, count, regions=False)

    maps = sam.encode_memory(features.embedding[frames], first.masks, first.scores)
    rows = torch.full(one.shape[:2], -1)
    rows[frames, classes] = torch.arange(len(objects))
    bank, rows = MemoryBank(maps=maps, pointers=first.pointers), rows.unflatten(0, (count, -1)).transpose(0, 1)

    prompts = prompts_of(one, regions=False)
    objects = (prompts.present & (rows.transpose(0, 1).flatten(0, 1) >= 0)).nonzero()
    frames, classes = objects.unbind(1)
    boxes = resized(prompts, SIZE, (FRAME, FRAME)).boxes[frames, classes]
    each = len(one) // count
    places = torch.stack([frames % each, frames // each * one.shape[1] + classes], 1)
    prepared, order, masks = prepare_frames(sam, features.embedding), [], []
    for bucket in select("preceding", rows.flatten(1), places, reach=6):
        own = frames[bucket.objects]
        embedding = condition_on_memory(sam, prepared, own, bank, bucket.slots)
        asked = ObjectPrompts(
            boxes=boxes[bucket.objects], masks=downsample(one[own, classes[bucket.objects]], (16, 16))
        )
        masks.append(sam.decode(features.at(own), asked, embedding=embedding).masks)
        order.append(bucket.objects)
    ordered = torch.empty_like(torch.cat(masks)).index_copy(0, torch.cat(order), torch.cat(masks))
    two = scatter_masks(one, objects, combined(output, ordered, one, one, objects))
    return [step_1, with_background(two, count, regions=False)]


@pytest.mark.parametrize("most", [None, 7])
@pytest.mark.parametrize("output", ["replace", "detail", "correct"])
def test_they_train_and_predict_the_same_to_the_bit(output: str, most: int | None) -> None:
    config = RFMedSam2Config.parse({**OLD, "unet": small_unet().model_dump(), "output": output})
    sampling = Sampling.parse({"oversample_foreground": 0.33, "max_prompted_objects": most})
    models, results = [], []
    for _ in range(2):
        torch.manual_seed(0)
        made = network(
            **{name: getattr(config, name) for name in RFMedSam2Config.model_fields if name != "kind"},
            compute=Compute(memory_mb=4096, checkpointing=False),
            sampling=sampling,
        )
        models.append(made.train())
    for before, model in zip((True, False), models, strict=True):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        outputs = []
        for seed in range(2):
            volumes = torch.randn(2, 1, 4, *SIZE, generator=torch.Generator().manual_seed(seed))
            maps = steps_as_before(model, volumes, most) if before else list(model.steps(volumes).logits.values())[1:]
            assert all(isinstance(step, Tensor) for step in maps)
            optimizer.zero_grad()
            sum(step.square().mean() for step in maps).backward()
            optimizer.step()
            outputs += maps
        with torch.inference_mode():
            model.eval()
            outputs += (
                steps_as_before(model, volumes, most) if before else list(model.steps(volumes).logits.values())[1:]
            )
        results.append([*outputs, *model.parameters()])
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_random_prompts_and_losses_of_all_slices_stay_with_them() -> None:
    model = network(sampling=Sampling(max_prompted_objects=5)).train()
    steps = model.steps(torch.randn(1, 1, 8, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert steps.frames is None
    assert steps.objects is not None
    assert len(steps.objects) == 5
