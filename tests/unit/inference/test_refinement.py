"""Prediction with RFMedSAM 2: frames as a stream, tiles, flips, what is held and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rfmedsam2.errors import UsageError
from rfmedsam2.inference.frame_stream import FrameStream, clipped_boxes, flipped
from rfmedsam2.inference.refined_tiles import Planes, RefinedTiles, Request, Tiling
from rfmedsam2.inference.refinement import predict_refined_slabs, steps_of
from rfmedsam2.inference.sliding_window import Execution, Slab, predict_slabs, tile_starts
from rfmedsam2.nn.refinement_state import ABSENT, RefinementInput
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.prompts import Prompts, prompts_from_labels
from rfmedsam2.records.model import AdapterConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Inference

pytestmark = pytest.mark.slow

UNET = UNetConfig(
    features=(4, 8),
    kernel_sizes=((3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2)),
    encoder_blocks=(1, 1),
    decoder_blocks=(1,),
)
CLASSES = 3
SIDE = 32


def network(*, outputs: int = CLASSES + 1, channels: int = 1, regions: bool = False, seed: int = 0, **fields):
    torch.manual_seed(seed)
    given = {"unet": UNET, "backbone": "nano", "frame_size": SIDE, "adapters": AdapterConfig(blocks="none")}
    config = RFMedSam2Config.parse({**given, **fields})
    built = RFMedSam2(config, channels=channels, outputs=outputs, regions=regions)
    # untrained, it takes nothing from memories, and what is tested here would not show
    base: Any = built.sam.base
    with torch.no_grad():
        base.memory_attention.norm.weight.fill_(3.0)
        base.sam_mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(100)
    return built.eval()


def logits_of(frames: int, rows: int = SIDE, columns: int = SIDE, *, gaps: bool = True) -> Tensor:
    """Step 0 as if it had found three boxes that move along the frames (4, frames, rows, columns); gaps without any."""
    noise = torch.randn(CLASSES + 1, frames, rows, columns, generator=torch.Generator().manual_seed(2))
    logits = 0.3 * noise
    logits[0] += 4
    for frame in range(frames):
        for k in range(CLASSES):
            if (gaps and (frame + k) % 5 == 0) or (gaps and frame % 9 == 8):
                continue
            y, x = 3 + 7 * k + frame % 4, (5 + frame + 6 * k) % (columns - 12)
            logits[1 + k, frame, y : y + 6, x : x + 9] += 9
    return logits


def image_of(frames: int, rows: int = SIDE, columns: int = SIDE, channels: int = 1) -> Tensor:
    return torch.randn(channels, frames, rows, columns, generator=torch.Generator().manual_seed(1))


def tiling(step: float = 0.5, *, mirror: bool = False, axes: tuple[int, ...] = (0, 1, 2), frames: int = 8) -> Tiling:
    inference = Inference(step_size=step, mirror=mirror)
    return Tiling(patch_size=(frames, SIDE, SIDE), inference=inference, mirror_axes=axes)


def refined(net, image: Tensor, logits: Tensor | None, how: Tiling | None = None, **request) -> Tensor:
    """All frames' logits, with Step 0's given."""
    nets = net if isinstance(net, list) else [net]
    tiles = RefinedTiles(nets, image, tiling=how or tiling(), device=torch.device("cpu"), request=Request(**request))
    given = None if logits is None else [Slab(start=0, logits=logits)]
    return joined(tiles.slabs(given, Execution()))


def joined(slabs) -> Tensor:
    parts = list(slabs)
    assert [part.start for part in parts] == [sum(p.logits.shape[1] for p in parts[:i]) for i in range(len(parts))]
    return torch.cat([part.logits for part in parts], 1)


def relative(logits: Tensor) -> Tensor:
    return logits - logits[:1]


@pytest.mark.parametrize("strategy", ["preceding", "following", "both"])
def test_results_do_not_depend_on_how_many_frames_come_at_once(strategy) -> None:
    net = network(strategy=strategy)
    image, logits = image_of(20), logits_of(20)
    whole = refined(net, image, logits, frames_at_once=20)
    for frames in (1, 3, 7):
        torch.testing.assert_close(refined(net, image, logits, frames_at_once=frames), whole, atol=2e-4, rtol=1e-4)
    net.config = net.refiner.config = net.config.model_copy(update={"memory_frames": 0})
    assert (whole - refined(net, image, logits)).abs().max() > 0.2  # memories matter


@pytest.mark.parametrize("strategy", ["preceding", "following", "both"])
def test_a_frame_is_as_on_a_patch_that_holds_it_and_all_it_looks_at(strategy, monkeypatch) -> None:
    net = network(strategy=strategy)
    image, logits = image_of(24), logits_of(24)
    found = refined(net, image, logits, frames_at_once=5)
    first, place = {"preceding": (6, 6), "following": (12, 0), "both": (6, 6)}[strategy]
    part = slice(first, first + (13 if strategy == "both" else 7))
    monkeypatch.setattr(net, "prompt_volumes", lambda _: logits[None, :, part])
    with torch.inference_mode():
        patch = net(image[None, :, part])
    torch.testing.assert_close(found[:, first + place], patch[0, :, place], atol=2e-4, rtol=1e-4)
    before = refined(net, image, logits, step=1)
    assert (found[:, first + place] - before[:, first + place]).abs().max() > 1e-3


def test_sam2s_own_strategy_sees_windows_as_in_training(monkeypatch) -> None:
    net = network(strategy="sam2")
    image, logits = image_of(8), logits_of(8)
    found = refined(net, image, logits)
    monkeypatch.setattr(net, "prompt_volumes", lambda _: logits[None])
    with torch.inference_mode():
        expected = net(image[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert refined(net, image_of(21), logits_of(21)).shape == (CLASSES + 1, 21, SIDE, SIDE)
    assert refined(net, image_of(3), logits_of(3)).shape == (CLASSES + 1, 3, SIDE, SIDE)


@pytest.mark.parametrize("strategy", ["preceding", "following", "both"])
def test_what_is_held_does_not_grow_with_the_volume(strategy) -> None:
    net = network(strategy=strategy)
    held = []
    for frames in (20, 60):
        tiles = RefinedTiles(
            [net], image_of(frames), tiling=tiling(), device=torch.device("cpu"), request=Request(frames_at_once=4)
        )
        logits = logits_of(frames)
        slabs = (Slab(start=z, logits=logits[:, z : z + 5]) for z in range(0, frames, 5))
        most = max(slab.logits.shape[1] for slab in tiles.slabs(slabs, Execution()))
        held.append((tiles.held, most))
    assert held[0] == held[1]
    assert held[0][0] == (12 if strategy == "both" else 6)


def test_planes_are_given_in_any_portions_and_forgotten() -> None:
    logits = logits_of(21)
    sizes = [5, 8, 3, 5]
    starts = [sum(sizes[:i]) for i in range(4)]
    planes = Planes(Slab(start=s, logits=logits[:, s : s + n]) for s, n in zip(starts, sizes, strict=True))
    for start, stop in ((0, 4), (4, 10), (8, 20), (20, 21)):
        torch.testing.assert_close(planes.take(start, stop), logits[:, start:stop])
        assert planes.held <= 24 - start + 8
    assert planes.held == 5


def test_frames_and_tiles_without_a_prompt_are_not_encoded() -> None:
    net = network()
    logits = logits_of(16, 32, 64, gaps=False)
    logits[1:, :, :, 30:] = -9
    logits[1:, 4:12] = -9
    how = tiling(1.0)
    tiles = RefinedTiles(
        [net], image_of(16, 32, 64), tiling=how, device=torch.device("cpu"), request=Request(frames_at_once=8)
    )
    found = joined(tiles.slabs([Slab(start=0, logits=logits)], Execution()))
    assert tiles.encoded == 8  # of 32: the left tile on the first and the last four frames
    torch.testing.assert_close(found[:, 4:12], relative(logits)[:, 4:12])
    torch.testing.assert_close(found[..., 32:], relative(logits)[..., 32:])


def test_no_prompts_at_all_gives_step_0() -> None:
    logits = logits_of(9)
    logits[0] += 50
    for strategy in ("preceding", "both", "sam2"):
        found = refined(network(strategy=strategy), image_of(9), logits)
        torch.testing.assert_close(found, relative(logits), atol=1e-5, rtol=1e-5)


def test_tiles_cover_planes_of_any_size_and_small_ones_are_padded() -> None:
    net = network()
    for rows, columns in ((50, 77), (20, 40), (SIDE, 32)):
        found = refined(net, image_of(5, rows, columns), logits_of(5, max(rows, 26), columns)[:, :, :rows])
        assert found.shape == (CLASSES + 1, 5, rows, columns)
        assert found.isfinite().all()


def test_a_padded_plane_equals_the_plane_with_background_around_it() -> None:
    net = network()
    logits = logits_of(4)
    logits[0, ..., :6] = logits[0, ..., 26:] = 10
    logits[1:, ..., :6] = logits[1:, ..., 26:] = -10
    image = image_of(4)
    image[..., :6] = image[..., 26:] = 0
    small = refined(net, image[..., 6:26].contiguous(), logits[..., 6:26].contiguous())
    torch.testing.assert_close(small, refined(net, image, logits)[..., 6:26], atol=1e-4, rtol=1e-4)


def test_flips_in_the_plane_and_networks_are_averaged() -> None:
    nets = [network(seed=seed) for seed in (0, 1)]
    image, logits = image_of(6), logits_of(6)
    found = refined(nets, image, logits, tiling(mirror=True, axes=(0, 2)))
    parts = []
    for net in nets:
        parts.append(refined(net, image, logits))
        parts.append(refined(net, image.flip(-1), logits.flip(-1)).flip(-1))
    torch.testing.assert_close(found, torch.stack(parts).mean(0), atol=2e-4, rtol=1e-4)
    assert (parts[0] - parts[1]).abs().max() > 1e-3


def test_overlapping_tiles_are_averaged_by_their_weights() -> None:
    net = network()
    image, logits = image_of(3, SIDE, 48), logits_of(3, SIDE, 48)
    found = refined(net, image, logits)
    left, right = (
        refined(net, image[..., x : x + 32].contiguous(), logits[..., x : x + 32].contiguous()) for x in (0, 16)
    )
    torch.testing.assert_close(found[..., :16], left[..., :16], atol=1e-4, rtol=1e-4)
    inside = found[..., 16:32]
    low, high = torch.minimum(left[..., 16:], right[..., :16]), torch.maximum(left[..., 16:], right[..., :16])
    assert ((inside >= low - 1e-4) & (inside <= high + 1e-4)).all()


def test_step_0_is_the_u_nets_own_prediction() -> None:
    net = network()
    assert net.unet is not None
    image, how = image_of(13, 40, 40), tiling(mirror=True)
    found = joined(predict_refined_slabs([net], image, tiling=how, device="cpu", request=Request(step=0)))
    expected = predict_slabs(
        [net.unet],
        image,
        patch_size=how.patch_size,
        inference=how.inference,
        mirror_axes=how.mirror_axes,
        device="cpu",
        outputs=CLASSES + 1,
    )
    torch.testing.assert_close(found, joined(expected))
    assert steps_of(net.config) == (0, 1, 2)
    assert steps_of(UNET) == (0,)


def test_whole_volumes_go_through_all_steps_with_progress() -> None:
    seen = []

    def track(items, description, total):
        seen.append((description, total))
        return items

    net = network(channels=2)
    image = image_of(21, 40, 36, channels=2)
    slabs = predict_refined_slabs([net], image, tiling=tiling(), device="cpu", execution=Execution(track=track))
    assert joined(slabs).shape == (CLASSES + 1, 21, 40, 36)
    assert dict(seen)["tiles"] > 1  # of Step 0
    rows, columns = tile_starts((40, 36), (SIDE, SIDE), 0.5)
    assert dict(seen)["refined tiles"] == 3 * len(rows) * len(columns)


def test_regions_have_no_background() -> None:
    net = network(outputs=2, regions=True)
    found = joined(predict_refined_slabs([net], image_of(7), tiling=tiling(mirror=True), device="cpu"))
    assert found.shape == (2, 7, SIDE, SIDE)


@pytest.mark.parametrize(
    "generator", ["object_queries", "scored_object_queries", "point_embeddings", "hierarchical_masks", "gt"]
)
def test_generators_without_a_u_net_equal_their_steps(generator) -> None:
    net = network(generator=generator, unet=None)
    image = image_of(6)
    labels = logits_of(6)[:].argmax(0)
    boxes = prompts_from_labels(labels, CLASSES) if generator == "gt" else None
    found = refined(net, image, None, boxes=boxes, frames_at_once=4)
    with torch.inference_mode():
        expected = net(image[None], boxes)[0]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    one = refined(net, image, None, boxes=boxes, step=1)
    with torch.inference_mode():
        torch.testing.assert_close(one, net(image[None], boxes, step=1)[0], atol=2e-4, rtol=1e-4)


def test_masks_from_features_are_a_step_0() -> None:
    net = network(generator="hierarchical_masks", unet=None)
    image = image_of(3)
    found = refined(net, image, None, step=0)
    with torch.inference_mode():
        torch.testing.assert_close(found, net(image[None], step=0)[0], atol=1e-5, rtol=1e-5)


def test_frames_of_air_are_left_out_where_prompts_come_from_features() -> None:
    net = network(generator="object_queries", unet=None)
    image = image_of(10)
    image[:, 2:9] = -1.5
    how, place = tiling(), torch.device("cpu")
    tiles = RefinedTiles([net], image, tiling=how, device=place, request=Request(frames_at_once=4))
    found = joined(tiles.slabs(None, Execution(skip_empty=True)))
    assert tiles.encoded == 3  # of the second four frames none
    torch.testing.assert_close(found[1:, 2:9], torch.full_like(found[1:, 2:9], ABSENT))


def test_given_boxes_take_the_place_of_the_models_own() -> None:
    net = network(mask_prompt=False, output="replace")
    image, logits = image_of(5), logits_of(5, gaps=False)
    own = prompts_from_labels(logits.argmax(0), CLASSES)
    torch.testing.assert_close(
        refined(net, image, logits, boxes=own), refined(net, image, logits), atol=1e-5, rtol=1e-5
    )
    only = Prompts(boxes=own.boxes, present=own.present & (torch.arange(CLASSES) == 1))
    found = refined(net, image, logits, boxes=only, step=1)
    torch.testing.assert_close(found[1], relative(logits)[1])
    assert (found[2] - relative(logits)[2]).abs().max() > 0.1


def test_boxes_are_clipped_to_the_tile_and_gone_outside_it() -> None:
    boxes = torch.tensor([[[10.0, 12, 40, 20], [0, 0, 5, 5], [31, 31, 31, 31]]])
    prompts = Prompts(boxes=boxes, present=torch.ones(1, 3, dtype=torch.bool))
    found = clipped_boxes(prompts, (8, 16), (32, 32))
    assert found.present.tolist() == [[True, False, True]]
    assert found.boxes[0].tolist() == [[0, 4, 24, 12], [0, 0, 0, 0], [15, 23, 15, 23]]


def test_flipped_starts_mirror_maps_and_boxes_alike() -> None:
    labels = logits_of(4).argmax(0)
    start = RefinementInput(prompts=prompts_from_labels(labels, CLASSES), base_logits=labels[:, None].float())
    for dims in ((-1,), (-2,), (-2, -1)):
        found, expected = flipped(start, dims), prompts_from_labels(labels.flip(dims), CLASSES)
        torch.testing.assert_close(found.prompts.boxes, expected.boxes)
        torch.testing.assert_close(found.base_logits[:, 0], labels.flip(dims).float())


def test_a_stream_gives_frames_late_where_it_looks_ahead() -> None:
    net = network(strategy="following", memory_frames=2)
    stream = FrameStream(net, step=2)
    image, logits = image_of(6).transpose(0, 1), logits_of(6, gaps=False).transpose(0, 1)
    given = [stream.add(image[z : z + 3], net.start_from_logits(logits[z : z + 3]), last=z == 3) for z in (0, 3)]
    assert [len(part) for part in given] == [1, 5]


@pytest.mark.parametrize(
    ("fields", "request_", "words"),
    [
        ({"refinements": 1}, Request(step=2), "does not have this step"),
        ({"generator": "object_queries", "unet": None}, Request(step=0), "does not have this step"),
        ({"generator": "gt", "unet": None}, Request(), "none were given"),
        (
            {},
            Request(step=0, boxes=Prompts(boxes=torch.zeros(3, 3, 4), present=torch.zeros(3, 3).bool())),
            "does not accept boxes",
        ),
    ],
)
def test_what_a_model_cannot_do_is_a_sentence(fields, request_, words) -> None:
    with pytest.raises(UsageError, match=words):
        next(predict_refined_slabs([network(**fields)], image_of(3), tiling=tiling(), device="cpu", request=request_))
