"""Open data sets by their command-line names, and split off a held-out part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rfmedsam2.arguments import option
from rfmedsam2.errors import DatasetError, UsageError
from rfmedsam2.system.ordinary_files import require_folder
from segment_anything_hq.choices import MaskRule
from segment_anything_hq.data.coco import coco_lvis
from segment_anything_hq.data.content import digests_of
from segment_anything_hq.data.datasets import COLLECTIONS, Fault, ImageSet, open_folders

logger = logging.getLogger(__name__)
COCO_LVIS = {"coco_lvis_train": "train", "coco_lvis_val": "val"}
WANTED = "a folder with images/ and masks/, or with images and masks side by side"
NAMES = (*COLLECTIONS, *COCO_LVIS)


def open_data(
    words: Sequence[str], *, rule: MaskRule | None = None, beside: Sequence[str] = ()
) -> tuple[ImageSet, ...]:
    """Open image sets; what is left out of a set, such as images without masks, is warned of.

    Args:
        words: each NAME=FOLDER, with a known collection (`NAMES`) and its root, or a FOLDER of images and masks, either
            in its subfolders `images` and `masks` or side by side.
        rule: how mask values in plain folders are interpreted; None: above 128. Collections have their own rules.
        beside: words that the same rule is given for, such as those of the validation data.

    Raises:
        DatasetError: a folder is missing, or a set has no samples.
        UsageError: a name is unknown, no data were given, or a rule for collections alone.
    """
    opened = _require_words(words, rule, beside)
    sets = tuple(images.require_samples() for word in opened for images in _opened(word, rule))
    for images in sets:
        if images.faults:
            first, count = images.faults[0], len(images.faults)
            more = f", and {count - 1} more" if count > 1 else ""
            logger.warning("Left out of %s: %s%s. samhq_check_data lists everything", images.name, first, more)
    return sets


def list_data(words: Sequence[str], *, rule: MaskRule | None = None) -> tuple[ImageSet, ...]:
    """Open sets as `open_data` does, but return an unusable set as one without samples and with its faults.

    Raises:
        UsageError: a name is unknown, or no data were given.
    """
    sets: list[ImageSet] = []
    for word in _require_words(words, rule):
        try:
            sets += _opened(word, rule)
        except DatasetError as error:
            sets.append(ImageSet(name=word, samples=(), faults=(Fault(where=error.where or word, what=error.what),)))
    return tuple(sets)


def split_held_out(sets: Sequence[ImageSet], share: float) -> tuple[tuple[ImageSet, ...], tuple[ImageSet, ...]]:
    """Split sets by image into a training part and a held-out part.

    Which part an image goes to depends only on the bytes of its file, so it does not change when images are moved,
    renamed, added or removed, and is the same on every machine. Copies of an image and all its objects go to the same
    part.

    Args:
        sets: sets from `open_data`.
        share: fraction of the images to hold out, above 0 and below 1.

    Returns:
        the sets to train on, and the held-out sets.

    Raises:
        UsageError: the share is out of range or leaves one part empty.
        ImageError: an image cannot be read.
    """
    if not 0 < share < 1:
        raise UsageError("The held-out share must be a fraction", expected="above 0 and below 1", found=share)
    kept, held = [], []
    away = {image for image, digest in digests_of(sets).items() if _fraction(digest) < share}
    for images in sets:
        for part, chosen in ((kept, False), (held, True)):
            samples = tuple(s for s in images.samples if (s.image in away) is chosen)
            if samples:
                part.append(replace(images, samples=samples, faults=(), expected=None))
    if not kept or not held:
        count = len({sample.image for images in sets for sample in images.samples})
        part = "to hold out" if kept else "to train on"
        raise UsageError(
            f"No image is left {part}",
            expected="a share that puts at least one image on either side",
            found=f"a share of {share:g} of {count} image(s)",
            remedy=f"Give a {'larger' if kept else 'smaller'} share, more images, or validation data of its own",
        )
    return tuple(kept), tuple(held)


def _require_words(words: Sequence[str], rule: MaskRule | None, beside: Sequence[str] = ()) -> Sequence[str]:
    if not words:
        raise UsageError("No data were given", expected=f"FOLDER, or NAME=FOLDER with {', '.join(NAMES)}")
    named = [word for word in words if _is_collection(word)]
    if rule is not None and named:
        asked = option("rule", rule, flag="--mask-rule")
        if all(map(_is_collection, (*words, *beside))):
            raise UsageError(
                "Collections have their own mask rules",
                where=asked,
                found=", ".join(named),
                remedy=f"Leave {option('rule', flag='--mask-rule')} out, or give folders of images and masks "
                "without NAME=",
            )
        logger.warning("%s is applied to folders only; %s: own rules", asked, ", ".join(named))
    return words


def _is_collection(word: str) -> bool:
    return _is_named(word) and word.partition("=")[0] in NAMES


def _is_named(word: str) -> bool:
    """Whether a word is NAME=FOLDER, not a folder with an equals sign in its name."""
    return "=" in word and not Path(word).exists()


def _opened(word: str, rule: MaskRule | None) -> tuple[ImageSet, ...]:
    if not _is_named(word):
        return (_open_folder(Path(word), rule or "above_128"),)
    name, _, text = word.partition("=")
    root = Path(text)
    if name not in NAMES:
        raise UsageError("Unknown collection", where=word, expected=f"one of {', '.join(NAMES)}", found=name)
    if not text:
        raise UsageError("The collection has no folder", where=word, expected=f"{name}=FOLDER")
    require_folder(root, "collection's folder", error=DatasetError)
    return coco_lvis(root, COCO_LVIS[name]) if name in COCO_LVIS else COLLECTIONS[name](root)


def _open_folder(folder: Path, rule: MaskRule) -> ImageSet:
    require_folder(folder, "data folder", expected=WANTED, error=DatasetError)
    inside = [folder / "images", folder / "masks"]
    images, masks = inside if all(part.is_dir() for part in inside) else (folder, folder)
    return open_folders(images, masks, name=folder.resolve().name, rule=rule)


def _fraction(digest: str) -> float:
    """A fixed pseudo-random number in [0, 1) for the content of an image."""
    return int(digest, 16) / 16 ** len(digest)
