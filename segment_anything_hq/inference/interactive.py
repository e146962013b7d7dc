"""One picture, one object, guided by clicks and a box: any segmenter, with undo.

Refiners that look at the mask before are given it; a click costs no encoding. It is also what evaluations by clicks and
by prompts ask (`evaluation.interactive.Interactive`, `evaluation.protocols.Promptable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented
from segment_anything_hq.inference.image_transform import Fit, ImageTransform, device_of, embed, make_transform
from segment_anything_hq.models import fit_of
from segment_anything_hq.prompts.clicks import Click, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Interaction:
    """What was said of the object, and the answer."""

    clicks: tuple[Click, ...] = ()
    box: np.ndarray | None = None
    answer: Segmented | None = None


class InteractivePredictor:
    """A segmenter that keeps a picture and what was said of an object in it.

    Args:
        segmenter: a `Segmenter` in evaluation mode, on its device.
        fit: pad: the longest side is resized to the frame, as SAM does; stretch: both sides are, as SAM 2 and SAM-REF
            do. None: as the segmenter's method is used.
    """

    def __init__(self, segmenter: Any, *, fit: Fit | None = None) -> None:
        self.segmenter = segmenter
        self.fit: Fit = fit_of(segmenter) if fit is None else fit
        self._image: np.ndarray | None = None
        self._embedded: Embedded | None = None
        self._framing: ImageTransform | None = None
        self._said: list[_Interaction] = []

    @property
    def clicks(self) -> tuple[Click, ...]:
        """Clicks so far."""
        return self._said[-1].clicks if self._said else ()

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        """Take a picture (H, W, 3) uint8, RGB, and forget all clicks; the same picture again is not encoded again.

        Raises:
            UsageError: an array of another kind.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise UsageError(
                "This is no picture", expected="(H, W, 3) uint8, RGB", found=f"{image.shape} {image.dtype}"
            )
        self._said = []
        if self._image is not None and np.array_equal(image, self._image):
            return
        framing = make_transform((image.shape[0], image.shape[1]), self.segmenter.frame_size, self.fit)
        self._embedded = embed(self.segmenter, image, framing)
        self._image, self._framing = image.copy(), framing

    def click(self, x: float, y: float, *, positive: bool = True) -> np.ndarray:
        """Say that a pixel is on the object, or not; gives probabilities (H, W).

        Raises:
            UsageError: outside the picture, or no picture was set.
        """
        self._require(np.asarray([x, y, x, y], dtype=float))
        said = self._said[-1] if self._said else _Interaction()
        return self._say(replace(said, clicks=(*said.clicks, Click(x=int(x), y=int(y), positive=positive))))

    def box(self, box_xyxy: Sequence[float] | np.ndarray) -> np.ndarray:
        """Draw a box around the object, in the place of an earlier one; gives probabilities (H, W).

        Raises:
            UsageError: outside the picture or of no size, or no picture was set.
        """
        box = np.asarray(box_xyxy, dtype=np.float32)
        self._require(box)
        said = self._said[-1] if self._said else _Interaction()
        return self._say(replace(said, box=box))

    def undo(self) -> np.ndarray | None:
        """Take the last click or box back; gives the answer before it, None where nothing is left.

        Raises:
            UsageError: nothing was said yet.
        """
        if not self._said:
            raise UsageError("There is no click to take back", expected="a click or a box before")
        self._said.pop()
        answer = self._said[-1].answer if self._said else None
        return None if answer is None else self._probabilities(answer)

    def reset(self) -> None:
        """Begin another object of the same picture."""
        self._said = []

    def predict(self, clicks: Sequence[Click], previous: np.ndarray | None) -> np.ndarray:
        """Probabilities (H, W) after all clicks; `previous` None begins a new object."""
        if previous is None or tuple(clicks[:-1]) != self.clicks:
            self.reset()
            for click in clicks[:-1]:
                self.click(click.x, click.y, positive=click.positive)
        last = clicks[-1]
        return self.click(last.x, last.y, positive=last.positive)

    def segment(self, prompt: Prompt) -> np.ndarray:
        """Probabilities (H, W) of what one prompt shows, without regard to what was said before."""
        self.reset()
        self._require(None if prompt.box is None else np.asarray(prompt.box, dtype=np.float32))
        return self._say(_Interaction(clicks=tuple(prompt.points), box=prompt.box))

    @torch.inference_mode()
    def _say(self, said: _Interaction) -> np.ndarray:
        before = self._said[-1].answer if self._said else None
        assert self._embedded is not None
        answer = self.segmenter.segment(self._embedded, self._prompted(said, before), previous=before)
        self._said.append(replace(said, answer=answer))
        return self._probabilities(answer)

    def _prompted(self, said: _Interaction, before: Segmented | None) -> PromptBatch:
        assert self._framing is not None
        device = device_of(self.segmenter)
        points = labels = box = None
        if said.clicks:
            places = self._framing.apply_coords(np.asarray([[c.x, c.y] for c in said.clicks]))
            points = torch.as_tensor(places, dtype=torch.float32, device=device)[None]
            labels = torch.tensor([[int(c.positive) for c in said.clicks]], device=device)
        if said.box is not None:
            corners = self._framing.apply_coords(np.reshape(said.box, (2, 2)))
            box = torch.as_tensor(corners.reshape(1, 4), dtype=torch.float32, device=device)
        return PromptBatch(
            images=torch.zeros(1, dtype=torch.long, device=device),
            points=points,
            point_labels=labels,
            boxes=box,
            masks=None if before is None else before.logits,
        )

    def _probabilities(self, answer: Segmented) -> np.ndarray:
        assert self._framing is not None
        return self._framing.logits(answer.final)[0].sigmoid().cpu().numpy()

    def _require(self, box: np.ndarray | None) -> None:
        """Check that a picture is set and that a box (of a click: of no size) lies in it."""
        if self._framing is None:
            raise UsageError("There is no picture yet", expected="set_image before clicks and boxes")
        if box is None:
            return
        height, width = self._framing.size
        inside = box.shape == (4,) and 0 <= box[0] <= box[2] <= width and 0 <= box[1] <= box[3] <= height
        if not inside:
            raise UsageError(
                "A click or box lies outside the picture, or is none",
                expected=f"x from 0 to {width}, y from 0 to {height}, boxes as x0 y0 x1 y1",
                found=np.round(box, 1).tolist(),
            )
