"""SAM2Refiner: it starts as SAM 2, trains its own modules alone, and every module sees what it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfmedsam2.nn.sam2.memory_attention import condition_on_memory, prepare_frames
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import MemoryBank, ObjectPrompts, Slots
from rfmedsam2.nn.segmenter import PromptBatch, Segmenter
from segment_anything_hq.nn.localization_augment import LocalizationAugment, grid_positions, stitched, sub_images
from segment_anything_hq.nn.prompt_retargeting import BOX, MASK, RFB, prompt_windows, window_positions
from segment_anything_hq.nn.sam2_base import Sam2Segmenter
from segment_anything_hq.nn.sam2_refiner import RefinerConfig, SAM2Refiner
from segment_anything_hq.tasks.losses import mask_losses

pytestmark = pytest.mark.slow

SIZE = 64
IMAGES = torch.tensor([1, 0, 1])
POINTS = torch.tensor([[[10.0, 12.0], [40.0, 50.0]], [[30.0, 31.0], [2.0, 3.0]], [[60.0, 5.0], [33.0, 20.0]]])
LABELS = torch.tensor([[1, 0], [1, 1], [0, 1]])
BOXES = torch.tensor([[4.0, 5.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0], [0.0, 0.0, 63.0, 63.0]])
SMALL = RefinerConfig(layers=1, widening=2, patch=3, depth=1)


def frames(count=2) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def some_masks() -> torch.Tensor:
    return torch.randn(3, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(2)) * 5


PROMPTS = {
    "box": PromptBatch(images=IMAGES, boxes=BOXES),
    "points": PromptBatch(images=IMAGES, points=POINTS, point_labels=LABELS),
    "box and points": PromptBatch(images=IMAGES, points=POINTS, point_labels=LABELS, boxes=BOXES),
    "unequal points": PromptBatch(images=IMAGES, points=POINTS, point_labels=torch.tensor([[1, 0], [-1, 1], [1, 1]])),
    "mask": PromptBatch(images=IMAGES, masks=some_masks()),
    "mask and points": PromptBatch(images=IMAGES, masks=some_masks(), points=POINTS, point_labels=LABELS),
}


@pytest.fixture
def refiner() -> SAM2Refiner:
    torch.manual_seed(0)
    return SAM2Refiner(Sam2Segmenter("hiera_nano", frame_size=SIZE), SMALL).eval()


def perturbed(refiner: SAM2Refiner) -> SAM2Refiner:
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in refiner.trained_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return refiner


def test_it_is_a_segmenter(refiner):
    assert isinstance(refiner, Segmenter)
    assert refiner.normalize(torch.full((1, 3, SIZE, SIZE), 128.0)).shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("best_of_three", [False, True])
@torch.no_grad()
def test_untrained_it_gives_sam_2s_masks(refiner, kind, best_of_three):
    refiner.sam.best_of_three = best_of_three
    expected = refiner.sam.segment(refiner.sam.encode(frames()), PROMPTS[kind])
    made = refiner.segment(refiner.encode(frames()), PROMPTS[kind])
    assert torch.allclose(made.logits, expected.logits, atol=1e-5)
    assert torch.allclose(made.scores, expected.scores, atol=1e-5)
    large = F.interpolate(expected.logits[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(made.final, large, atol=1e-5)


@pytest.mark.parametrize("kind", PROMPTS)
@torch.no_grad()
def test_prompts_are_masked_each_by_itself(refiner, kind):
    perturbed(refiner).prompts_at_once = 2
    prompted = PROMPTS[kind]
    embedded = refiner.encode(frames())
    together = refiner.segment(embedded, prompted)
    for row in range(3):
        alone = refiner.segment(embedded, prompted.at(slice(row, row + 1)))
        for one, all_of_them in (
            (alone.final, together.final),
            (alone.logits, together.logits),
            (alone.scores, together.scores),
            (alone.extra["pointers"], together.extra["pointers"]),
            (alone.extra["object_scores"], together.extra["object_scores"]),
        ):
            assert torch.allclose(one[0], all_of_them[row], atol=1e-4)


@torch.no_grad()
def test_images_are_embedded_each_by_itself(refiner):
    perturbed(refiner)
    prompted = replace(PROMPTS["box"].at(slice(0, 1)), images=torch.tensor([0]))
    alone = refiner.segment(refiner.encode(frames()[1:]), prompted).final
    together = refiner.segment(refiner.encode(frames()), PROMPTS["box"]).final
    assert torch.allclose(alone[0], together[0], atol=1e-4)


def test_every_module_learns_and_sam_2_does_not(refiner):
    perturbed(refiner).train()
    assert not refiner.sam.training
    assert refiner.localization.training
    made = refiner.segment(refiner.encode(frames()), PROMPTS["box and points"])
    masked = refiner.segment(refiner.encode(frames()), PROMPTS["mask"])
    (made.final.square().mean() + masked.final.square().mean()).backward()
    without = {name for name, p in refiner.trained_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # softmax is blind to what all keys share
    assert without <= {"retargeting.key.bias", *(f"localization.layers.{i}.key.bias" for i in range(SMALL.layers))}
    assert all(p.grad is None and not p.requires_grad for p in refiner.sam.parameters())
    names = [name for name, _ in refiner.trained_parameters()]
    assert {name.split(".")[0] for name in names} == {"localization", "retargeting", "refinement"}


def test_a_few_steps_mask_an_object_better_and_leave_sam_2_as_it_was(refiner):
    before = {name: value.clone() for name, value in refiner.sam.state_dict().items()}
    refiner.train()
    views = refiner.look(frames(1))
    assert not views.local_fine.requires_grad
    ground_truth = torch.zeros(1, SIZE, SIZE)
    ground_truth[0, 10:41, 7:31] = 1
    prompted = PromptBatch(images=torch.tensor([0]), boxes=torch.tensor([[7.0, 10.0, 30.0, 40.0]]))
    optimizer = torch.optim.AdamW([p for _, p in refiner.trained_parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        parts = mask_losses(refiner.segment(refiner.renewed(views), prompted).final, ground_truth)
        loss = parts["bce"] + parts["dice"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in refiner.sam.state_dict().items())


@torch.no_grad()
def test_memory_may_take_the_embeddings_place(refiner):
    perturbed(refiner)
    embedded = refiner.encode(frames())
    expected = refiner.segment(embedded, PROMPTS["unequal points"])
    conditioned = embedded.embedding[IMAGES]
    same = refiner.segment(embedded, PROMPTS["unequal points"], conditioned=conditioned)
    assert torch.allclose(same.final, expected.final, atol=1e-4)
    other = refiner.segment(embedded, PROMPTS["unequal points"], conditioned=conditioned.flip(3))
    assert not torch.allclose(other.final, expected.final, atol=1e-2)


@torch.no_grad()
def test_untrained_it_tracks_as_sam_2_does(refiner):
    """An object boxed on the first frame and found on the second by SAM 2's memory."""
    video = Sam2(refiner.sam.base)
    features = video.encode(frames())
    first = video.decode(features.at(torch.tensor([0])), ObjectPrompts(boxes=BOXES[:1]))
    made = refiner.segment(refiner.encode(frames()), PromptBatch(images=torch.tensor([0]), boxes=BOXES[:1]))
    assert torch.allclose(made.logits, first.masks, atol=1e-5)
    assert torch.allclose(made.extra["pointers"], first.pointers, atol=1e-5)
    assert torch.allclose(made.extra["object_scores"], first.scores, atol=1e-5)

    one = torch.zeros(1, 1, dtype=torch.long)
    slots = Slots(maps=one, positions=one, pointers=one, distances=torch.ones(1, 1) / 15)
    embedded = refiner.encode(frames())
    bare = embedded.embedding - refiner.sam.base.no_mem_embed.reshape(1, -1, 1, 1)
    found = []
    for embedding, masks, pointers, scores in (
        (features.embedding, first.masks, first.pointers, first.scores),
        (bare, made.logits, made.extra["pointers"], made.extra["object_scores"]),
    ):
        bank = MemoryBank(maps=video.encode_memory(embedding[:1], masks, scores), pointers=pointers)
        found.append(condition_on_memory(video, prepare_frames(video, embedding), torch.tensor([1]), bank, slots))
    expected = video.decode(features.at(torch.tensor([1])), ObjectPrompts(), embedding=found[0])
    made = refiner.segment(embedded, PromptBatch(images=torch.tensor([1])), conditioned=found[1])
    assert torch.allclose(made.logits, expected.masks, atol=1e-4)


@torch.no_grad()
def test_it_runs_at_half_precision(refiner):
    perturbed(refiner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = refiner.segment(refiner.encode(frames()), PROMPTS["box and points"])
    assert made.final.dtype == made.logits.dtype == torch.float32
    assert made.final.isfinite().all()


def test_learned_parameters_on_hiera_large():
    with torch.device("meta"):
        refiner = SAM2Refiner(Sam2Segmenter("hiera_l"))
    learned = sum(parameter.numel() for _, parameter in refiner.trained_parameters())
    # 12 M learnable of 228 M (supplement, Table 2)
    assert learned == pytest.approx(12e6, rel=0.15)
    assert sum(p.numel() for p in refiner.parameters()) == pytest.approx(228e6, rel=0.15)


def test_sub_images_are_the_quarters_at_twice_the_size():
    given = frames()
    parts = sub_images(given)
    half = SIZE // 2
    for image in range(2):
        for place, (y, x) in enumerate(((0, 0), (0, half), (half, 0), (half, half))):
            quarter = given[image : image + 1, :, y : y + half, x : x + half]
            enlarged = F.interpolate(quarter, (SIZE, SIZE), mode="bilinear", align_corners=False)
            assert torch.equal(parts[4 * image + place], enlarged[0])


def test_quarters_are_stitched_where_they_were():
    given = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    quarters = [given[i, :, y : y + 4, x : x + 4] for i in range(2) for y in (0, 4) for x in (0, 4)]
    assert torch.equal(stitched(torch.stack(quarters)), given)


def test_local_and_global_positions_are_of_one_frame():
    coarse, fine = grid_positions(2, 64, torch.device("cpu")), grid_positions(4, 64, torch.device("cpu"))
    assert coarse.tolist() == [[16, 16], [48, 16], [16, 48], [48, 48]]
    assert torch.equal(F.avg_pool2d(fine.T.view(1, 2, 4, 4), 2)[0].flatten(1).T, coarse)


@torch.no_grad()
def test_localization_takes_in_all_of_the_parts():
    torch.manual_seed(0)
    module = LocalizationAugment(32, layers=1, reduction=2, widening=2)
    nn.init.normal_(module.layers[0].get_parameter("out.weight"))
    embedding, local = torch.randn(1, 32, 2, 2), torch.randn(1, 32, 4, 4)
    places, local_places = torch.randn(4, 32), torch.randn(16, 32)
    before = module(embedding, local, places=places, local_places=local_places)
    for y, x in ((0, 0), (3, 3)):
        other = local.clone()
        other[..., y, x] += 1.0
        other[:, ::2, y, x] -= 3.0
        changed = (module(embedding, other, places=places, local_places=local_places) - before).abs().amax(1)
        assert (changed > 1e-4).all()


def test_rfb_branches_reach_as_far_as_their_size_says():
    torch.manual_seed(0)
    block = RFB(3, 4)
    for branch, n in zip(block.branches, (3, 5, 7), strict=True):
        x = torch.randn(1, 3, 41, 41, requires_grad=True)
        branch(x)[0, :, 20, 20].square().sum().backward()
        assert x.grad is not None
        y, across = x.grad[0].abs().sum(0).nonzero().unbind(1)
        # 1 x n and n x 1 to n // 2, then three taps n apart
        assert (y.min(), y.max(), across.min(), across.max()) == (*(2 * (20 - n - n // 2, 20 + n + n // 2)),)
    assert block(torch.randn(2, 3, 9, 9)).shape == (2, 4, 9, 9)


def test_the_rfb_shortcut_is_added():
    block = RFB(3, 4)
    for parameter in block.merge.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(block(x), block.shortcut(x))


def test_windows_are_where_the_prompts_are():
    windows, kinds = prompt_windows(PROMPTS["box and points"], 12, SIZE)
    assert kinds.tolist() == [[1, 0, BOX], [1, 1, BOX], [0, 1, BOX]]
    assert windows[0].tolist() == [[4.5, 6.5, 16.5, 18.5], [34.5, 44.5, 46.5, 56.5], [4, 5, 31, 41]]
    masks = torch.full((2, 16, 16), -1.0)
    masks[0, 2:4, 5] = 1.0
    windows, kinds = prompt_windows(PromptBatch(images=torch.tensor([0, 0]), masks=masks), 12, SIZE)
    assert kinds.tolist() == [[MASK], [MASK]]
    # pixels of 4; an empty mask has the whole frame
    assert windows.tolist() == [[[20, 8, 24, 16]], [[0, 0, 64, 64]]]
    windows, _ = prompt_windows(PromptBatch(images=torch.tensor([0, 0])), 12, SIZE)
    assert windows.shape == (2, 0, 4)


def test_patches_are_taken_where_the_windows_are():
    windows = torch.tensor([[[4.0, 8.0, 12.0, 24.0]]])
    at = window_positions(windows, 2)
    assert at[0, 0].tolist() == [[[6, 12], [10, 12]], [[6, 20], [10, 20]]]
    # a map whose values are its positions gives them back
    side = 16
    ramp = grid_positions(side, SIZE, torch.device("cpu")).T.view(1, 2, side, side)
    taken = F.grid_sample(ramp, (at / SIZE * 2 - 1).flatten(1, 2), align_corners=False)
    assert torch.allclose(taken[0].permute(1, 2, 0), at[0, 0])


@torch.no_grad()
def test_a_prompt_changes_the_embedding_that_the_decoder_reads(refiner):
    perturbed(refiner)
    embedded = refiner.encode(frames()).at(torch.tensor([0, 0]))
    prompted = PromptBatch(
        images=torch.tensor([0, 1]), points=torch.tensor([[[5.0, 5.0]], [[55.0, 40.0]]]), point_labels=torch.ones(2, 1)
    )
    renewed = refiner.retargeting(
        embedded.embedding, embedded.thin, prompted, places=refiner._places(SIZE // 16), encode=refiner._encoded
    )
    assert not torch.allclose(renewed[0], renewed[1], atol=1e-4)
