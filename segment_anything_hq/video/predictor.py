"""Video object segmentation with prompts on some frames: SAM 2, HQ-SAM 2 and SAM2Refiner.

Works like SAM 2's video predictor, with three differences: all objects of a frame form one batch; memory use does not
grow with the length of the video; a prompted frame is segmented from its prompts alone, even if it was tracked before
(SAM 2's predictor also uses memories there). Small holes in masks are not filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2.arguments import whole_number
from rfmedsam2.errors import UsageError, type_name
from rfmedsam2.nn.segmenter import Embedded, PromptBatch
from segment_anything_hq.prompts.prompt import Box, Click, Prompt
from segment_anything_hq.video.frames import Video
from segment_anything_hq.video.memory import (
    LOGIT_CLAMP,
    FrameMasks,
    FramePosition,
    ObjectMemory,
    VideoNetwork,
    VideoSteps,
)

Masks = dict[int, np.ndarray]
"""Mask (H, W) bool by object id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _PromptedFrame:
    """One object on a frame where it was prompted: decoder logits (1, 4s, 4s), mask (H, W) and memory."""

    logits: Tensor
    mask: np.ndarray
    memory: ObjectMemory


class VideoPredictor:
    """Segments and tracks objects in one video at a time.

    It holds one encoded frame; for each object and prompted frame a memory map (64, s, s) at 16 bits, a pointer, the
    logits (4s, 4s) and the mask; and while propagating, for each object the maps of the last 6 frames and the pointers
    of the last 15. At 1024 pixels that is 0.8 MB plus the mask per prompted frame, and 3.2 MB per object.

    SAM2Refiner's memory is encoded from SAM 2's low-resolution mask. On frames without a prompt the best of three masks
    is used, as in SAM 2's predictor (`multimask_output_for_tracking` of the base); the same applies to a single click,
    except with SAM2Refiner, which is trained on single masks.

    Args:
        network: a network in evaluation mode, on its device.
        objects_at_once: maximum number of objects per batch. At 1024 pixels, memory attention takes about 1 GB per
            object on a CPU and very little on a GPU.
    """

    def __init__(self, network: VideoNetwork, *, objects_at_once: int = 4) -> None:
        if not isinstance(network, VideoNetwork):
            raise UsageError("This network does not track", found=type_name(network), remedy="Load one on SAM 2")
        objects_at_once = whole_number(objects_at_once, "objects_at_once", least=1)
        self.network = network
        self._steps = VideoSteps(network, objects_at_once=objects_at_once)
        self._video: Video | None = None
        self._embedded: tuple[int, Embedded] | None = None
        self._prompted_frames: dict[int, dict[int, _PromptedFrame]] = {}

    @property
    def objects(self) -> tuple[int, ...]:
        """Ids of the prompted objects, in the order of their first prompts."""
        return tuple(self._prompted_frames)

    def set_video(self, frames: Sequence[np.ndarray] | str | Path) -> None:
        """Set the video and forget all prompts.

        Args:
            frames: (H, W, 3) uint8 RGB arrays, which are not copied, or a folder of images, which are read on demand.

        Raises:
            UsageError: there are no frames, or the first is not an RGB image.
            ImageError: the first frame cannot be read.
        """
        self._video, self._embedded = Video(frames), None
        self.reset()

    def reset(self) -> None:
        """Forget all prompts, but keep the video."""
        self._prompted_frames = {}

    @torch.inference_mode()
    def prompt(
        self,
        frame: int,
        object_id: int,
        *,
        points: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        box: npt.ArrayLike | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Prompt for an object on a frame: with points, a box or both, or with its mask.

        Points and box replace those of earlier prompts on this frame, whose result becomes a mask prompt.

        Args:
            frame: number of the frame, from 0.
            object_id: any number that identifies the object.
            points: (k, 2) XY, pixels of the frame; see `prompts.prompt` for the limits of points and box.
            labels: (k,) 1 on the object, 0 off it.
            box: (4,) XYXY, pixels of the frame.
            mask: (H, W) bool, used as the result.

        Returns:
            Probabilities (H, W).

        Raises:
            UsageError: there is no video or no such frame, a prompt lies outside the image, or the prompts cannot be
                combined.
        """
        video = self._checked(frame)
        earlier = self._prompted_frames.get(object_id, {}).get(frame)
        if mask is not None:
            if points is not None or labels is not None or box is not None:
                raise UsageError("A mask prompt cannot be combined with points or a box")
            target = self._mask(mask, video.size)
            embedded = self._embedded_frame(frame)
            answer = self._steps.use_mask(embedded, target)
        else:
            prompted = self._prompted(video.size, points, labels, box)
            if earlier is not None:
                prompted = replace(prompted, masks=earlier.logits.clamp(-LOGIT_CLAMP, LOGIT_CLAMP))
            embedded = self._embedded_frame(frame)
            answer = self._steps.segment(embedded, prompted)
        (memory,) = self._steps.encode_memory(embedded, answer, prompted=True)
        logits = _upsample(answer.final, video.size)[0]
        given = _PromptedFrame(logits=answer.logits.clone(), mask=(logits > 0).cpu().numpy(), memory=memory)
        self._prompted_frames.setdefault(object_id, {})[frame] = given
        return logits.sigmoid().cpu().numpy()

    def propagate(
        self, start: int | None = None, *, reverse: bool = False, objects: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Masks]]:
        """Track objects through the video, one frame per iteration.

        Every run starts from the memories of prompted frames only. Each frame is encoded once, and not at all if every
        object was prompted on it.

        Args:
            start: number of the first frame; None: the earliest prompted frame.
            reverse: track toward the first frame.
            objects: ids of the objects to track; None: all.

        Yields:
            the frame's number and the objects' masks (H, W).

        Raises:
            UsageError: there is no video, no prompt or no such frame, or an object was never prompted; while iterating,
                a frame is not an RGB image or has another size.
            ImageError: while iterating, a frame cannot be read.
        """
        if not self._prompted_frames:
            raise UsageError("No object has been prompted yet", expected="`prompt` before `propagate`")
        wanted = tuple(self.objects if objects is None else objects)
        unknown = [object_id for object_id in wanted if object_id not in self._prompted_frames]
        if unknown or not wanted:
            raise UsageError(
                "These objects were never prompted",
                expected=f"some of {', '.join(str(each) for each in self.objects)}",
                found=", ".join(str(each) for each in unknown) or "none",
            )
        if start is None:
            start = min(frame for object_id in wanted for frame in self._prompted_frames[object_id])
        video = self._checked(start)
        order = range(start, -1, -1) if reverse else range(start, len(video))
        return self._propagated(video, order, wanted, backwards=reverse)

    def _propagated(
        self, video: Video, order: range, objects: tuple[int, ...], *, backwards: bool
    ) -> Iterator[tuple[int, Masks]]:
        recent: dict[int, dict[int, ObjectMemory]] = {object_id: {} for object_id in objects}
        for frame in order:
            if video is not self._video or not all(object_id in self._prompted_frames for object_id in objects):
                raise UsageError("The video or the prompts changed during propagation", remedy="Call `propagate` again")
            position = FramePosition(frame=frame, count=len(video), backwards=backwards)
            given = {
                each: self._prompted_frames[each][frame].mask
                for each in objects
                if frame in self._prompted_frames[each]
            }
            tracked = self._tracked(position, {each: recent[each] for each in objects if each not in given}, video.size)
            masks = given | tracked
            yield frame, {object_id: masks[object_id] for object_id in objects}

    @torch.inference_mode()
    def _tracked(
        self, position: FramePosition, recent: dict[int, dict[int, ObjectMemory]], size: tuple[int, int]
    ) -> Masks:
        """Segment objects on a frame where they were not prompted, and add the frame to their memories."""
        if not recent:
            return {}
        steps = self._steps
        selected = []
        for object_id, memories in recent.items():
            prompted = {frame: given.memory for frame, given in self._prompted_frames[object_id].items()}
            selected.append(steps.select_memories(position, prompted, memories))
        embedded = self._embedded_frame(position.frame)
        answer = steps.track(embedded, position, selected)
        for memories, memory in zip(
            recent.values(), steps.encode_memory(embedded, answer, prompted=False), strict=True
        ):
            memories[position.frame] = memory
            past = position.before(steps.maps_back)  # the next frame does not need this map any more
            if past in memories:
                memories[past] = replace(memories[past], map=None)
            memories.pop(position.before(steps.pointers_back), None)
        return dict(zip(recent, self._masks(answer, size), strict=True))

    def _masks(self, answer: FrameMasks, size: tuple[int, int]) -> np.ndarray:
        """Masks (n, H, W) bool."""
        return (_upsample(answer.final, size) > 0).cpu().numpy()

    def _embedded_frame(self, frame: int) -> Embedded:
        """A frame's features; those of the last frame are kept."""
        if self._embedded is None or self._embedded[0] != frame:
            assert self._video is not None
            self._embedded = None  # never hold two frames
            images = self._video.resized(frame, self.network.frame_size).to(self._steps.base.device)
            embedded = self.network.encode(self.network.normalize(images))
            self._embedded = frame, embedded
        return self._embedded[1]

    def _checked(self, frame: int) -> Video:
        if self._video is None:
            raise UsageError("No video has been set", expected="`set_video` before prompts")
        frame = whole_number(frame, "frame", least=-len(self._video))
        if not 0 <= frame < len(self._video):
            raise UsageError(
                "The video has no such frame", expected=f"0 to {len(self._video) - 1}", found=frame, where="the video"
            )
        return self._video

    def _prompted(
        self,
        size: tuple[int, int],
        points: npt.ArrayLike | None,
        labels: npt.ArrayLike | None,
        box: npt.ArrayLike | None,
    ) -> PromptBatch:
        """Convert one object's points and box from pixels of the video to the network's frame."""
        if points is None and labels is None and box is None:
            raise UsageError("No prompt was given", expected="points with labels, a box or a mask")
        prompt = Prompt(clicks=_clicks(points, labels), box=None if box is None else _corners(box))
        faults = prompt.faults(size)
        if faults:
            raise UsageError("The prompt does not fit the video", found="; ".join(faults))
        device, side = self._steps.base.device, self.network.frame_size
        scale = torch.tensor([side / size[1], side / size[0]], device=device)

        def scaled(coordinates: npt.ArrayLike) -> Tensor:
            return torch.as_tensor(_floats(coordinates), device=device).reshape(1, -1, 2) * scale

        return PromptBatch(
            images=torch.zeros(1, dtype=torch.long, device=device),
            points=scaled(prompt.points) if prompt.clicks else None,
            point_labels=torch.tensor([prompt.labels], device=device) if prompt.clicks else None,
            boxes=None if prompt.box is None else scaled(prompt.box).reshape(1, 4),
        )

    def _mask(self, mask: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Resize a mask as SAM 2's predictor does: (1, S, S) of 0 and 1."""
        if np.shape(mask) == size and not np.isfinite(np.asarray(mask)).all():
            raise UsageError("The mask cannot be used", expected="(H, W) bool", found="NaN or infinity")
        if np.shape(mask) != size:
            raise UsageError(
                "The mask has another size than the video", expected=f"(H, W) {size}", found=np.shape(mask)
            )
        given = torch.from_numpy(np.asarray(mask) > 0).to(self._steps.base.device)[None, None].float()
        side = (self.network.frame_size, self.network.frame_size)
        if size != side:
            given = F.interpolate(given, side, mode="bilinear", align_corners=False, antialias=True)
        return (given[0] >= 0.5).float()


def _upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate logits (n, h, w) to (n, H, W)."""
    return F.interpolate(logits[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def _clicks(points: npt.ArrayLike | None, labels: npt.ArrayLike | None) -> tuple[Click, ...]:
    """Convert points (k, 2) and labels (k,) of 0 and 1 to clicks; no clicks if both are None."""
    if points is None and labels is None:
        return ()
    coordinates, signs = _floats(points), np.asarray([] if labels is None else labels).reshape(-1)
    matching = coordinates.ndim == 2 and coordinates.shape[1] == 2 and len(coordinates) == len(signs) > 0
    if not matching or not set(signs.tolist()) <= {0, 1}:
        raise UsageError(
            "Every point needs a label",
            expected="points (k, 2) XY and k labels, 1 on the object or 0 off it",
            found=f"points {coordinates.shape}, labels {signs.tolist()}",
        )
    given = zip(coordinates.tolist(), signs.tolist(), strict=True)
    return tuple(Click(x=x, y=y, positive=sign == 1) for (x, y), sign in given)


def _corners(box: npt.ArrayLike) -> Box:
    corners = _floats(box)
    if corners.shape != (4,):
        raise UsageError("Invalid box", expected="x0, y0, x1, y1", found=np.asarray(box).tolist())
    x0, y0, x1, y1 = corners.tolist()
    return x0, y0, x1, y1


def _floats(numbers: npt.ArrayLike | None) -> np.ndarray:
    try:
        return np.asarray([] if numbers is None else numbers, dtype=np.float32)
    except (TypeError, ValueError):
        raise UsageError("Points and boxes are numbers", found=repr(numbers)) from None
