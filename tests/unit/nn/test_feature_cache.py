"""Features kept for frames that come again: the same results, a bounded store, refused where they would be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rfmedsam2.errors import RecordError
from rfmedsam2.nn.feature_cache import FeatureCache
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.prompts import Prompts
from rfmedsam2.records.model import AdapterConfig, RFMedSam2Config
from rfmedsam2.records.plan import Augmentation, Compute, Normalization, Stage

pytestmark = pytest.mark.slow

STILL = Augmentation().model_copy(
    update={name: 0.0 for name in Augmentation.model_fields if name.endswith("_probability")} | {"mirror_axes": (0,)}
)
FROZEN = {"freeze_backbone": True, "adapters": AdapterConfig(encoder=False)}


class Encoder:
    """Two levels of three and one channels; counts the frames that it sees."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, frames: Tensor) -> tuple[Tensor, ...]:
        self.seen += len(frames)
        return torch.cat([frames, frames * 2, frames / 3], 1), frames[..., ::2, ::2]


BYTES_EACH = 2 * (3 * 64 + 16)


def frames_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def stage_of(augmentation: Augmentation = STILL, cache_mb: int = 64) -> Stage:
    return Stage(
        spacing_mm=(1, 1, 1),
        median_shape=(16, 64, 64),
        patch_size=(4, 64, 64),
        batch_size=1,
        normalization=(Normalization(kind="ct"),),
        augmentation=augmentation,
        compute=Compute(cache_features_mb=cache_mb),
        model=RFMedSam2Config(generator="gt", unet=None, backbone="mobile_sam", frame_size=64, **FROZEN),
    )


def test_frames_that_come_again_are_not_encoded_again() -> None:
    cache, encoder, frames = FeatureCache(1), Encoder(), frames_of(5)
    first = cache.levels(frames, encoder)
    again = cache.levels(frames.flip(0), encoder)
    assert (encoder.seen, cache.asked, cache.found) == (5, 10, 5)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.flip(0), two)


def test_features_are_the_encoders_rounded_to_half_precision() -> None:
    frames = frames_of(4)
    for level, expected in zip(FeatureCache(1).levels(frames, Encoder()), Encoder()(frames), strict=True):
        assert level.dtype == torch.float32
        assert torch.equal(level, expected.half().float())


def test_a_batch_of_old_new_and_repeated_frames_keeps_its_order() -> None:
    cache, encoder, frames = FeatureCache(1), Encoder(), frames_of(6)
    cache.levels(frames[:3], encoder)
    order = torch.tensor([4, 0, 5, 4, 2])
    level = cache.levels(frames[order], encoder)[1]
    assert torch.equal(level, frames[order][..., ::2, ::2].half().float())
    assert encoder.seen == 5


def test_one_other_pixel_is_another_frame() -> None:
    cache, encoder, frames = FeatureCache(1), Encoder(), frames_of(1)
    cache.levels(frames, encoder)
    frames[0, 0, 3, 3] += 1e-6
    cache.levels(frames, encoder)
    assert encoder.seen == 2


def test_memory_is_bounded_and_the_frame_used_longest_ago_goes_first() -> None:
    cache, encoder, frames = FeatureCache(3 * BYTES_EACH / 1e6), Encoder(), frames_of(4)
    for i in (0, 1, 2, 0, 3):
        cache.levels(frames[i : i + 1], encoder)
        assert cache.kept_bytes <= 3 * BYTES_EACH
    assert encoder.seen == 4
    cache.levels(frames[[0, 2, 3]], encoder)
    assert encoder.seen == 4
    cache.levels(frames[[1]], encoder)
    assert encoder.seen == 5


def test_a_batch_larger_than_the_store_comes_back_whole() -> None:
    cache, frames = FeatureCache(2 * BYTES_EACH / 1e6), frames_of(5)
    level = cache.levels(frames, Encoder())[1]
    assert torch.equal(level, frames[..., ::2, ::2].half().float())
    assert cache.kept_bytes == 2 * BYTES_EACH


def test_a_frame_larger_than_the_store_is_not_kept() -> None:
    cache = FeatureCache(1e-6)
    assert len(cache.levels(frames_of(2), Encoder())[0]) == 2
    assert cache.kept_bytes == 0


def test_values_beyond_half_precision_stay_finite() -> None:
    level = FeatureCache(1).levels(frames_of(1) * 1e6, Encoder())[0]
    assert torch.isfinite(level).all()


def test_bfloat16_stays_as_it_is() -> None:
    level = FeatureCache(1).levels(frames_of(2), lambda frames: (frames.bfloat16() * 1e30,))[0]
    assert level.dtype == torch.bfloat16
    assert torch.isfinite(level).all()


def test_a_tally_counts_since_the_one_before() -> None:
    cache, frames = FeatureCache(1), frames_of(2)
    cache.levels(frames, Encoder())
    cache.levels(frames, Encoder())
    assert "2 of 4 slices" in cache.hits()
    assert "0 of 0 slices" in cache.hits()


def test_an_encoder_that_learns_keeps_no_features() -> None:
    with pytest.raises(RecordError, match=r"encoder that learns(.|\n)*model.adapters.encoder and .channels false"):
        Stage.parse(changed(stage_of(), "model", "adapters", "encoder", to=True))


def test_augmentation_that_changes_frames_is_named() -> None:
    changing = STILL.model_copy(update={"gamma_probability": 0.3, "mirror_axes": (0, 2)}).model_dump()
    with pytest.raises(RecordError, match=r"augmentation.gamma_probability, augmentation.mirror_axes"):
        Stage.parse(changed(stage_of(), "augmentation", to=changing))
    assert Stage.parse(changed(stage_of(cache_mb=0), "augmentation", to=changing)).compute.cache_features_mb == 0
    assert len(Augmentation().changes_of_frames) == 10


def changed(stage: Stage, *path: str, to: object) -> dict[str, Any]:
    data = inner = stage.model_dump()
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return data


def network(cache: FeatureCache | None = None) -> RFMedSam2:
    torch.manual_seed(0)
    model = RFMedSam2(stage_of().model, channels=1, outputs=3, cache=cache)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():  # away from the zeros at which parts begin
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.train()


def losses_of(model: RFMedSam2, *, rounds: int) -> list[float]:
    """Losses of steps of training on two patches in turn."""
    volumes = torch.randn(2, 1, 1, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    box = torch.tensor([10.0, 12.0, 50.0, 40.0]).expand(2, 2, 4)
    given = Prompts(boxes=box, present=torch.ones(2, 2, dtype=torch.bool))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for i in range(rounds):
        logits = model.steps(volumes[i % 2], given).logits[2]
        assert isinstance(logits, Tensor)
        loss = (logits / 10).tanh().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_with_kept_features_has_the_same_losses() -> None:
    cache = FeatureCache(64)
    kept, anew = losses_of(network(cache), rounds=4), losses_of(network(), rounds=4)
    torch.testing.assert_close(kept, anew, rtol=2e-3, atol=1e-4)
    assert (cache.asked, cache.found) == (8, 4)


def test_an_encoder_that_does_not_learn_has_nothing_to_learn() -> None:
    learning = {name for name, p in network().named_parameters() if p.requires_grad}
    assert not [name for name in learning if name.startswith(("channel_adapter", "sam.base.image_encoder"))]
    assert any(name.startswith("sam.base.sam_mask_decoder.conv_s0") for name in learning)
