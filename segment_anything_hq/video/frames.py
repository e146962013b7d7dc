"""Frames of a video, read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rfmedsam2.errors import UsageError
from segment_anything_hq.data.image_io import ENDINGS, read_image


class Video:
    """Pictures of one size.

    Args:
        frames: (H, W, 3) uint8 RGB arrays, or a folder of pictures: in the order of their numbers where all names are
            numbers, else of their names.

    Attributes:
        size: (H, W), of the first frame.

    Raises:
        UsageError: no frames, or the first is none.
        ImageError: the first cannot be read.
    """

    def __init__(self, frames: Sequence[np.ndarray] | str | Path) -> None:
        self._frames = _pictures_in(Path(frames)) if isinstance(frames, str | Path) else frames
        self._where = frames if isinstance(frames, str | Path) else None
        if not len(self._frames):
            raise UsageError("There are no frames", where=self._where, expected="at least one picture")
        self.size: tuple[int, int] = (0, 0)
        first = self.image(0)
        self.size = (first.shape[0], first.shape[1])

    def __len__(self) -> int:
        return len(self._frames)

    def image(self, number: int) -> np.ndarray:
        """A frame (H, W, 3) uint8.

        Raises:
            UsageError: it is no picture, or of another size than the first.
            ImageError: it cannot be read.
        """
        frame = self._frames[number]
        image = read_image(frame) if isinstance(frame, Path) else frame
        kind = getattr(image, "dtype", type(image).__name__)
        shape = np.shape(image)
        if len(shape) != 3 or shape[2] != 3 or kind != np.uint8 or not np.size(image):
            raise UsageError(
                f"Frame {number} is no picture",
                where=self._where,
                expected="(H, W, 3) uint8, RGB",
                found=f"{shape} {kind}",
            )
        if self.size != (0, 0) and shape[:2] != self.size:
            raise UsageError(
                f"Frame {number} is of another size than frame 0",
                where=self._where,
                expected=f"{self.size[1]} x {self.size[0]} pixels",
                found=f"{shape[1]} x {shape[0]}",
                remedy="Resize the frames, or give the parts of the video one after the other",
            )
        return image

    def resized(self, number: int, side: int) -> Tensor:
        """A frame (1, 3, side, side) of 0 to 255, both sides stretched as SAM 2's predictor does."""
        image = Image.fromarray(np.ascontiguousarray(self.image(number)))
        return torch.from_numpy(np.array(image.resize((side, side)))).permute(2, 0, 1)[None]


def _pictures_in(folder: Path) -> list[Path]:
    """Pictures of a folder in the order of their numbers, else of their names."""
    if not folder.is_dir():
        raise UsageError("There is no such folder of frames", where=folder)
    paths = [path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file()]
    if all(path.stem.isdecimal() for path in paths):
        return sorted(paths, key=lambda path: (int(path.stem), path.name))
    return sorted(paths)
