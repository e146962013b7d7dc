"""Zero-shot SAM 2 on a volume as a video: prompted slices, then the others from memory (RFMedSAM 2 paper, 3.1).

The official `SAM2Base.track_step` is called as in the official video predictor, forward from the first prompted frame,
each object with its own memory, but without compressing frames to JPEG.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from rfmedsam2.inference.zero_shot import Painter, sam_points
from rfmedsam2.nn.segmenter import normalized
from rfmedsam2.prompts import Prompts
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.study import Prompted, PromptKind, Step2
from rfmedsam2.system.progress import Track, silent

Output = dict[str, Any]
"""Output of track_step: mask, memory and pointer of an object on a frame."""
Memories = dict[int, dict[str, Any]]
"""Class -> track_step's memory of it: outputs of prompted and of other frames."""
STEPS2: tuple[Step2, ...] = ("unprompted", "all")
REMEMBERED = 16
"""Number of past frames that SAM 2 attends to (for object pointers; six for memory maps)."""
LABELS_OF_POINTS = {"box": (2, 3), "point": (1,)}
KEPT = ("pred_masks", "obj_ptr", "maskmem_features", "maskmem_pos_enc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Features of one frame in track_step's layout, flattened to (positions, 1, channels)."""

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
        frames: (Z, 3, H, W), 0 to 255.
        prompts: one prompt for every class on every frame that contains it.
        labels: labels of the dataset.
        kind: whether the prompts are boxes or points (`zero_shot.reference_prompts`).
        track: progress display over slices, in both steps.
    """

    def __init__(
        self,
        base: SAM2Base,
        frames: Tensor,
        prompts: Prompts,
        labels: LabelSet,
        *,
        kind: PromptKind = "box",
        track: Track = silent,
    ) -> None:
        self._track = track
        self.base, self.frames, self.labels = base, frames, labels
        self.size = (frames.shape[2], frames.shape[3])
        self.present = prompts.present
        self.points = sam_points(prompts, kind, self.size, (base.image_size, base.image_size)).to(base.device)
        self.point_labels = torch.tensor(LABELS_OF_POINTS[kind], dtype=torch.int32, device=base.device)

    def run(self, prompted: tuple[Prompted, ...]) -> dict[tuple[Prompted, Step2], np.ndarray]:
        """Label maps (Z, H, W) of every setting.

        Step 1 runs once on all (frame, class) pairs; each setting uses the frames that it prompts. Step 2 has memories
        instead of prompts (paper, 3.1 ii), also where it is forced on prompted frames, whose own memories are used too.
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
        for z in self._track(range(len(self.frames)), "slices, Step 2", len(self.frames)):
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
        """Step 1 on every frame and class with a prompt, all classes of a frame in one batch."""
        done: dict[tuple[int, int], Output] = {}
        for z in self._track(range(len(self.frames)), "slices, Step 1", len(self.frames)):
            classes = self.present[z].nonzero()[:, 0].tolist()
            if classes:
                result = self._step(self._encoded(z), z, classes, {}, first=True)
                done.update({(z, k): _row(result, i) for i, k in enumerate(classes)})
        return done

    def _memories(self, first: dict[tuple[int, int], Output], setting: Prompted) -> Memories:
        """Class -> initial memory for track_step: the outputs of its prompted frames."""
        memories: Memories = {}
        for k in range(self.present.shape[1]):
            frames = prompted_slices(self.present[:, k].nonzero()[:, 0].tolist(), setting)
            if frames:
                kept = {z: first[z, k] for z in frames}
                memories[k] = {"cond_frame_outputs": kept, "non_cond_frame_outputs": {}}
        return memories

    def _second_step(self, encoded: Encoded, z: int, memories: Memories) -> dict[Step2, dict[int, Tensor]]:
        """Mask logits (1, 1, 4s, 4s) of every class on one frame; adds new outputs to the memory."""
        unprompted, everywhere = {}, {}
        for k, memory in memories.items():
            given = memory["cond_frame_outputs"].get(z)
            result = self._step(encoded, z, [k], memory, first=False, remember=given is None)
            everywhere[k] = result["pred_masks"]
            unprompted[k] = result["pred_masks"] if given is None else given["pred_masks"]
            if given is None:
                memory["non_cond_frame_outputs"][z] = _row(result, 0)
            memory["non_cond_frame_outputs"].pop(z - REMEMBERED, None)
        return {"unprompted": unprompted, "all": everywhere}

    def _step(
        self,
        encoded: Encoded,
        z: int,
        classes: list[int],
        memory: dict[str, Any],
        *,
        first: bool,
        remember: bool = True,
    ) -> Output:
        points = {
            "point_coords": self.points[z, classes],
            "point_labels": self.point_labels.expand(len(classes), -1),
        }
        return self.base.track_step(
            frame_idx=z,
            is_init_cond_frame=first,
            **encoded.repeated(len(classes)),
            point_inputs=points if first else None,
            mask_inputs=None,
            output_dict=memory,
            num_frames=len(self.frames),
            run_mem_encoder=remember,
        )

    def _encoded(self, z: int) -> Encoded:
        side = self.base.image_size
        x = self.frames[z : z + 1].to(self.base.device)
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
        maps = self.base.forward_image(normalized(x, side))
        _, features, positions, sizes = self.base._prepare_backbone_features(maps)
        return Encoded(features=features, positions=positions, sizes=sizes)


def prompted_slices(present: list[int], setting: Prompted) -> list[int]:
    """Select the prompted frames among those that contain a class: all, the middle one, or two at the quarters."""
    if setting == "all":
        return present
    count = {"one": 1, "two": 2}[setting]
    return sorted({present[(2 * i + 1) * len(present) // (2 * count)] for i in range(count)}) if present else []


def as_published(base: SAM2Base, *, max_conditioning: int | None = None) -> SAM2Base:
    """Apply the settings of the official video predictor, in place.

    Args:
        base: the SAM 2 model.
        max_conditioning: number of nearest prompted frames that a frame attends to; None: all.
    """
    decoder = base.sam_mask_decoder
    decoder.dynamic_multimask_via_stability = True
    decoder.dynamic_multimask_stability_delta = 0.05
    decoder.dynamic_multimask_stability_thresh = 0.98
    base.binarize_mask_from_pts_for_mem_enc = True
    base.max_cond_frames_in_attn = -1 if max_conditioning is None else max_conditioning
    return base.eval()


def _row(result: Output, i: int) -> Output:
    """Output of one object of a batch, reduced to what is used later."""
    row = {name: result[name] for name in KEPT}
    row["maskmem_pos_enc"] = [x[i : i + 1] for x in result["maskmem_pos_enc"]]
    return row | {name: result[name][i : i + 1].clone() for name in KEPT if name != "maskmem_pos_enc"}
