"""Image sets with masks: HQSeg-44K in sam-hq's layout, RITM's evaluation sets, and plain folders.

Opening a set only lists files, pairs images with masks and reports what is left over. `data.checks` reads the files,
`data.coco` reads annotation files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.io import loadmat

from rfmedsam2.errors import DatasetError, ImageError, shortlist
from rfmedsam2.system.file_names import is_file_name
from segment_anything_hq.choices import MaskRule
from segment_anything_hq.data.image_io import ENDINGS, read_ground_truth, read_image

HQSEG_TRAINING_IMAGES = 44_320
HQSEG_TEST_IMAGES = 1_537


class Mask(Protocol):
    """A source of one mask."""

    @property
    def source(self) -> Path:
        """The file that the mask is read from."""
        ...

    def read(self) -> np.ndarray:
        """(H, W) int8: 1 object, 0 background, -1 ignored."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFile:
    """A mask stored as an image file."""

    path: Path
    rule: MaskRule = "above_128"

    @property
    def source(self) -> Path:
        """The image file of the mask."""
        return self.path

    def read(self) -> np.ndarray:
        """(H, W) int8: 1 object, 0 background, -1 ignored."""
        return read_ground_truth(self.path, self.rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatInstance:
    """One instance from one of SBD's .mat files."""

    path: Path
    instance: int

    @property
    def source(self) -> Path:
        """The .mat file."""
        return self.path

    def read(self) -> np.ndarray:
        """(H, W) int8: 1 object, 0 background."""
        return np.ascontiguousarray(_mat_instances(self.path) == self.instance, np.int8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One object of one image.

    Attributes:
        id: unique name within the set.
        image: the image's file; samples of one image are consecutive.
        mask: source of the object's mask.
    """

    id: str
    image: Path
    mask: Mask

    def read_image(self) -> np.ndarray:
        """(H, W, 3) uint8, RGB."""
        return read_image(self.image)

    def ground_truth(self) -> np.ndarray:
        """(H, W) int8: 1 object, 0 background, -1 ignored."""
        return self.mask.read()

    def ground_truth_for(self, image: np.ndarray) -> np.ndarray:
        """(H, W) int8: the mask, checked against the size of its image (H, W, 3).

        Raises:
            ImageError: the mask cannot be read or has another size than the image.
        """
        ground_truth = self.ground_truth()
        if ground_truth.shape != image.shape[:2]:
            raise ImageError(
                "The mask has another size than its image",
                where=self.mask.source,
                expected=f"{image.shape[0]} x {image.shape[1]}",
                found=f"{ground_truth.shape[0]} x {ground_truth.shape[1]}",
            )
        return ground_truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong with a file or sample."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """A data set of images with masks.

    Attributes:
        name: the set's usual name.
        samples: in the order of their images' names.
        faults: found while listing: images without masks, masks without images, missing folders.
        expected: number of samples in the published set; None if unknown.
    """

    name: str
    samples: tuple[Sample, ...]
    faults: tuple[Fault, ...] = ()
    expected: int | None = None

    def subset(self, ids: Collection[str]) -> ImageSet:
        """The samples with these ids, in the order of this set.

        Raises:
            DatasetError: an id is not in the set.
        """
        chosen = set(ids)
        samples = tuple(s for s in self.samples if s.id in chosen)
        unknown = sorted(chosen - {s.id for s in samples})
        if unknown:
            raise DatasetError(
                "The set does not contain these samples", where=self.name, found=shortlist(unknown, limit=10)
            )
        return replace(self, samples=samples, expected=None)

    def require_samples(self) -> ImageSet:
        """Return the set itself if it has samples.

        Raises:
            DatasetError: the set has no samples; the message names its first faults.
        """
        if self.samples:
            return self
        reasons = shortlist(self.faults, limit=3, separator="; ")
        raise DatasetError("The set has no samples", where=self.name, found=reasons or None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Folders of a published set's images and masks, relative to its root."""

    name: str
    images: str
    masks: str
    rule: MaskRule = "above_128"
    expected: int | None = None


# sam-hq, train/train.py
HQSEG_TRAINING = (
    Layout(name="DIS5K-TR", images="DIS5K/DIS-TR/im", masks="DIS5K/DIS-TR/gt", expected=3000),
    Layout(
        name="ThinObject5k-TR",
        images="thin_object_detection/ThinObject5K/images_train",
        masks="thin_object_detection/ThinObject5K/masks_train",
        expected=4748,
    ),
    Layout(name="FSS", images="cascade_psp/fss_all", masks="cascade_psp/fss_all", expected=10_000),
    Layout(name="DUTS-TR", images="cascade_psp/DUTS-TR", masks="cascade_psp/DUTS-TR", expected=10_553),
    Layout(name="DUTS-TE", images="cascade_psp/DUTS-TE", masks="cascade_psp/DUTS-TE", expected=5019),
    Layout(name="ECSSD", images="cascade_psp/ecssd", masks="cascade_psp/ecssd", expected=1000),
    Layout(name="MSRA10K", images="cascade_psp/MSRA_10K", masks="cascade_psp/MSRA_10K", expected=10_000),
)
HQSEG_TEST = (
    Layout(name="DIS5K-VD", images="DIS5K/DIS-VD/im", masks="DIS5K/DIS-VD/gt", expected=470),
    Layout(
        name="COIFT",
        images="thin_object_detection/COIFT/images",
        masks="thin_object_detection/COIFT/masks",
        expected=280,
    ),
    Layout(
        name="HRSOD",
        images="thin_object_detection/HRSOD/images",
        masks="thin_object_detection/HRSOD/masks_max255",
        expected=287,
    ),
    Layout(
        name="ThinObject5k-TE",
        images="thin_object_detection/ThinObject5K/images_test",
        masks="thin_object_detection/ThinObject5K/masks_test",
        expected=500,
    ),
)
# RITM, isegm/data/datasets
GRABCUT = Layout(name="GrabCut", images="data_GT", masks="boundary_GT", rule="ignore_128", expected=50)
BERKELEY = Layout(name="Berkeley", images="images", masks="masks", rule="ignore_128", expected=100)
DAVIS = Layout(name="DAVIS", images="img", masks="gt", rule="any", expected=345)
COCO_MVAL = Layout(name="COCO_MVal", images="img", masks="gt", rule="any", expected=800)
SBD_INSTANCES = 6671
"""Instances in SBD's 2,857 validation images."""


def hqseg_training(root: Path) -> tuple[ImageSet, ...]:
    """Open HQSeg-44K's training sets: six by the paper's count, in seven folders."""
    return tuple(open_layout(layout, root) for layout in HQSEG_TRAINING)


def hqseg_test(root: Path) -> tuple[ImageSet, ...]:
    """Open the four test sets that HQ-SAM is evaluated on."""
    return tuple(open_layout(layout, root) for layout in HQSEG_TEST)


def open_layout(layout: Layout, root: Path) -> ImageSet:
    """List a set that has a published layout."""
    samples, faults = pair_files(root / layout.images, root / layout.masks, rule=layout.rule)
    return ImageSet(name=layout.name, samples=samples, faults=faults, expected=layout.expected)


def open_folders(images: Path, masks: Path, *, name: str | None = None, rule: MaskRule = "above_128") -> ImageSet:
    """List a folder of images and a folder of masks, which may be the same folder.

    A mask has the name of its image (without the ending), followed by "_", "-" or "#" and a number if the image has
    several objects. If both are in one folder, .png files are masks and all others are images.
    """
    samples, faults = pair_files(images, masks, rule=rule)
    return ImageSet(name=name or images.parent.name or images.name, samples=samples, faults=faults)


def open_sbd(root: Path, split: str = "val") -> ImageSet:
    """Open SBD as RITM evaluates it: root/img, root/inst/*.mat, root/val.txt; each instance is a sample.

    Reads every .mat file once to list its instances.
    """
    listing = root / f"{split}.txt"
    expected = SBD_INSTANCES if split == "val" else None
    if not listing.is_file():
        fault = Fault(where=str(listing), what="the list of images is missing")
        return ImageSet(name="SBD", samples=(), faults=(fault,), expected=expected)
    names = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    samples: list[Sample] = []
    faults: list[Fault] = []
    faults += [Fault(where=str(listing), what=f"{n[:80]!r} is not a name") for n in names if not is_file_name(n)]
    names = [name for name in names if is_file_name(name)]
    with ThreadPoolExecutor() as threads:
        for name, found in zip(names, threads.map(lambda n: _mat_ids(root / "inst" / f"{n}.mat"), names), strict=True):
            image = root / "img" / f"{name}.jpg"
            if isinstance(found, Fault) or not image.is_file():
                faults.append(
                    found if isinstance(found, Fault) else Fault(where=str(image), what="the image is missing")
                )
                continue
            path = root / "inst" / f"{name}.mat"
            samples += [Sample(id=f"{name}_{i}", image=image, mask=MatInstance(path=path, instance=i)) for i in found]
    return ImageSet(name="SBD", samples=tuple(samples), faults=tuple(faults), expected=expected)


COLLECTIONS: dict[str, Callable[[Path], tuple[ImageSet, ...]]] = {
    "hqseg44k_train": hqseg_training,
    "hqseg44k_test": hqseg_test,
    "grabcut": lambda root: (open_layout(GRABCUT, root),),
    "berkeley": lambda root: (open_layout(BERKELEY, root),),
    "davis": lambda root: (open_layout(DAVIS, root),),
    "coco_mval": lambda root: (open_layout(COCO_MVAL, root),),
    "sbd": lambda root: (open_sbd(root),),
}
"""Functions that open published collections by name, given the root folder of their layout."""


def pair_files(
    images: Path, masks: Path, *, rule: MaskRule = "above_128"
) -> tuple[tuple[Sample, ...], tuple[Fault, ...]]:
    """Pair images with masks by name; returns samples, and faults for what is left over. See `open_folders`."""
    missing = [f for f in dict.fromkeys((images, masks)) if not f.is_dir()]
    if missing:
        return (), tuple(Fault(where=str(f), what="the folder is missing") for f in missing)
    image_files, mask_files = _split(images) if images == masks else (_files(images), _files(masks))
    by_stem, faults = _by_stem(image_files)
    mask_by_stem, mask_faults = _by_stem(mask_files)
    objects: dict[str, list[str]] = defaultdict(list)
    for stem in mask_by_stem:
        owner = stem if stem in by_stem else _owner(stem, by_stem)
        if owner is None:
            faults.append(Fault(where=str(mask_by_stem[stem]), what="the mask has no image"))
        else:
            objects[owner].append(stem)
    faults += [Fault(where=str(p), what="the image has no mask") for s, p in by_stem.items() if s not in objects]
    if not image_files:
        faults.append(Fault(where=str(images), what="the folder holds no images"))
    samples = [
        Sample(id=stem, image=by_stem[owner], mask=MaskFile(path=mask_by_stem[stem], rule=rule))
        for owner in by_stem
        for stem in objects.get(owner, ())
    ]
    return tuple(samples), tuple(faults + mask_faults)


def read_ahead(samples: Iterable[Sample], *, ahead: int = 2) -> Iterator[tuple[Sample, np.ndarray, np.ndarray]]:
    """Yield each sample with its image and ground truth, reading the next ones in a background thread.

    An image shared by consecutive samples is read once and yielded as the same array.

    Args:
        samples: the samples to read.
        ahead: number of samples to read in advance.

    Yields:
        the sample, its image (H, W, 3) uint8 RGB, and its ground truth (H, W) int8: 1 object, 0 background, -1 ignored.

    Raises:
        ImageError: a file cannot be read, or a mask has another size than its image.
    """
    queue: list = []
    with ThreadPoolExecutor(max_workers=1) as thread:
        last: tuple[Path | None, np.ndarray | None] = (None, None)

        def read(sample: Sample) -> tuple[Sample, np.ndarray, np.ndarray]:
            nonlocal last
            image = last[1] if last[0] == sample.image and last[1] is not None else sample.read_image()
            last = (sample.image, image)
            return sample, image, sample.ground_truth_for(image)

        for sample in samples:
            queue.append(thread.submit(read, sample))
            if len(queue) > ahead:
                yield queue.pop(0).result()
        while queue:
            yield queue.pop(0).result()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))


def _split(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images and masks of one folder: .png files are masks, all others are images."""
    files = _files(folder)
    return [p for p in files if p.suffix.lower() != ".png"], [p for p in files if p.suffix.lower() == ".png"]


def _by_stem(files: list[Path]) -> tuple[dict[str, Path], list[Fault]]:
    found: dict[str, Path] = {}
    faults = []
    for path in files:
        if path.stem in found:
            faults.append(Fault(where=str(path), what=f"has the same name as {found[path.stem].name}"))
        else:
            found[path.stem] = path
    return found, faults


def _owner(stem: str, image_stems: Collection[str]) -> str | None:
    """The image that a numbered mask (one of several objects) belongs to; None if there is none."""
    match = re.fullmatch(r"(.+)[_#-]\d+", stem)
    return match[1] if match and match[1] in image_stems else None


def _mat_instances(path: Path) -> np.ndarray:
    """Read the instance numbers (H, W) of an SBD file.

    Raises:
        ImageError: the file is missing or is not one of SBD's.
    """
    try:
        return np.asarray(loadmat(path)["GTinst"]["Segmentation"][0, 0])
    except Exception as error:  # scipy's reader has no exception of its own for damaged files
        found = f"{type(error).__name__}: {error}"
        raise ImageError("The instances cannot be read", where=path, expected="SBD's GTinst", found=found) from error


def _mat_ids(path: Path) -> list[int] | Fault:
    if not path.is_file():
        return Fault(where=str(path), what="the instances are missing")
    try:
        return [int(i) for i in np.unique(_mat_instances(path)) if i != 0]
    except ImageError as error:
        return Fault(where=str(path), what=str(error))
