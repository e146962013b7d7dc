"""RFMedSAM 2 on CUDA against the CPU: a training step, its gradients, memory attention, and prediction of a volume."""

from __future__ import annotations

import pytest
import torch
from support.small_rfmedsam2 import small_unet
from torch import Tensor

from rfmedsam2.inference.refined_tiles import Tiling
from rfmedsam2.inference.refinement import predict_refined_slabs
from rfmedsam2.inference.sliding_window import Execution
from rfmedsam2.losses import deep_supervision_losses, segmentation_losses
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.memory_attention import condition_on_memory, prepare_frames
from rfmedsam2.nn.sam2.memory_selection import select
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import MemoryBank
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.model import AdapterConfig, RFMedSam2Config
from rfmedsam2.records.plan import Inference, SegmentationLoss

LABELS = LabelSet.model_validate({"names": {"background": 0, "a": 1, "b": 2}})
UNET = small_unet()
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def make_network() -> RFMedSam2:
    """Away from the zeros at which parts begin, so that no part can be left out unnoticed."""
    torch.manual_seed(0)
    config = RFMedSam2Config(
        unet=UNET,
        backbone="nano",
        frame_size=32,
        freeze_backbone=False,
        adapters=AdapterConfig(blocks="none", convolutions="none"),
    )
    network = RFMedSam2(config, channels=1, outputs=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def training_step(device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses of all steps, and the gradients of all parameters."""
    network = make_network().train().to(device)
    target = (noise(1, 4, 32, 32, seed=2) > 0.5).long() + (noise(1, 4, 32, 32, seed=3) > 1).long()
    steps = network.steps(noise(1, 1, 4, 32, 32).to(device))
    parts: dict[str, Tensor] = {}
    for number, logits in steps.logits.items():
        loss = segmentation_losses if isinstance(logits, Tensor) else deep_supervision_losses
        found = loss(logits, target.to(device), LABELS, SegmentationLoss())
        parts |= {f"step{number}/{name}": part for name, part in found.items()}
    torch.stack(list(parts.values())).sum().backward()
    gradients = {name: p.grad.cpu() for name, p in network.named_parameters() if p.grad is not None}
    return {name: float(part.detach()) for name, part in parts.items()}, gradients


def test_a_training_step_has_the_losses_and_gradients_of_the_cpu(device: torch.device) -> None:
    (losses, gradients), (expected, wanted) = training_step(device), training_step(torch.device("cpu"))
    assert {name.partition("/")[0] for name in losses} == {"step0", "step1", "step2"}
    assert losses == pytest.approx(expected, rel=1e-3)
    assert gradients.keys() == wanted.keys()
    for part in ("unet", "sam.base.memory_attention", "sam.base.memory_encoder", "sam.base.image_encoder"):
        ours, theirs = (
            torch.cat([g.flatten() for name, g in found.items() if name.startswith(part)])
            for found in (gradients, wanted)
        )
        assert theirs.norm() > 0, part
        assert (ours - theirs).norm() < 0.02 * theirs.norm(), part


@pytest.mark.parametrize("strategy", ["sam2", "preceding", "both"])
@torch.no_grad()
def test_memory_attention_gives_what_it_gives_on_the_cpu(strategy: str, device: torch.device) -> None:
    frames, kinds, side = 10, 2, 4
    torch.manual_seed(0)
    sam = Sam2(build_base("nano", frame_size=16 * side)).eval()
    for parameter in sam.base.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    maps = noise(frames * kinds, sam.memory_channels, side, side)
    pointers, embedding = noise(frames * kinds, sam.channels, seed=2), noise(frames, sam.channels, side, side, seed=3)
    rows = torch.arange(frames * kinds).view(frames, kinds)
    objects = torch.cartesian_prod(torch.arange(0, frames, 3), torch.arange(kinds))
    results = []
    for place in (torch.device("cpu"), device):
        there = sam.to(place)
        bank = MemoryBank(maps=maps.to(place), pointers=pointers.to(place))
        prepared, asked = prepare_frames(there, embedding.to(place)), objects.to(place)
        found = torch.full((len(objects), *embedding.shape[1:]), torch.nan)
        for bucket in select(strategy, rows.to(place), asked):  # type: ignore[arg-type]
            conditioned = condition_on_memory(there, prepared, asked[bucket.objects, 0], bank, bucket.slots)
            found[bucket.objects.cpu()] = conditioned.cpu()
        results.append(found)
    assert torch.isfinite(results[0]).all()
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_volume_is_predicted_as_on_the_cpu(precision: str, device: torch.device) -> None:
    tiling = Tiling(patch_size=(4, 32, 32), inference=Inference(step_size=0.5, mirror=False), mirror_axes=())
    image = noise(1, 9, 40, 36)

    def predicted(place: torch.device) -> Tensor:
        slabs = predict_refined_slabs(
            [make_network().eval().to(place)],
            image,
            tiling=tiling,
            device=place,
            execution=Execution(precision=precision),  # type: ignore[arg-type]
        )
        with torch.inference_mode():
            return torch.cat([slab.logits.cpu().clone() for slab in slabs], dim=1)

    found, expected = predicted(device), predicted(torch.device("cpu"))
    assert found.shape == (3, 9, 40, 36)
    assert expected.std() > 0.01
    agreeing = (found.argmax(0) == expected.argmax(0)).float().mean()
    assert agreeing > (0.995 if precision == "fp32" else 0.95)
