"""Open data sets by their command-line names, and split off a held-out part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rfmedsam2.errors import DatasetError, UsageError
from segment_anything_hq.choices import MaskRule
from segment_anything_hq.data.coco import coco_lvis
from segment_anything_hq.data.datasets import COLLECTIONS, Fault, ImageSet, open_folders

COCO_LVIS = {"coco_lvis_train": "train", "coco_lvis_val": "val"}
NAMES = (*COLLECTIONS, *COCO_LVIS)


def open_data(words: Sequence[str], *, rule: MaskRule = "above_128") -> tuple[ImageSet, ...]:
    """Open image sets.

    Args:
        words: each NAME=FOLDER, with a known collection (`NAMES`) and its root, or a FOLDER of images and masks, either
            in its subfolders `images` and `masks` or side by side.
        rule: how mask values in plain folders are interpreted.

    Raises:
        DatasetError: a folder is missing, or a set has no samples.
        UsageError: a name is unknown, or no data were given.
    """
    return tuple(images.require_samples() for word in _require_words(words) for images in _opened(word, rule))


def list_data(words: Sequence[str], *, rule: MaskRule = "above_128") -> tuple[ImageSet, ...]:
    """Open sets as `open_data` does, but return an unusable set as one without samples and with its faults.

    Raises:
        UsageError: a name is unknown, or no data were given.
    """
    sets: list[ImageSet] = []
    for word in _require_words(words):
        try:
            sets += _opened(word, rule)
        except DatasetError as error:
            sets.append(ImageSet(name=word, samples=(), faults=(Fault(where=error.where or word, what=error.what),)))
    return tuple(sets)


def split_held_out(sets: Sequence[ImageSet], share: float) -> tuple[tuple[ImageSet, ...], tuple[ImageSet, ...]]:
    """Split sets by image into a training part and a held-out part.

    Which part an image goes to depends only on its name and its set's name, so it does not change when other images are
    added or removed, and is the same on every machine. All objects of an image go to the same part.

    Args:
        sets: sets from `open_data`.
        share: fraction of the images to hold out, above 0 and below 1.

    Returns:
        the sets to train on, and the held-out sets.

    Raises:
        UsageError: the share is out of range or leaves one part empty.
    """
    if not 0 < share < 1:
        raise UsageError("The held-out share must be a fraction", expected="above 0 and below 1", found=share)
    kept, held = [], []
    for images in sets:
        away = {s.image for s in images.samples if _hash_fraction(images.name, s.image.stem) < share}
        for part, chosen in ((kept, False), (held, True)):
            samples = tuple(s for s in images.samples if (s.image in away) is chosen)
            if samples:
                part.append(replace(images, samples=samples, faults=(), expected=None))
    if not kept or not held:
        count = sum(len(images.samples) for images in sets)
        raise UsageError("This held-out share leaves one part empty", found=f"a share of {share} of {count} samples")
    return tuple(kept), tuple(held)


def _require_words(words: Sequence[str]) -> Sequence[str]:
    if not words:
        raise UsageError("No data were given", expected=f"--data FOLDER, or NAME=FOLDER with {', '.join(NAMES)}")
    return words


def _opened(word: str, rule: MaskRule) -> tuple[ImageSet, ...]:
    name, equals, text = word.partition("=")
    if not equals or Path(word).exists():
        return (_open_folder(Path(word), rule),)
    root = Path(text)
    if name not in NAMES:
        raise UsageError("Unknown collection", where=word, expected=f"one of {', '.join(NAMES)}", found=name)
    if not root.is_dir():
        raise DatasetError("The collection's folder is missing", where=root)
    return coco_lvis(root, COCO_LVIS[name]) if name in COCO_LVIS else COLLECTIONS[name](root)


def _open_folder(folder: Path, rule: MaskRule) -> ImageSet:
    if not folder.is_dir():
        raise DatasetError(
            "The data folder does not exist",
            where=folder,
            expected="a folder with images/ and masks/, or with images and masks side by side",
        )
    inside = [folder / "images", folder / "masks"]
    images, masks = inside if all(part.is_dir() for part in inside) else (folder, folder)
    return open_folders(images, masks, name=folder.resolve().name, rule=rule)


def _hash_fraction(name: str, stem: str) -> float:
    """A fixed pseudo-random number in [0, 1) for an image's name."""
    return int.from_bytes(hashlib.sha256(f"{name}/{stem}".encode()).digest()[:6], "big") / 2**48
