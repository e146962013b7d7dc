#!/usr/bin/env python3
"""Step 2 of RFMedSAM 2: the official video predictor's loop over frames and objects against ours, one run.

usage: python scripts/benchmarks/memory_step.py [--frames 32] [--classes 13] [--device auto] [--repeats 2]

SAM 2.1 tiny at 256 pixels with random weights, equal on both sides, which are given the same frame features, memories
and boxes. Peer: `SAM2Base.track_step` per frame and object as `SAM2VideoPredictor` calls it: memory attention over the
current frame and six before with their pointers, decoding of the box, masks at full size. Ours: `select`,
`condition_on_memory` and `decode` in chunks of objects, masks at full size. On neither side:
the image encoder, the memory encoder.

Two rows. All: every class on every frame. Realistic: classes where they are in a real abdominal CT at 3 mm, in the
first 32 slices that show most organs (needs the real data sets, RFMED_TEST_DATA); the official predictor has no notion
of absent objects and tracks every one through every frame, ours leaves them out. The time of its loop for the present
objects alone is printed as well. The better of `--repeats` runs counts; the last line is JSON, ratio is ours over peer.
On a busy CPU look at `cpu_ratio`, of processor seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _harness.data import labels_with_most_organs
from torch import Tensor

from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.memory_attention import condition_on_memory, prepare_frames
from rfmedsam2.nn.sam2.memory_selection import select
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.types import FrameFeatures, MemoryBank, ObjectPrompts
from rfmedsam2.system.devices import choose_device

SIZE = 256
REACH = 6
CHUNK = {"cpu": 8, "cuda": 128}


def main() -> None:
    """Run both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--classes", type=int, default=13)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--chunk", type=int, help="objects per chunk; default: 8 on the CPU, 128 on a GPU")
    args = parser.parse_args()
    device = choose_device(args.device)
    case = Case(args.frames, args.classes, device)
    chunk = args.chunk or CHUNK.get(device.type, 8)
    everywhere = torch.ones(args.frames, args.classes, dtype=torch.bool, device=device)
    full, full_cpu = None, None
    result = {"name": "memory_step"}
    for row, present in (("all", everywhere), ("realistic", real_presence(args.frames, args.classes))):
        if present is None:
            print("realistic: not run, the real data sets are not available (RFMED_TEST_DATA)")
            continue
        present = present.to(device)
        mine, mine_s, mine_cpu = best(lambda p=present: case.ours(p, chunk), args.repeats, device)
        other, other_s, other_cpu = best(lambda p=present: case.peer(p), args.repeats, device)
        full, full_cpu = full or other_s, full_cpu or other_cpu
        objects = int(present.sum())
        difference = (mine - other).abs().max().item()
        print(
            f"{row}: {objects} objects, official loop {full:.2f} s (these objects alone {other_s:.2f} s), "
            f"ours {mine_s:.2f} s; ratio {mine_s / full:.2f} (these objects {mine_s / other_s:.2f}); "
            f"largest difference of mask logits {difference:.1e}, they span {other.std().item():.1e}"
        )
        end = "" if row == "all" else f"_{row}"
        result |= {f"ours{end}": round(mine_s, 3), "peer": round(full, 3), f"ratio{end}": round(mine_s / full, 3)}
        result[f"cpu_ratio{end}"] = round(mine_cpu / full_cpu, 3)
    print(json.dumps({**result, "device": device.type}))


class Case:
    """Random frames, memories and boxes of D frames and K classes, and both ways to decode them."""

    def __init__(self, frames: int, classes: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.sam = Sam2(build_base("sam2_tiny", frame_size=SIZE)).to(device).eval()
        side, channels, width = self.sam.side, self.sam.channels, self.sam.memory_channels
        self.frames, self.classes = frames, classes
        self.features = FrameFeatures(
            embedding=torch.randn(frames, channels, side, side, device=device),
            middle=torch.randn(frames, channels // 4, 2 * side, 2 * side, device=device),
            fine=torch.randn(frames, channels // 8, 4 * side, 4 * side, device=device),
        )
        objects = frames * classes
        self.bank = MemoryBank(
            maps=torch.randn(objects, width, side, side, device=device),
            pointers=torch.randn(objects, channels, device=device),
        )
        corners = torch.rand(objects, 2, 2, device=device).mul(SIZE - 1).sort(1).values
        self.boxes = corners.flatten(1).view(frames, classes, 4)

    @torch.inference_mode()
    def ours(self, present: Tensor, chunk: int) -> Tensor:
        """Masks (q, SIZE, SIZE) of the objects present."""
        objects = present.nonzero()
        rows = torch.where(present, torch.arange(present.numel(), device=present.device).view(present.shape), -1)
        masks = torch.empty(len(objects), SIZE, SIZE, device=present.device)
        prepared = prepare_frames(self.sam, self.features.embedding)
        for bucket in select("preceding", rows, objects, reach=REACH):
            for part in torch.arange(len(bucket.objects), device=objects.device).split(chunk):
                asked = bucket.objects[part]
                frames, kinds = objects[asked].unbind(1)
                embedding = condition_on_memory(self.sam, prepared, frames, self.bank, bucket.slots.at(part))
                prompts = ObjectPrompts(boxes=self.boxes[frames, kinds])
                decoded = self.sam.decode(self.features.at(frames), prompts, embedding=embedding)
                masks[asked] = F.interpolate(decoded.masks[:, None], (SIZE, SIZE), mode="bilinear")[:, 0]
        return masks

    @torch.inference_mode()
    def peer(self, present: Tensor) -> Tensor:
        """The same with the official code, one frame and object at a time."""
        there = present.tolist()
        masks = []
        for frame in range(self.frames):
            features, positions, sizes = self._flat(frame)
            for kind in range(self.classes):
                if not there[frame][kind]:
                    continue
                before = range(max(0, frame - REACH), frame)
                remembered = {
                    "cond_frame_outputs": {frame: self._output(frame, kind)},
                    "non_cond_frame_outputs": {t: self._output(t, kind) for t in before if there[t][kind]},
                }
                corners = self.boxes[frame, kind].view(1, 2, 2)
                out = self.sam.base.track_step(
                    frame_idx=frame,
                    is_init_cond_frame=False,
                    current_vision_feats=features,
                    current_vision_pos_embeds=positions,
                    feat_sizes=sizes,
                    point_inputs={"point_coords": corners, "point_labels": torch.tensor([[2, 3]]).to(corners.device)},
                    mask_inputs=None,
                    output_dict=remembered,
                    num_frames=self.frames,
                    run_mem_encoder=False,
                )
                masks.append(out["pred_masks_high_res"][0])
        return torch.cat(masks)

    def _flat(self, frame: int) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
        """Features and positions of a frame as `_prepare_backbone_features` gives them."""
        levels = [self.features.fine, self.features.middle, self.features.embedding]
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        flat = [level[frame : frame + 1].flatten(2).permute(2, 0, 1) for level in levels]
        position = self.sam.image_position().flatten(1).T[:, None]
        return flat, [position, position, position], sizes

    def _output(self, frame: int, kind: int) -> dict[str, Any]:
        row = frame * self.classes + kind
        return {
            "maskmem_features": self.bank.maps[row : row + 1],
            "maskmem_pos_enc": [self.sam.position()[None]],
            "obj_ptr": self.bank.pointers[row : row + 1],
        }


def best(function: Callable[[], Tensor], repeats: int, device: torch.device) -> tuple[Tensor, float, float]:
    """The result, and the shortest wall and processor times in seconds."""
    seconds, processor, result = [], [], torch.empty(0)
    for _ in range(repeats):
        started, busy = time.perf_counter(), time.process_time()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - busy)
    return result, min(seconds), min(processor)


def real_presence(frames: int, classes: int) -> Tensor | None:
    """(D, K) bool: which organs the slices of a real CT show; None without the data."""
    labels = labels_with_most_organs(frames)
    if labels is None:
        return None
    shown = [(labels == k + 1).any((1, 2)) for k in range(classes)]
    return torch.from_numpy(np.stack(shown, 1))


if __name__ == "__main__":
    main()
