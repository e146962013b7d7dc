"""Volumes segmented by SAM 2 as a video: prompted frames, then the others from memory (RFMedSAM 2 paper, section 3.1).

The official `SAM2Base.track_step` is run as the official video predictor runs it, forward from the first prompted
frame, each object with its own memory, on frames as they are (no JPEG in between).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from rfmedsam2.inference.zero_shot import Painter, SlicePrompts
from rfmedsam2.nn.segmenter import normalized
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.study import Step2

Prompted = Literal["all", "two", "one"]
Output = dict[str, Any]
"""What track_step gives and takes back: a cell's mask, memory and pointer."""
Memories = dict[int, dict[str, Any]]
"""Class -> what track_step remembers of it: outputs of prompted and of other frames."""
STEPS2: tuple[Step2, ...] = ("unprompted", "all")
REMEMBERED = 16
"""Frames back that SAM 2 still looks at (object pointers; maps: six)."""
LABELS_OF_POINTS = {"box": (2, 3), "point": (1,)}
KEPT = ("pred_masks", "obj_ptr", "maskmem_features", "maskmem_pos_enc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One frame's features as track_step wants them, flattened to (positions, 1, channels)."""

    features: list[Tensor]
    positions: list[Tensor]
    sizes: list[tuple[int, int]]

    def repeated(self, count: int) -> dict[str, Any]:
        """Arguments of track_step for `count` objects."""
        return {
            "current_vision_feats": [x.expand(-1, count, -1) for x in self.features],
            "current_vision_pos_embeds": [x.expand(-1, count, -1) for x in self.positions],
            "feat_sizes": self.sizes,
        }


class VideoSegmenter:
    """SAM 2 on the frames of one volume.

    Args:
        base: SAM 2 in evaluation mode, on its device.
        frames: (Z, 3, H, W) of 0 to 255.
        prompts: one for every class on every frame that it appears on.
        labels: what the classes are.
    """

    def __init__(self, base: SAM2Base, frames: Tensor, prompts: SlicePrompts, labels: LabelSet) -> None:
        self.base, self.frames, self.labels = base, frames, labels
        self.size = (frames.shape[2], frames.shape[3])
        self.present = prompts.present
        self.points = prompts.within(self.size, (base.image_size, base.image_size)).to(base.device)
        self.point_labels = torch.tensor(LABELS_OF_POINTS[prompts.kind], dtype=torch.int32, device=base.device)

    def run(self, prompted: tuple[Prompted, ...]) -> dict[tuple[Prompted, Step2], np.ndarray]:
        """Labels (Z, H, W) of every setting.

        Step 1 is run once on all cells; a setting takes of it the frames that it prompts. Step 2 on all frames gives
        prompted frames their prompt again, with the memories of all prompted frames, their own among them.
        """
        painter = Painter(self.labels)
        rows: list[tuple[Prompted, Step2]] = [(s, step2) for s in prompted for step2 in STEPS2]
        out = {row: np.zeros((len(self.frames), *self.size), painter.dtype) for row in rows}
        first = self._first_step()
        memories: dict[Prompted, Memories] = {setting: self._memories(first, setting) for setting in prompted}
        starts: dict[Prompted, int] = {}
        for setting, each in memories.items():
            begins = (min(memory["cond_frame_outputs"]) for memory in each.values())
            starts[setting] = min(begins, default=len(self.frames))
        for z in range(len(self.frames)):
            running: list[Prompted] = [setting for setting in prompted if starts[setting] <= z]
            if not running:
                continue
            encoded = self._encoded(z)
            for setting in running:
                masks = self._second_step(encoded, z, memories[setting])
                for step2, objects in masks.items():
                    classes = torch.tensor(sorted(objects))
                    logits = torch.cat([objects[int(k)] for k in classes])
                    logits = F.interpolate(logits.float(), self.size, mode="bilinear", align_corners=False)[:, 0]
                    painter.paint(logits, classes, out[setting, step2][z])
        return out

    def _first_step(self) -> dict[tuple[int, int], Output]:
        """Step 1 on every frame and class with a prompt, all classes of a frame at once."""
        done: dict[tuple[int, int], Output] = {}
        for z in range(len(self.frames)):
            classes = self.present[z].nonzero()[:, 0].tolist()
            if classes:
                result = self._step(self._encoded(z), z, classes, {}, prompt=True, first=True)
                done.update({(z, k): _row(result, i) for i, k in enumerate(classes)})
        return done

    def _memories(self, first: dict[tuple[int, int], Output], setting: Prompted) -> Memories:
        """Class -> what track_step remembers of it, at first the frames that are prompted."""
        memories: Memories = {}
        for k in range(self.present.shape[1]):
            frames = prompted_slices(self.present[:, k].nonzero()[:, 0].tolist(), setting)
            if frames:
                kept = {z: first[z, k] for z in frames}
                memories[k] = {"cond_frame_outputs": kept, "non_cond_frame_outputs": {}}
        return memories

    def _second_step(self, encoded: Encoded, z: int, memories: Memories) -> dict[Step2, dict[int, Tensor]]:
        """Mask logits (1, 1, 4s, 4s) of every class on one frame; remembers what is new."""
        unprompted, everywhere = {}, {}
        for k, memory in memories.items():
            given = memory["cond_frame_outputs"].get(z)
            result = self._step(encoded, z, [k], memory, prompt=given is not None, first=False)
            everywhere[k] = result["pred_masks"]
            unprompted[k] = result["pred_masks"] if given is None else given["pred_masks"]
            if given is None:
                memory["non_cond_frame_outputs"][z] = _row(result, 0)
            memory["non_cond_frame_outputs"].pop(z - REMEMBERED, None)
        return {"unprompted": unprompted, "all": everywhere}

    def _step(
        self, encoded: Encoded, z: int, classes: list[int], memory: dict[str, Any], *, prompt: bool, first: bool
    ) -> Output:
        points = {
            "point_coords": self.points[z, classes],
            "point_labels": self.point_labels.expand(len(classes), -1),
        }
        return self.base.track_step(
            frame_idx=z,
            is_init_cond_frame=first,
            **encoded.repeated(len(classes)),
            point_inputs=points if prompt else None,
            mask_inputs=None,
            output_dict=memory,
            num_frames=len(self.frames),
            run_mem_encoder=first or not prompt,
        )

    def _encoded(self, z: int) -> Encoded:
        side = self.base.image_size
        x = self.frames[z : z + 1].to(self.base.device)
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
        maps = self.base.forward_image(normalized(x, side))
        _, features, positions, sizes = self.base._prepare_backbone_features(maps)
        return Encoded(features=features, positions=positions, sizes=sizes)


def prompted_slices(present: list[int], setting: Prompted) -> list[int]:
    """Of the frames that a class appears on, those prompted: all, or one in the middle, or two at the quarters."""
    if setting == "all":
        return present
    count = {"one": 1, "two": 2}[setting]
    return sorted({present[(2 * i + 1) * len(present) // (2 * count)] for i in range(count)}) if present else []


def as_published(base: SAM2Base, *, max_conditioning: int | None = None) -> SAM2Base:
    """Set what the official video predictor sets after building, in place.

    Args:
        base: SAM 2.
        max_conditioning: prompted frames that a frame attends to, the nearest ones; None: all.
    """
    decoder = base.sam_mask_decoder
    decoder.dynamic_multimask_via_stability = True
    decoder.dynamic_multimask_stability_delta = 0.05
    decoder.dynamic_multimask_stability_thresh = 0.98
    base.binarize_mask_from_pts_for_mem_enc = True
    base.max_cond_frames_in_attn = -1 if max_conditioning is None else max_conditioning
    return base.eval()


def _row(result: Output, i: int) -> Output:
    """One object of a batch, without what nobody asks for later."""
    row = {name: result[name] for name in KEPT}
    row["maskmem_pos_enc"] = [x[i : i + 1] for x in result["maskmem_pos_enc"]]
    return row | {name: result[name][i : i + 1].clone() for name in KEPT if name != "maskmem_pos_enc"}
