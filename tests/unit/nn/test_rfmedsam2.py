"""RFMedSAM 2's steps on patches: shapes, gradients, chunks, what is decoded and what is not."""

from __future__ import annotations

import pytest
import torch
from support.small_rfmedsam2 import boxes, config, network, patch, small_unet

from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.errors import RecordError, UsageError
from rfmedsam2.nn.refinement_state import (
    ABSENT,
    one_against_rest,
    prompts_of,
    relative_to_background,
    scatter_masks,
    with_background,
)
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.records.model import AdapterConfig
from rfmedsam2.records.plan import Compute, Sampling

pytestmark = pytest.mark.slow


def test_class_maps_keep_the_softmax_of_the_network() -> None:
    logits = torch.randn(2, 4, 3, 3)
    relative = relative_to_background(logits, regions=False)
    again = with_background(relative, 1, regions=False)[0].transpose(0, 1)
    torch.testing.assert_close(again.softmax(1), logits.softmax(1))


def test_one_against_rest_is_positive_where_a_class_holds_more_than_half() -> None:
    logits = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(one_against_rest(logits, regions=False) > 0, logits.softmax(1)[:, 1:] > 0.5)


def test_prompts_follow_the_largest_class_above_background() -> None:
    class_map = torch.full((1, 2, 8, 8), -1.0)
    class_map[0, 0, 2:5, 3:7] = 1.0
    class_map[0, 1, 2:5, 5:7] = 2.0
    found = prompts_of(class_map, regions=False)
    assert found.present.tolist() == [[True, True]]
    assert found.boxes[0].tolist() == [[3, 2, 4, 4], [5, 2, 6, 4]]


def test_placing_no_cells_changes_nothing() -> None:
    class_map = torch.randn(2, 3, 4, 4)
    assert scatter_masks(class_map, torch.empty(0, 2, dtype=torch.long), torch.empty(0, 4, 4)) is class_map


@pytest.mark.parametrize("output", ["replace", "detail", "correct"])
@pytest.mark.parametrize("strategy", ["sam2", "preceding", "following", "both"])
def test_every_step_gives_logits_of_the_patch(output: str, strategy: str) -> None:
    model = network(output=output, strategy=strategy)
    volumes = patch(batch=2)
    for step in (0, 1, 2):
        with torch.inference_mode():
            assert model(volumes, step=step).shape == (2, 3, 4, 32, 32)


def test_all_trained_parameters_get_gradients_from_the_last_step() -> None:
    model = network(output="correct", object_scores=False)
    with torch.no_grad():  # away from the zeros at which parts begin
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    steps = model.train().steps(patch())
    assert isinstance(steps.logits[2], torch.Tensor)
    steps.logits[2].square().sum().backward()
    without = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert without <= {"sam"}
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("unet", "sam.base.memory_attention", "sam.base.memory_encoder", "sam.base.image_encoder"):
        assert any(name.startswith(part) for name in grads), part


def test_without_propagation_the_prompter_learns_from_its_own_loss_alone() -> None:
    model = network(output="correct", propagate_loss=False).train()
    steps = model.steps(patch())
    last = steps.logits[2]
    assert isinstance(last, torch.Tensor)
    last.square().sum().backward()
    assert model.unet is not None
    assert all(p.grad is None for p in model.unet.parameters())
    assert any(p.grad is not None for p in model.sam.parameters())
    own = steps.logits[0]
    (own if isinstance(own, torch.Tensor) else own[0]).square().sum().backward()
    assert any(p.grad is not None for p in model.unet.parameters())
    with pytest.raises(RecordError, match="needs propagate_loss"):
        config(generator="gt", unet=None, output="replace", propagate_loss=False)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_neither_results_nor_gradients(precision: torch.dtype) -> None:
    gradients, runtime = [], Runtime(device=torch.device("cpu"), precision=precision)
    for checkpointing in (True, False):
        model = network(output="correct", compute=Compute(checkpointing=checkpointing)).train()
        # in bf16, maps narrower than the kernel are convolved in float32, also where they are computed again
        with runtime.whole_gradients():
            with runtime.autocast():
                result = model.steps(patch()).logits[2]
            assert isinstance(result, torch.Tensor)
            result.float().square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_chunks_do_not_change_results() -> None:
    volumes, no_memory = patch(), Compute().model_copy(update={"memory_mb": 0})
    with torch.inference_mode():
        at_once = network(output="detail")(volumes)
        one_by_one = network(output="detail", compute=no_memory)(volumes)
    torch.testing.assert_close(at_once, one_by_one, atol=1e-4, rtol=1e-4)


def test_a_correction_starts_at_the_prompt() -> None:
    model, volumes = network(output="correct"), patch()
    with torch.inference_mode():
        results = model.steps(volumes).logits
    assert isinstance(results[0], torch.Tensor)
    for step in (1, 2):
        torch.testing.assert_close(results[step].softmax(1), results[0].softmax(1))


def test_cells_without_a_prompt_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(generator="gt", unet=None)
    given = boxes(4, 2)
    given.present[:, 1] = False
    with torch.inference_mode():
        logits = model(patch(), given)
    assert (logits[:, 2] == ABSENT).all()
    assert (logits[:, 1] != ABSENT).any()


def test_training_decodes_at_most_so_many_cells_and_predicting_all() -> None:
    model = network(generator="gt", unet=None, sampling=Sampling(max_prompted_objects=3)).train()
    with torch.no_grad():
        assert len(model.steps(patch(), boxes(4, 2)).objects) == 8
    torch.manual_seed(0)
    drawn = model.steps(patch(), boxes(4, 2)).objects
    assert len(drawn) == len(drawn.unique(dim=0)) == 3


def test_a_patch_without_any_prompt_keeps_step_0() -> None:
    model = network(generator="gt", unet=None)
    given = boxes(4, 2)
    given.present[:] = False
    with torch.inference_mode():
        logits = model(patch(), given)
    assert (logits[:, 1:] == ABSENT).all()


def test_a_model_of_boxes_asks_for_them() -> None:
    with pytest.raises(UsageError, match="none were given"):
        network(generator="gt", unet=None)(patch())


def test_a_step_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="does not have this step"):
        network(refinements=1)(patch(), step=2)


@pytest.mark.parametrize(
    "generator", ["object_queries", "scored_object_queries", "point_embeddings", "hierarchical_masks"]
)
def test_generators_on_features_give_logits(generator: str) -> None:
    model = network(generator=generator, unet=None, object_scores=generator == "scored_object_queries")
    with torch.inference_mode():
        assert model(patch(), None).shape == (1, 3, 4, 32, 32)


def test_regions_channels_2d_prompters_and_other_frame_sizes() -> None:
    model = network(
        channels=4, outputs=2, regions=True, frame_size=64, unet=small_unet(2, attention=True), output="detail"
    )
    with torch.inference_mode():
        assert model(patch(channels=4)).shape == (1, 2, 4, 32, 32)


def test_frozen_backbones_learn_by_adapters_alone() -> None:
    with torch.device("meta"):
        model = RFMedSam2(
            config(backbone="sam2_tiny", frame_size=64, freeze_backbone=True, adapters=AdapterConfig()),
            channels=1,
            outputs=3,
        )
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.startswith("channel_adapter") for n in learning)
    assert not any("patch_embed" in n or "qkv" in n for n in learning)
    assert sum(p.numel() for p in model.sam.base.parameters() if not p.requires_grad) == pytest.approx(
        38.96e6, rel=1e-3
    )


@pytest.mark.parametrize("channels", [False, True])
def test_four_modalities_are_more_than_their_mean_once_the_channel_adapter_learns(channels: bool) -> None:
    adapters = AdapterConfig(encoder=False, channels=channels)
    model = network(channels=4, backbone="mobile_sam", frame_size=64, freeze_backbone=True, adapters=adapters).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    encoder = [p.clone() for p in model.sam.base.image_encoder.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        last = model.steps(patch(channels=4, frames=2)).logits[2]
        assert isinstance(last, torch.Tensor)
        last.square().mean().backward()
        optimizer.step()
    frames = patch(channels=4)[0].transpose(0, 1)
    mean = frames.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert torch.equal(model.channel_adapter(frames), mean) is not channels
    assert all(torch.equal(a, b) for a, b in zip(encoder, model.sam.base.image_encoder.parameters(), strict=True))


@pytest.mark.parametrize("backbone", ["nano", "mobile_sam", "sam2_tiny"])
def test_one_refinement_trains_nothing_of_the_memory(backbone: str) -> None:
    found = {}
    for refinements in (1, 2):
        with torch.device("meta"):
            model = RFMedSam2(
                config(
                    backbone=backbone, frame_size=64, freeze_backbone=backbone != "nano", adapters=AdapterConfig()
                ).model_copy(update={"refinements": refinements}),
                channels=1,
                outputs=3,
            )
        found[refinements] = {name for name, p in model.sam.base.named_parameters() if p.requires_grad}
    words = ("memory_attention", "memory_encoder", "maskmem", "obj_ptr", "no_obj_ptr", "no_mem_pos")
    assert any(name.startswith(words) for name in found[2])
    assert not any(name.startswith(words) for name in found[1])
    kept = {name for name in found[2] if not name.startswith((*words, "no_obj_embed"))}
    assert found[1] == kept
