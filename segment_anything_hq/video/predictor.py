"""Objects of a video, prompted on some frames and followed through the others: SAM 2, HQ-SAM 2 and SAM2Refiner.

In the manner of SAM 2's video predictor, with three differences: all objects of a frame are one batch; memory does not
grow with the length of the video; a prompted frame is answered by its prompts alone, also where it was tracked before
(SAM 2's lets memories take part there). Small holes of masks are not filled.
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

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.segmenter import Embedded, PromptBatch
from segment_anything_hq.prompts.prompt import Box, Click, Prompt
from segment_anything_hq.video.frames import Video
from segment_anything_hq.video.memory import LOGIT_CLAMP, Answer, ObjectMemory, Place, VideoNetwork, VideoSteps

Masks = dict[int, np.ndarray]
"""(H, W) bool by object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """One object on a frame where it was prompted: the decoder's logits (1, 4s, 4s), mask (H, W), memory."""

    logits: Tensor
    mask: np.ndarray
    memory: ObjectMemory


class VideoPredictor:
    """A network that keeps a video and what was said of objects in it.

    What is held at once: one embedded frame; of each object on each frame where it was prompted a map (64, s, s) at 16
    bit, a pointer, the logits (4s, 4s) and the mask; while it propagates, of each object the maps of the last 6 frames
    and the pointers of the last 15. At 1024 pixels that is 0.8 MB and the mask a prompt, and 3.2 MB an object.

    SAM2Refiner's memory is of SAM 2's low-resolution mask. Of frames without a prompt the best of three masks is taken,
    as SAM 2's predictor does (`multimask_output_for_tracking` of the base); of a single click too, but for SAM2Refiner,
    which is trained on single masks.

    Args:
        network: in evaluation mode, on its device.
        objects_at_once: more are masked in groups. On a CPU attention to memories takes about 1 GB an object at 1024
            pixels, on a GPU next to nothing.
    """

    def __init__(self, network: VideoNetwork, *, objects_at_once: int = 4) -> None:
        self.network = network
        self._steps = VideoSteps(network, objects_at_once=objects_at_once)
        self._video: Video | None = None
        self._embedded: tuple[int, Embedded] | None = None
        self._given: dict[int, dict[int, _Given]] = {}

    @property
    def objects(self) -> tuple[int, ...]:
        """Numbers of the objects that were prompted, in the order of their first prompts."""
        return tuple(self._given)

    def set_video(self, frames: Sequence[np.ndarray] | str | Path) -> None:
        """Take a video and forget all prompts.

        Args:
            frames: (H, W, 3) uint8 RGB arrays, which are not copied, or a folder of pictures, which are read when they
                are needed.

        Raises:
            UsageError: no frames, or the first is no picture.
            ImageError: the first cannot be read.
        """
        self._video, self._embedded = Video(frames), None
        self.reset()

    def reset(self) -> None:
        """Forget all prompts and keep the video."""
        self._given = {}

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
        """Show an object on a frame: by points, a box or both, or by its mask.

        Points and box take the place of those of earlier prompts on this frame, whose answer goes in as a mask prompt.

        Args:
            frame: its number, from 0.
            object_id: any number.
            points: (k, 2) XY in pixels of the frame; for limits of points and box see `prompts.prompt`.
            labels: (k,) 1 on the object, 0 off it.
            box: XYXY likewise.
            mask: (H, W) bool, taken as the answer.

        Returns:
            Probabilities (H, W).

        Raises:
            UsageError: no video, no such frame, outside the picture, or prompts that do not go together.
        """
        video = self._checked(frame)
        earlier = self._given.get(object_id, {}).get(frame)
        if mask is not None:
            if points is not None or labels is not None or box is not None:
                raise UsageError("A mask says all of an object", expected="points and box, or a mask")
            wanted = self._mask(mask, video.size)
            embedded = self._embedded_frame(frame)
            answer = self._steps.given(embedded, wanted)
        else:
            prompted = self._prompted(video.size, points, labels, box)
            if earlier is not None:
                prompted = replace(prompted, masks=earlier.logits.clamp(-LOGIT_CLAMP, LOGIT_CLAMP))
            embedded = self._embedded_frame(frame)
            answer = self._steps.answer(embedded, prompted)
        (memory,) = self._steps.encode_memory(embedded, answer, prompted=True)
        logits = _enlarged(answer.final, video.size)[0]
        given = _Given(logits=answer.logits.clone(), mask=(logits > 0).cpu().numpy(), memory=memory)
        self._given.setdefault(object_id, {})[frame] = given
        return logits.sigmoid().cpu().numpy()

    def propagate(
        self, start: int | None = None, *, reverse: bool = False, objects: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Masks]]:
        """Follow objects through the video, frame by frame as the result is asked for.

        Every run begins with the memories of prompted frames alone; each frame is encoded once, and not at all where
        all of the objects were prompted.

        Args:
            start: the first frame; None: the earliest that was prompted.
            reverse: toward the first frame.
            objects: which; None: all.

        Yields:
            A frame's number and the objects' masks (H, W).

        Raises:
            UsageError: no video or no prompt yet, no such frame, an object that was never prompted; later, a frame
                that is no picture or of another size.
            ImageError: later, a frame that cannot be read.
        """
        if not self._given:
            raise UsageError("No object was prompted yet", expected="prompt before propagate")
        wanted = tuple(self.objects if objects is None else objects)
        strange = [object_id for object_id in wanted if object_id not in self._given]
        if strange or not wanted:
            raise UsageError(
                "These objects were never prompted",
                expected=f"some of {', '.join(str(each) for each in self.objects)}",
                found=", ".join(str(each) for each in strange) or "none",
            )
        if start is None:
            start = min(frame for object_id in wanted for frame in self._given[object_id])
        video = self._checked(start)
        order = range(start, -1, -1) if reverse else range(start, len(video))
        return self._propagated(video, order, wanted, backwards=reverse)

    def _propagated(
        self, video: Video, order: range, objects: tuple[int, ...], *, backwards: bool
    ) -> Iterator[tuple[int, Masks]]:
        recent: dict[int, dict[int, ObjectMemory]] = {object_id: {} for object_id in objects}
        for frame in order:
            if video is not self._video or not all(object_id in self._given for object_id in objects):
                raise UsageError(
                    "The video or the prompts were taken away in the middle", remedy="Begin with propagate again"
                )
            place = Place(frame=frame, count=len(video), backwards=backwards)
            given = {each: self._given[each][frame].mask for each in objects if frame in self._given[each]}
            tracked = self._tracked(place, {each: recent[each] for each in objects if each not in given}, video.size)
            masks = given | tracked
            yield frame, {object_id: masks[object_id] for object_id in objects}

    @torch.inference_mode()
    def _tracked(self, place: Place, recent: dict[int, dict[int, ObjectMemory]], size: tuple[int, int]) -> Masks:
        """Mask objects on a frame where they were not prompted; adds it to what is remembered of them."""
        if not recent:
            return {}
        steps = self._steps
        attended = []
        for object_id, memories in recent.items():
            prompted = {frame: given.memory for frame, given in self._given[object_id].items()}
            attended.append(steps.attended(place, prompted, memories))
        embedded = self._embedded_frame(place.frame)
        answer = steps.track(embedded, place, attended)
        for memories, memory in zip(
            recent.values(), steps.encode_memory(embedded, answer, prompted=False), strict=True
        ):
            memories[place.frame] = memory
            past = place.before(steps.maps_back)  # the next frame looks one less far back
            if past in memories:
                memories[past] = replace(memories[past], map=None)
            memories.pop(place.before(steps.pointers_back), None)
        return dict(zip(recent, self._shown(answer, size), strict=True))

    def _shown(self, answer: Answer, size: tuple[int, int]) -> np.ndarray:
        """Masks (n, H, W) bool."""
        return (_enlarged(answer.final, size) > 0).cpu().numpy()

    def _embedded_frame(self, frame: int) -> Embedded:
        """A frame's features; those of the frame asked for last are kept."""
        if self._embedded is None or self._embedded[0] != frame:
            assert self._video is not None
            self._embedded = None  # two at once are not needed
            images = self._video.resized(frame, self.network.frame_size).to(self._steps.base.device)
            embedded = self.network.encode(self.network.normalize(images))
            self._embedded = frame, embedded
        return self._embedded[1]

    def _checked(self, frame: int) -> Video:
        if self._video is None:
            raise UsageError("There is no video yet", expected="set_video before prompts")
        if not 0 <= frame < len(self._video):
            raise UsageError(
                "There is no such frame", expected=f"0 to {len(self._video) - 1}", found=frame, where="the video"
            )
        return self._video

    def _prompted(
        self,
        size: tuple[int, int],
        points: npt.ArrayLike | None,
        labels: npt.ArrayLike | None,
        box: npt.ArrayLike | None,
    ) -> PromptBatch:
        """One object's points and box in pixels of the network's frame."""
        if points is None and labels is None and box is None:
            raise UsageError("Nothing was said of the object", expected="points with labels, a box or a mask")
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
        """(1, S, S) of 0 and 1, as SAM 2's predictor resizes masks."""
        if np.shape(mask) != size:
            raise UsageError("This mask is not of the video", expected=f"(H, W) {size}", found=np.shape(mask))
        given = torch.from_numpy(np.asarray(mask) > 0).to(self._steps.base.device)[None, None].float()
        side = (self.network.frame_size, self.network.frame_size)
        if size != side:
            given = F.interpolate(given, side, mode="bilinear", align_corners=False, antialias=True)
        return (given[0] >= 0.5).float()


def _enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (n, H, W) of (n, h, w)."""
    return F.interpolate(logits[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def _clicks(points: npt.ArrayLike | None, labels: npt.ArrayLike | None) -> tuple[Click, ...]:
    """Of points (k, 2) with labels (k,) of 0 and 1; none of either give none."""
    if points is None and labels is None:
        return ()
    places, signs = _floats(points), np.asarray([] if labels is None else labels).reshape(-1)
    fitting = places.ndim == 2 and places.shape[1] == 2 and len(places) == len(signs) > 0
    if not fitting or not set(signs.tolist()) <= {0, 1}:
        raise UsageError(
            "Every point needs a label",
            expected="points (k, 2) XY, and k labels of 1 on the object, 0 off it",
            found=f"points {places.shape}, labels {signs.tolist()}",
        )
    given = zip(places.tolist(), signs.tolist(), strict=True)
    return tuple(Click(x=x, y=y, positive=sign == 1) for (x, y), sign in given)


def _corners(box: npt.ArrayLike) -> Box:
    corners = _floats(box)
    if corners.shape != (4,):
        raise UsageError("This is no box", expected="x0, y0, x1, y1", found=np.asarray(box).tolist())
    x0, y0, x1, y1 = corners.tolist()
    return x0, y0, x1, y1


def _floats(numbers: npt.ArrayLike | None) -> np.ndarray:
    return np.asarray([] if numbers is None else numbers, dtype=np.float32)
