"""Looking into every file of a set before it is used: all faults at once, and the counts that are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rfmedsam2.errors import DatasetError, ImageError, RfMedSamError
from segment_anything_hq.data.coco import Annotation
from segment_anything_hq.data.datasets import Fault, ImageSet, MaskFile, Sample
from segment_anything_hq.data.image_io import image_size, read_image, read_mask_values
from segment_anything_hq.prompts.clicks import IGNORE

THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SetCheck:
    """What was found in a set.

    Attributes:
        name: of the set.
        pictures: different pictures.
        samples: objects, each with a mask.
        expected: samples of the published set; None where that is not known.
        with_ignored: samples that have ignored pixels.
        faults: everything that is wrong, listing faults first.
    """

    name: str
    images: int
    samples: int
    expected: int | None
    with_ignored: int
    faults: tuple[Fault, ...]

    @property
    def complete(self) -> bool:
        """No faults, and as many samples as are known to be published."""
        return not self.faults and self.samples > 0 and self.expected in (None, self.samples)

    def summary(self) -> str:
        """One line."""
        of = "" if self.expected in (None, self.samples) else f" of {self.expected} that are published"
        faults = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}" if self.faults else "no faults"
        images = f" in {self.images} pictures" if self.images != self.samples else ""
        ignored = f", {self.with_ignored} with ignored pixels" if self.with_ignored else ""
        return f"{self.name}: {self.samples} samples{of}{images}{ignored}, {faults}"


def check_set(images: ImageSet, *, pixels: bool = True, threads: int = THREADS) -> SetCheck:
    """Look at every sample of a set.

    Args:
        images: the set.
        pixels: decode pictures and masks to the last byte; False: compare sizes from the files' heads, which takes
            seconds for a whole set and finds neither damage nor empty masks.
        threads: files looked at side by side.
    """
    look = _look_inside if pixels else _look_at_sizes
    with ThreadPoolExecutor(max_workers=threads) as workers:
        looks = list(workers.map(look, images.samples))
    # a picture of several objects is named once
    found = dict.fromkeys(fault for faults, _ in looks for fault in faults)
    twice = [i for i, n in Counter(s.id for s in images.samples).items() if n > 1]
    return SetCheck(
        name=images.name,
        images=len({s.image for s in images.samples}),
        samples=len(images.samples),
        expected=images.expected,
        with_ignored=sum(ignored for _, ignored in looks),
        faults=(*images.faults, *(Fault(where=i, what="two samples have this name") for i in twice), *found),
    )


def check_sets(sets: Sequence[ImageSet], *, pixels: bool = True) -> tuple[SetCheck, ...]:
    """`check_set` for each."""
    return tuple(check_set(images, pixels=pixels) for images in sets)


def total(checks: Sequence[SetCheck]) -> str:
    """One line about all sets together, with the total that is published where it is known of each."""
    samples = sum(c.samples for c in checks)
    known = [c.expected for c in checks if c.expected is not None]
    of = f" of {sum(known)} that are published" if len(known) == len(checks) and sum(known) != samples else ""
    faults = sum(len(c.faults) for c in checks)
    return f"{samples} samples{of} in {len(checks)} sets, {faults or 'no'} fault{'' if faults == 1 else 's'}"


def _look_at_sizes(sample: Sample) -> tuple[list[Fault], bool]:
    try:
        size = image_size(sample.image)
        if isinstance(sample.mask, MaskFile):
            return _size_faults(sample, size, image_size(sample.mask.path, upright=False)), False
        if isinstance(sample.mask, Annotation):
            return _size_faults(sample, size, sample.mask.size), False
    except ImageError as error:
        return [Fault(where=error.where or str(sample.image), what=_reason(error))], False
    return [], False


def _look_inside(sample: Sample) -> tuple[list[Fault], bool]:
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
    reason = _useless(sample, ground_truth)
    if reason is not None:
        faults.append(Fault(where=_mask_name(sample), what=reason))
    return faults, bool((ground_truth == IGNORE).any())


def _reason(error: RfMedSamError) -> str:
    """What an error says, without the file, which stands before it."""
    return error.what if error.found is None else f"{error.what} ({error.found})"


def _size_faults(sample: Sample, size: tuple[int, int], mask_size: tuple[int, int]) -> list[Fault]:
    if size == mask_size:
        return []
    what = f"the mask has {mask_size[0]} x {mask_size[1]} pixels, its picture {size[0]} x {size[1]}"
    return [Fault(where=_mask_name(sample), what=what)]


def _mask_name(sample: Sample) -> str:
    """The mask's file; where many masks are in one, the sample."""
    return str(sample.mask.source) if isinstance(sample.mask, MaskFile) else f"{sample.mask.source}, {sample.id}"


def _useless(sample: Sample, ground_truth: np.ndarray) -> str | None:
    """Why nothing can be learnt or measured with a mask."""
    if not (ground_truth == 1).any():
        if isinstance(sample.mask, MaskFile) and sample.mask.rule != "any":
            most = int(read_mask_values(sample.mask.path).max(initial=0))
            if most > 0:
                return f"the mask is empty: its values end at {most}, and object is above 128"
        return "the mask is empty"
    if (ground_truth == 1).all():
        return "the mask covers the whole picture"
    return None
