"""Data as users name it on the command line, and which part of it is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rfmedsam2.errors import DatasetError, UsageError
from segment_anything_hq.data.coco import coco_lvis
from segment_anything_hq.data.datasets import COLLECTIONS, Fault, ImageSet, open_folders
from segment_anything_hq.data.image_io import MaskRule

COCO_LVIS = {"coco_lvis_train": "train", "coco_lvis_val": "val"}
NAMES = (*COLLECTIONS, *COCO_LVIS)


def open_data(words: Sequence[str], *, rule: MaskRule = "above_128") -> tuple[ImageSet, ...]:
    """Open sets of pictures and masks.

    Args:
        words: each NAME=FOLDER with the root of a known collection (`NAMES`), or a FOLDER of pictures and masks: with
            folders `images` and `masks` in it, or with both side by side.
        rule: what the values of plain folders' masks mean.

    Raises:
        DatasetError: no such folder, or a set without a single sample.
        UsageError: a name that is not known, or no data at all.
    """
    return tuple(images.required() for word in _named(words) for images in _opened(word, rule))


def list_data(words: Sequence[str], *, rule: MaskRule = "above_128") -> tuple[ImageSet, ...]:
    """Open sets as `open_data` does, to look for faults: a set that cannot be used is one of no samples, with faults.

    Raises:
        UsageError: a name that is not known, or no data at all.
    """
    sets: list[ImageSet] = []
    for word in _named(words):
        try:
            sets += _opened(word, rule)
        except DatasetError as error:
            sets.append(ImageSet(name=word, samples=(), faults=(Fault(where=error.where or word, what=error.what),)))
    return tuple(sets)


def held_out(sets: Sequence[ImageSet], share: float) -> tuple[tuple[ImageSet, ...], tuple[ImageSet, ...]]:
    """Part sets by their pictures' names: (to train on, held out).

    A picture's part depends on its name and its set's alone: it stays the same when others come or go, and on every
    machine. All objects of a picture are in one part.

    Args:
        sets: of `open_data`.
        share: of the pictures to hold out, 0 to 1.

    Raises:
        UsageError: a share that leaves one part empty.
    """
    if not 0 < share < 1:
        raise UsageError("This share cannot be held out", expected="above 0 and below 1", found=share)
    kept, held = [], []
    for images in sets:
        away = {s.image for s in images.samples if _place(images.name, s.image.stem) < share}
        for part, chosen in ((kept, False), (held, True)):
            samples = tuple(s for s in images.samples if (s.image in away) is chosen)
            if samples:
                part.append(replace(images, samples=samples, faults=(), expected=None))
    if not kept or not held:
        count = sum(len(images.samples) for images in sets)
        raise UsageError("This share leaves nothing of one part", found=f"{share} of {count} samples")
    return tuple(kept), tuple(held)


def _named(words: Sequence[str]) -> Sequence[str]:
    if not words:
        raise UsageError("No data was named", expected=f"--data FOLDER, or NAME=FOLDER with {', '.join(NAMES)}")
    return words


def _opened(word: str, rule: MaskRule) -> tuple[ImageSet, ...]:
    name, equals, text = word.partition("=")
    if not equals or Path(word).exists():
        return (_open_folder(Path(word), rule),)
    root = Path(text)
    if name not in NAMES:
        raise UsageError("No collection has this name", where=word, expected=f"one of {', '.join(NAMES)}", found=name)
    if not root.is_dir():
        raise DatasetError("The collection's folder is missing", where=root)
    return coco_lvis(root, COCO_LVIS[name]) if name in COCO_LVIS else COLLECTIONS[name](root)


def _open_folder(folder: Path, rule: MaskRule) -> ImageSet:
    if not folder.is_dir():
        raise DatasetError(
            "The data's folder is missing", where=folder, expected="a folder with images/ and masks/, or with both"
        )
    inside = [folder / "images", folder / "masks"]
    images, masks = inside if all(part.is_dir() for part in inside) else (folder, folder)
    return open_folders(images, masks, name=folder.resolve().name, rule=rule)


def _place(name: str, stem: str) -> float:
    """0 to 1, as good as random, always the same."""
    return int.from_bytes(hashlib.sha256(f"{name}/{stem}".encode()).digest()[:6], "big") / 2**48
