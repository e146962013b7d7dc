"""Activations of one training step of RFMedSAM 2 (the BTCV plan: 32x256x256, 13 classes) against unmodified sam2.

Ours is a whole step, float32 on the CPU, every class prompted on every frame in both steps: bytes of all tensors that
are alive at once and were made since the step began, counted at every operation. That is what autograd keeps after the
forward pass, what the backward pass computes again of one chunk, and all gradients; the U-Net is included, and also
reported separately.

The peer's figure counts less: distinct storages that autograd keeps of one frame of the official SAM 2.1 (image
encoder, memory attention over six memories with their pointers, decoder, memory encoder; training mode), times the
frames. Neither counts weights.

With --device cuda a step in bfloat16 is run, torch.cuda.max_memory_allocated is ours (weights and gradients with it),
and is compared to a limit instead of the peer. With fewer --frames than 32, what grows with frames is scaled up, and
the output says so. Prints
one JSON object as its last line, in GiB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.live_storage import LiveStorage, kept_by_autograd  # pyright: ignore[reportMissingImports]

from rfmedsam2.losses import deep_supervision_losses, loss_of
from rfmedsam2.models import build_stage
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.prompts import Prompts
from rfmedsam2.records.plan import Plan
from rfmedsam2.system.atomic import read_record

ROOT = Path(__file__).resolve().parents[2]
FRAMES, SIZE = 32, 256
OFFICIAL = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
GPU_LIMIT_GIB = {"tiny": 12 / 1.073741824, "large": 24 / 1.073741824}
"""12 and 24 GB."""
GIB = 2**30


def everywhere(class_map: Tensor, *, regions: bool) -> Prompts:  # noqa: ARG001
    """Every class on every frame has a box."""
    box = torch.tensor([60.0, 50.0, 180.0, 200.0], device=class_map.device)
    frames, classes = class_map.shape[:2]
    present = torch.ones(frames, classes, dtype=torch.bool, device=class_map.device)
    return Prompts(boxes=box.expand(frames, classes, 4), present=present)


@contextmanager
def all_prompted() -> Iterator[None]:
    """Both steps decode every (slice, class), whatever untrained networks predict."""
    with patch("rfmedsam2.nn.refiner.prompts_of", everywhere), patch("rfmedsam2.nn.rfmedsam2.prompts_of", everywhere):
        yield


class Step:
    """One training step of ours.

    Args:
        backbone: tiny, small, base_plus or large.
        frames: number of frames of the patch.
        device: device to run on.
    """

    def __init__(self, backbone: str, *, frames: int, device: torch.device) -> None:
        plan = read_record(ROOT / "plans" / "btcv.json", Plan)
        stage = plan.stages["3d_fullres"]
        model = stage.model.model_copy(update={"backbone": f"sam2_{backbone}"})
        self._loss = loss_of(stage, plan.labels)
        torch.manual_seed(0)
        network = build_stage(plan, stage.model_copy(update={"model": model}))
        assert isinstance(network, RFMedSam2)
        self.network = network.to(device).train()
        self.volume = torch.randn(1, 1, frames, SIZE, SIZE, device=device)
        self.target = torch.randint(0, plan.labels.num_outputs, (1, frames, SIZE, SIZE), device=device)

    def forward(self) -> Tensor:
        """Sum of all losses, as the task has them."""
        steps = self.network.steps(self.volume)
        total = torch.zeros((), device=self.volume.device)
        for logits in steps.logits.values():
            if isinstance(logits, Tensor):
                parts = self._loss(logits.float(), self.target)
            else:
                parts = deep_supervision_losses(logits, self.target, self._loss)
            total = total + sum(parts.values())
        return total


def ours(backbone: str, frames: int) -> dict[str, float]:
    """GiB of a step on the CPU, per part."""
    step = Step(backbone, frames=frames, device=torch.device("cpu"))
    marks: dict[str, int] = {}
    live, network = LiveStorage(), step.network
    assert isinstance(network.unet, nn.Module)
    network.unet.register_forward_hook(lambda *_: marks.update(unet=live.now))
    with all_prompted(), live:
        loss = step.forward()
        kept, peaks = live.now, [live.peak]
        say(f"forward done: {kept / GIB:.2f} GiB kept, of it {marks['unet'] / GIB:.2f} the U-Net's")
        live.reset_peak()
        loss.backward()
        peaks.append(live.peak)
    gradients = sum(p.grad.untyped_storage().nbytes() for p in network.parameters() if p.grad is not None)
    say(f"backward done: {peaks[1] / GIB:.2f} GiB at most")
    scale = FRAMES / frames
    largest = max(peaks)
    return {
        "kept": kept * scale / GIB,
        "kept_by_unet": marks["unet"] * scale / GIB,
        "recomputed_chunk_and_gradients": (largest - kept) / GIB,
        "weight_gradients": gradients / GIB,
        "total": (kept * scale + largest - kept) / GIB,
    }


def ours_on_gpu(backbone: str, frames: int) -> float:
    """GiB that torch held at most in a step in bfloat16, including weights."""
    device = torch.device("cuda")
    step = Step(backbone, frames=frames, device=device)
    for _ in range(2):  # the first also holds what libraries set up
        torch.cuda.reset_peak_memory_stats()
        with all_prompted(), torch.autocast("cuda", torch.bfloat16):
            loss = step.forward()
        loss.backward()
        step.network.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() / GIB


def peer(backbone: str, classes: int, *, dropout: bool) -> dict[str, float]:
    """GiB that autograd keeps of the official model: one frame with six before it, times FRAMES."""
    sam = official(backbone)
    if not dropout:
        for module in sam.modules():
            for name in ("p", "dropout_p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    besides = [*sam.parameters(), *sam.buffers()]
    with kept_by_autograd(besides=besides) as encoder:
        encoded = sam.forward_image(torch.randn(1, 3, SIZE, SIZE))
    given = [*besides, *encoded["backbone_fpn"], *encoded["vision_pos_enc"]]
    with kept_by_autograd(besides=given) as rest:
        tracked = track(sam, encoded, classes)
    assert tracked["maskmem_features"].requires_grad
    each = encoder.bytes + rest.bytes
    say(f"sam2, a frame: encoder {encoder.bytes / 2**20:.0f} MiB, all the rest {rest.bytes / 2**20:.0f} MiB")
    return {"encoder": encoder.bytes * FRAMES / GIB, "total": each * FRAMES / GIB}


def official(backbone: str) -> SAM2Base:
    """SAM 2.1 from its own configuration, for frames of SIZE pixels, to be trained."""
    config = f"configs/sam2.1/sam2.1_hiera_{OFFICIAL[backbone]}.yaml"
    overrides = [f"++model.image_size={SIZE}"]
    sam: Any = build_sam2(config, device="cpu", hydra_overrides_extra=overrides, apply_postprocessing=False)
    return sam.train()


def track(sam: SAM2Base, encoded: dict[str, Any], classes: int) -> dict[str, Any]:
    """One frame of `classes` objects behind six that have memories, as the official video predictor treats it."""
    side = SIZE // 16
    expanded = {
        name: [m.expand(classes, -1, -1, -1) for m in encoded[name]] for name in ("backbone_fpn", "vision_pos_enc")
    }
    _, features, positions, sizes = sam._prepare_backbone_features(expanded)

    def memory() -> dict[str, Any]:
        return {
            "maskmem_features": torch.randn(classes, sam.mem_dim, side, side, requires_grad=True),
            "maskmem_pos_enc": [torch.randn(classes, sam.mem_dim, side, side)],
            "obj_ptr": torch.randn(classes, sam.hidden_dim, requires_grad=True),
        }

    corners = torch.tensor([[60.0, 50.0], [180.0, 200.0]]).expand(classes, 2, 2)
    return sam.track_step(
        frame_idx=6,
        is_init_cond_frame=False,
        current_vision_feats=features,
        current_vision_pos_embeds=positions,
        feat_sizes=sizes,
        point_inputs={"point_coords": corners, "point_labels": torch.tensor([2, 3]).expand(classes, 2)},
        mask_inputs=None,
        output_dict={
            "cond_frame_outputs": {0: memory()},
            "non_cond_frame_outputs": {frame: memory() for frame in range(1, 6)},
        },
        num_frames=FRAMES,
    )


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=OFFICIAL, default="tiny")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    backbone, frames = arguments.backbone, arguments.frames
    result: dict[str, Any] = {"name": f"train_memory_{backbone}_{arguments.device}"}
    if arguments.device == "cuda":
        assert frames == FRAMES, "on a GPU the whole step is run"
        total, other = ours_on_gpu(backbone, frames), GPU_LIMIT_GIB.get(backbone, GPU_LIMIT_GIB["large"])
    else:
        as_it_comes = peer(backbone, 13, dropout=True)
        result["peer_without_dropout"] = round(peer(backbone, 13, dropout=False)["total"], 2)
        parts = ours(backbone, frames)
        total, other = parts["total"], as_it_comes["total"]
        result |= {f"ours_{name}": round(value, 2) for name, value in parts.items() if name != "total"}
    result |= {"ours": round(total, 2), "peer": round(other, 2), "ratio": round(total / other, 4), "unit": "GiB"}
    if frames != FRAMES:
        result["extrapolated"] = f"from {frames} frames to {FRAMES}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
