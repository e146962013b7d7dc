"""Check every file of a data set before use: all faults at once, and sample counts beside the published ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.errors import DatasetError, ImageError, RfMedSamError
from segment_anything_hq.data.coco import Annotation
from segment_anything_hq.data.datasets import Fault, ImageSet, MaskFile, Sample
from segment_anything_hq.data.image_io import image_size, read_image, read_mask_values
from segment_anything_hq.prompts.clicks import IGNORE

THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SetCheck:
    """The result of checking one data set.

    Attributes:
        name: the set's name.
        images: number of distinct images.
        samples: number of objects, each with a mask.
        expected: number of samples in the published set; None if unknown.
        with_ignored: number of samples with ignored pixels.
        faults: all faults, those found while listing first.
    """

    name: str
    images: int
    samples: int
    expected: int | None
    with_ignored: int
    faults: tuple[Fault, ...]

    @property
    def complete(self) -> bool:
        """True if there are no faults and the number of samples is the published one (if known)."""
        return not self.faults and self.samples > 0 and self.expected in (None, self.samples)

    def summary(self) -> str:
        """One line for the terminal."""
        of = "" if self.expected in (None, self.samples) else f" of {self.expected} that are published"
        faults = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}" if self.faults else "no faults"
        images = f" in {self.images} images" if self.images != self.samples else ""
        ignored = f", {self.with_ignored} with ignored pixels" if self.with_ignored else ""
        return f"{self.name}: {self.samples} samples{of}{images}{ignored}, {faults}"


def check_set(images: ImageSet, *, pixels: bool = True, threads: int = THREADS) -> SetCheck:
    """Check every sample of a set.

    Args:
        images: the set to check.
        pixels: decode images and masks completely; False: compare the sizes in the file headers only, which takes
            seconds for a whole set but finds neither damaged files nor empty masks.
        threads: number of files read in parallel.
    """
    check = _check_pixels if pixels else _check_sizes
    with ThreadPoolExecutor(max_workers=threads) as workers:
        results = list(workers.map(check, images.samples))
    # an image with several objects is reported once
    found = dict.fromkeys(fault for faults, _ in results for fault in faults)
    duplicates = [i for i, n in Counter(s.id for s in images.samples).items() if n > 1]
    return SetCheck(
        name=images.name,
        images=len({s.image for s in images.samples}),
        samples=len(images.samples),
        expected=images.expected,
        with_ignored=sum(ignored for _, ignored in results),
        faults=(*images.faults, *(Fault(where=i, what="two samples have this id") for i in duplicates), *found),
    )


def check_sets(sets: Sequence[ImageSet], *, pixels: bool = True) -> tuple[SetCheck, ...]:
    """Run `check_set` on each set."""
    return tuple(check_set(images, pixels=pixels) for images in sets)


def total(checks: Sequence[SetCheck]) -> str:
    """One line for all sets together, with the published total if it is known for each."""
    samples = sum(c.samples for c in checks)
    known = [c.expected for c in checks if c.expected is not None]
    of = f" of {sum(known)} that are published" if len(known) == len(checks) and sum(known) != samples else ""
    faults = sum(len(c.faults) for c in checks)
    return f"{samples} samples{of} in {len(checks)} sets, {faults or 'no'} fault{'' if faults == 1 else 's'}"


def _check_sizes(sample: Sample) -> tuple[list[Fault], bool]:
    try:
        size = image_size(sample.image)
        if isinstance(sample.mask, MaskFile):
            return _size_faults(sample, size, image_size(sample.mask.path)), False
        if isinstance(sample.mask, Annotation):
            return _size_faults(sample, size, sample.mask.size), False
    except ImageError as error:
        return [Fault(where=error.where or str(sample.image), what=_reason(error))], False
    return [], False


def _check_pixels(sample: Sample) -> tuple[list[Fault], bool]:
    faults: list[Fault] = []
    size = None
    try:
        size = read_image(sample.image).shape[:2]
    except ImageError as error:
        faults.append(Fault(where=str(sample.image), what=_reason(error)))
    try:
        ground_truth = sample.ground_truth()
    except (ImageError, DatasetError) as error:
        return [*faults, Fault(where=_mask_name(sample), what=_reason(error))], False
    if size is not None:
        faults += _size_faults(sample, (size[0], size[1]), (ground_truth.shape[0], ground_truth.shape[1]))
    reason = _why_unusable(sample, ground_truth)
    if reason is not None:
        faults.append(Fault(where=_mask_name(sample), what=reason))
    return faults, bool((ground_truth == IGNORE).any())


def why_empty(sample: Sample) -> str:
    """Why a mask has no object pixel, as a phrase: it may follow another rule than it was read by."""
    if isinstance(sample.mask, MaskFile) and sample.mask.rule != "any":
        most = int(read_mask_values(sample.mask.path).max(initial=0))
        if most > 0:
            remedy = f"{option('rule', 'any', flag='--mask-rule')} takes every value but 0"
            scale = "above 128" if most < 256 else "above half of 65535, as it has 16 bits"
            return f"the mask is empty: its largest value is {most}, and object pixels are {scale} ({remedy})"
    return "the mask is empty"


def _reason(error: RfMedSamError) -> str:
    """The error's message without the file, which is reported separately."""
    return error.what if error.found is None else f"{error.what} ({error.found})"


def _size_faults(sample: Sample, size: tuple[int, int], mask_size: tuple[int, int]) -> list[Fault]:
    if size == mask_size:
        return []
    what = f"the mask has {mask_size[0]} x {mask_size[1]} pixels, its image {size[0]} x {size[1]}"
    return [Fault(where=_mask_name(sample), what=what)]


def _mask_name(sample: Sample) -> str:
    """The mask's file, with the sample id if the file holds several masks."""
    return str(sample.mask.source) if isinstance(sample.mask, MaskFile) else f"{sample.mask.source}, {sample.id}"


def _why_unusable(sample: Sample, ground_truth: np.ndarray) -> str | None:
    """Why a mask cannot be used for training or evaluation; None if it can."""
    if not (ground_truth == 1).any():
        return why_empty(sample)
    if (ground_truth == 1).all():
        return "the mask covers the whole image"
    return None
