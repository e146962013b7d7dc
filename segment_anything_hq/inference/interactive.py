"""One image, one object, guided by clicks and a box: any segmenter, with undo.

Refiners that look at the mask before are given it; a click costs no encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.segmenter import Embedded, Segmented
from segment_anything_hq.inference.image_transform import Fit, ImageTransform, device_of, embed, make_transform
from segment_anything_hq.models import fit_of
from segment_anything_hq.prompts.prompt import Click, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered:
    """What was said of the object, and the answer."""

    prompt: Prompt
    answer: Segmented


class InteractivePredictor:
    """A segmenter that keeps an image and what was said of an object in it.

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
        self._said: list[_Answered] = []

    @property
    def prompt(self) -> Prompt:
        """What was said of the object so far."""
        return self._said[-1].prompt if self._said else Prompt()

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        """Take an image (H, W, 3) uint8, RGB, and forget all clicks; the same image again is not encoded again.

        Raises:
            UsageError: an array of another kind.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise UsageError(
                "Expected an RGB image", expected="(H, W, 3) uint8, RGB", found=f"{image.shape} {image.dtype}"
            )
        self._said = []
        if self._image is not None and np.array_equal(image, self._image):
            return
        framing = make_transform((image.shape[0], image.shape[1]), self.segmenter.frame_size, self.fit)
        self._embedded = embed(self.segmenter, image, framing)
        self._image, self._framing = image.copy(), framing

    def click(self, x: float, y: float, *, positive: bool = True) -> np.ndarray:
        """Say that a point is on the object, or not; gives probabilities (H, W).

        Args:
            x: column, a whole number or between two, 0 <= x < W.
            y: row, likewise, 0 <= y < H.
            positive: on the object.

        Raises:
            UsageError: outside the image, or no image was set.
        """
        click = Click(x=x, y=y, positive=positive)
        return self._say(replace(self.prompt, clicks=(*self.prompt.clicks, click)))

    def box(self, box_xyxy: Sequence[float] | np.ndarray) -> np.ndarray:
        """Draw a box around the object, in the place of an earlier one; gives probabilities (H, W).

        Args:
            box_xyxy: x0, y0, x1, y1 as in `Prompt`: its first and last column and row.

        Raises:
            UsageError: no box, outside the image, or no image was set.
        """
        corners = np.asarray(box_xyxy, dtype=float)
        if corners.shape != (4,):
            raise UsageError("This is no box", expected="x0, y0, x1, y1", found=corners.tolist())
        x0, y0, x1, y1 = corners.tolist()
        return self._say(replace(self.prompt, box=(x0, y0, x1, y1)))

    def undo(self) -> np.ndarray | None:
        """Take the last click or box back; gives the answer before it, None where nothing is left.

        Raises:
            UsageError: nothing was said yet.
        """
        if not self._said:
            raise UsageError("There is no click to take back", expected="a click or a box before")
        self._said.pop()
        return self._probabilities(self._said[-1].answer) if self._said else None

    def reset(self) -> None:
        """Begin another object of the same image."""
        self._said = []

    def segment(self, prompt: Prompt) -> np.ndarray:
        """Probabilities (H, W) of what one prompt shows, without regard to what was said before."""
        self.reset()
        return self._say(prompt)

    @torch.inference_mode()
    def _say(self, prompt: Prompt) -> np.ndarray:
        if self._embedded is None or self._framing is None:
            raise UsageError("No image has been set", expected="set_image before clicks and boxes")
        faults = prompt.faults(self._framing.size)
        if faults:
            raise UsageError("The prompt does not fit the image", found="; ".join(faults))
        before = self._said[-1].answer if self._said else None
        masks = None if before is None else before.logits
        prompted = self._framing.prompts([prompt], device_of(self.segmenter), masks=masks)
        answer = self.segmenter.segment(self._embedded, prompted, previous=before)
        self._said.append(_Answered(prompt=prompt, answer=answer))
        return self._probabilities(answer)

    def _probabilities(self, answer: Segmented) -> np.ndarray:
        assert self._framing is not None
        return self._framing.logits(answer.final)[0].sigmoid().cpu().numpy()
