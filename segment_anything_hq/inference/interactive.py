"""Interactive segmentation of one object in an image by clicks and a box, with undo, for any segmenter.

The image is encoded once, not per click; the previous result is passed to refiners that use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from rfmedsam2.arguments import choice_of
from rfmedsam2.errors import UsageError, type_name
from rfmedsam2.nn.segmenter import Embedded, Segmented
from segment_anything_hq.inference.image_transform import Fit, ImageTransform, device_of, embed, make_transform
from segment_anything_hq.models import fit_of
from segment_anything_hq.prompts.prompt import Click, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered:
    """A prompt and its result."""

    prompt: Prompt
    answer: Segmented


class InteractivePredictor:
    """A segmenter that remembers an image and the prompts for an object in it.

    Args:
        segmenter: a `Segmenter` in evaluation mode, on its device.
        fit: "pad" resizes the longest side to the frame and pads the other, as SAM does; "stretch" resizes both sides,
            as SAM 2 and SAM-REF do. None: the default of the segmenter's method.

    Raises:
        UsageError: not a segmenter, or an unknown fit.
    """

    def __init__(self, segmenter: Any, *, fit: Fit | None = None) -> None:
        if not all(hasattr(segmenter, name) for name in ("frame_size", "segment")):
            remedy = 'Load one: load_model("hq_sam", "vit_b", weights=...)'
            raise UsageError("This is not a segmenter", found=type_name(segmenter), remedy=remedy)
        choice_of(fit, (*get_args(Fit), None), "fit")
        self.segmenter = segmenter
        self.fit: Fit = fit_of(segmenter) if fit is None else fit
        self._image: np.ndarray | None = None
        self._embedded: Embedded | None = None
        self._framing: ImageTransform | None = None
        self._said: list[_Answered] = []

    @property
    def prompt(self) -> Prompt:
        """The clicks and the box so far."""
        return self._said[-1].prompt if self._said else Prompt()

    @torch.inference_mode()
    def set_image(self, image: Any) -> None:
        """Set an image (H, W, 3) uint8, RGB, and discard all clicks; an unchanged image is not encoded again.

        An image of PIL, a tensor and nested lists of the numbers 0 to 255 are read as arrays are.

        Raises:
            UsageError: no array (a path, say), one of another shape or type, or with masked values.
        """
        image = _as_rgb(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise UsageError(
                "Expected an RGB image", expected="(H, W, 3) uint8, RGB", found=f"{image.shape} {image.dtype}"
            )
        if np.ma.is_masked(image):
            raise UsageError(
                "The image is a masked array",
                expected="a value for every pixel",
                found=f"{np.ma.count_masked(image)} masked values",
                remedy="Give image.filled(VALUE) with the value that masked pixels stand for",
            )
        self._said = []
        if self._image is not None and np.array_equal(image, self._image):
            return
        framing = make_transform((image.shape[0], image.shape[1]), self.segmenter.frame_size, self.fit)
        self._embedded = embed(self.segmenter, image, framing)
        self._image, self._framing = image.copy(), framing

    def click(self, x: float, y: float, *, positive: bool = True) -> np.ndarray:
        """Add a click; return probabilities (H, W).

        Args:
            x: column, 0 <= x < W, may be fractional.
            y: row, 0 <= y < H, may be fractional.
            positive: on the object (True) or off it (False).

        Raises:
            UsageError: the click is outside the image, or no image has been set.
        """
        if positive not in (True, False):
            raise UsageError("positive is not a bool", expected="True or False", found=repr(positive))
        try:
            click = Click(x=float(x), y=float(y), positive=bool(positive))
        except (TypeError, ValueError):
            raise UsageError("Invalid click", expected="two numbers x, y", found=f"{x!r}, {y!r}") from None
        return self._say(replace(self.prompt, clicks=(*self.prompt.clicks, click)))

    def box(self, box_xyxy: Sequence[float] | np.ndarray) -> np.ndarray:
        """Set the box around the object, replacing an earlier one; return probabilities (H, W).

        Args:
            box_xyxy: x0, y0, x1, y1, the first and last column and row as in `Prompt`.

        Raises:
            UsageError: the box is invalid or outside the image, or no image has been set.
        """
        try:
            corners = np.asarray(box_xyxy, dtype=float)
        except (TypeError, ValueError):
            corners = np.zeros(0)
        if corners.shape != (4,):
            raise UsageError("Invalid box", expected="four numbers x0, y0, x1, y1", found=repr(box_xyxy))
        x0, y0, x1, y1 = corners.tolist()
        return self._say(replace(self.prompt, box=(x0, y0, x1, y1)))

    def undo(self) -> np.ndarray | None:
        """Undo the last click or box; return the previous probabilities (H, W), or None if no prompt is left.

        Raises:
            UsageError: there is nothing to undo.
        """
        if not self._said:
            raise UsageError("There is nothing to undo", expected="an earlier click or box")
        self._said.pop()
        return self._probabilities(self._said[-1].answer) if self._said else None

    def reset(self) -> None:
        """Discard all clicks and the box, to begin another object in the same image."""
        self._said = []

    def segment(self, prompt: Prompt, *, after_last: bool = False) -> np.ndarray:
        """Probabilities (H, W) for one prompt; earlier clicks and boxes are discarded.

        Args:
            prompt: the new clicks and box.
            after_last: pass on the last result as the mask before this prompt, as with a further click.
        """
        self._said = self._said[-1:] if after_last else []
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


def _as_rgb(image: Any) -> np.ndarray:
    """The array of an image; integers 0 to 255 from lists and tensors as 8 bits."""
    if isinstance(image, np.ndarray):
        return image
    try:
        array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    except (TypeError, ValueError):  # lists of unequal lengths
        array = np.zeros(0)
    if array.dtype.kind not in "iufb" or array.ndim == 0:
        raise UsageError(
            "The image is not an array of numbers", expected="(H, W, 3) uint8, RGB", found=type_name(image)
        )
    whole = array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255
    return array.astype(np.uint8) if whole else array
