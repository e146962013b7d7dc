"""Frames of a video, from arrays or image files, read on demand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rfmedsam2.errors import UsageError, type_name
from segment_anything_hq.data.image_io import ENDINGS, read_image

_NUMBER = re.compile(r"\d+")


class Video:
    """A sequence of frames of the same size.

    Args:
        frames: (H, W, 3) uint8 RGB arrays, or a folder of images in the order of the numbers in their names
            (`frame_2` before `frame_10`), alphabetically without numbers. Hidden files are left out.

    Attributes:
        size: (H, W) of the frames, pixels.

    Raises:
        UsageError: there are no frames, the first is not an RGB image, or the folder holds other images beside
            numbered frames.
        ImageError: the first frame cannot be read.
    """

    def __init__(self, frames: Sequence[np.ndarray] | str | Path) -> None:
        self._frames = _image_files(Path(frames)) if isinstance(frames, str | Path) else frames
        self._where = frames if isinstance(frames, str | Path) else None
        if not hasattr(self._frames, "__len__") or not hasattr(self._frames, "__getitem__"):
            raise UsageError("This is not a video", expected="a folder or a list of arrays", found=type_name(frames))
        if not len(self._frames):
            raise UsageError("The video has no frames", where=self._where, expected="at least one image")
        self.size: tuple[int, int] = (0, 0)
        first = self.image(0)
        self.size = (first.shape[0], first.shape[1])

    def __len__(self) -> int:
        return len(self._frames)

    def image(self, number: int) -> np.ndarray:
        """Frame `number`, (H, W, 3) uint8 RGB.

        Raises:
            UsageError: the frame is not an RGB image or has another size than the first.
            ImageError: the frame cannot be read.
        """
        frame = self._frames[number]
        image = read_image(frame) if isinstance(frame, Path) else frame
        kind = getattr(image, "dtype", type(image).__name__)
        shape = np.shape(image)
        if len(shape) != 3 or shape[2] != 3 or kind != np.uint8 or not np.size(image) or np.ma.is_masked(image):
            raise UsageError(
                f"Frame {number} is not an RGB image",
                where=self._where,
                expected="(H, W, 3) uint8, RGB",
                found=f"{shape} {kind}" + (", of which some values are masked" if np.ma.is_masked(image) else ""),
            )
        if self.size != (0, 0) and shape[:2] != self.size:
            raise UsageError(
                f"Frame {number} has another size than frame 0",
                where=self._where,
                expected=f"{self.size[1]} x {self.size[0]} pixels",
                found=f"{shape[1]} x {shape[0]}",
                remedy="Resize the frames, or process the parts of the video separately",
            )
        return image

    def resized(self, number: int, side: int) -> Tensor:
        """Frame `number` resized to (1, 3, side, side) uint8, stretched as in SAM 2's predictor."""
        image = Image.fromarray(np.ascontiguousarray(self.image(number)))
        return torch.from_numpy(np.array(image.resize((side, side)))).permute(2, 0, 1)[None]


def _image_files(folder: Path) -> list[Path]:
    """Frames in a folder, in the order of the numbers in their names; in alphabetical order if no name has a number.

    Hidden files are not frames. With numbers, all names must be alike but for these, or all different with an order
    that is alphabetical, too. No number may occur twice, and order must not depend on whether a dot is a decimal point.
    """
    if folder.is_file():
        raise UsageError(
            "A video is read from a folder of images, not from a file",
            where=folder,
            expected=f"a folder with frames as {' '.join(sorted(ENDINGS))}, or a sequence of arrays",
            remedy=f"Extract the frames first: mkdir frames; ffmpeg -i {folder.name} frames/%05d.png",
        )
    if not folder.is_dir():
        raise UsageError("The folder of frames does not exist", where=folder)
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in ENDINGS and path.is_file() and not path.name.startswith(".")
    )
    patterns = Counter(map(_pattern, paths))
    pattern, count = max(patterns.items(), key=lambda item: ("#" in item[0], item[1]), default=("", 0))
    if "#" not in pattern:
        return paths
    if count == 1 and len(paths) > 1:
        return _ordered_alike(folder, paths, sorted(paths, key=_words_and_numbers))
    others = [path.name for path in paths if _pattern(path) != pattern]
    if others:
        raise UsageError(
            "The folder holds other images beside the numbered frames",
            where=folder,
            expected=f"names like {pattern.replace('#', '0')}{paths[0].suffix}",
            found=", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else ""),
            remedy="Move these images elsewhere, or number them like the frames",
        )
    ordered = sorted(paths, key=_numbers)
    for one, other in pairwise(ordered):
        if _numbers(one) == _numbers(other):
            names = f"{one.name} and {other.name}"
            raise UsageError("Two images have the same frame number", where=folder, found=names, remedy="Remove one")
    decimals = sorted(paths, key=_decimals)
    if any(_decimals(one) == _decimals(other) for one, other in pairwise(decimals)):
        return ordered  # 1.1 and 1.10 are no decimal numbers
    return _ordered_alike(folder, ordered, decimals)


def _ordered_alike(folder: Path, paths: list[Path], otherwise: list[Path]) -> list[Path]:
    """The paths, which must be in the same order when they are sorted in another way that names may be meant."""
    if paths == otherwise:
        return paths
    one, other = next(pair for pair in zip(paths, otherwise, strict=True) if pair[0] != pair[1])
    raise UsageError(
        "The names of the frames may be ordered in two ways",
        where=folder,
        expected="one number in each name, or several of the same number of digits",
        found=f"{one.name} or {other.name} as frame {paths.index(one)}",
        remedy="Rename the frames, such as 00000.png, 00001.png ..., or give a list of arrays",
    )


def _pattern(path: Path) -> str:
    """A file name without ending and numbers, in lower case."""
    return _NUMBER.sub("#", path.stem).lower()


def _words_and_numbers(path: Path) -> list[tuple[Decimal, str]]:
    """A sort key by which 9_b comes before 10_a."""
    parts = re.split(r"(\d+)", path.stem)
    return [(Decimal(part), "") if part.isdecimal() else (Decimal(-1), part) for part in parts]


def _decimals(path: Path) -> tuple[Decimal, ...]:
    """The numbers in a file name, where dots and commas between digits are decimal points."""
    return tuple(Decimal(number.replace(",", ".")) for number in re.findall(r"\d+(?:[.,]\d+)?", path.stem))


def _numbers(path: Path) -> tuple[Decimal, ...]:
    """The numbers in a file name; a name like 0.25 is one number."""
    if re.fullmatch(r"\d+\.\d+", path.stem):
        return (Decimal(path.stem),)
    return tuple(Decimal(number) for number in _NUMBER.findall(path.stem))
