"""Sampling of training and validation patches from preprocessed cases, with or without augmentation.

Sampling follows nnU-Net: the last third of a batch must contain a voxel of a random foreground class; regions outside
the volume are padded (image 0, label -1 "outside").
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rfmedsam2.engine.rng import preserved, seed_all
from rfmedsam2.errors import PlanError, RfMedSamError, StoreError
from rfmedsam2.extensions import make
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Stage
from rfmedsam2.store.packed_arrays import Ranges
from rfmedsam2.store.preprocessed import CaseStore, StoredCase
from rfmedsam2.store.step0_logits import LogitsStore, StoredLogits
from rfmedsam2.transforms.augment import plain_transforms, read_size, training_transforms
from rfmedsam2.transforms.crop import OUTSIDE_LABEL
from rfmedsam2.transforms.foreground import ANNOTATED

OUTSIDE_LOGIT = -10.0
"""Logit of every class outside the volume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchBatch:
    """One batch: image (B, C, ...) float32, target (B, ...) int16 label values, ids of the cases.

    `step0`: fixed class maps of Step 0 (B, K, ...) float32 at the same places, if the source has them.
    `levels`: frozen features of the B * D slices, of each level (B * D, channels, h, w) float16, if they are cached.
    """

    image: Tensor
    target: Tensor
    ids: tuple[str, ...]
    step0: Tensor | None = None
    levels: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What other networks made of the cases, in their voxels.

    Attributes:
        step0: fixed logits of Step 0; None: batches have none.
        previous: labels of a cascade's first stage, which go one-hot behind the image's channels; None: none.
    """

    step0: LogitsStore | None = None
    previous: LogitsStore | None = None


NOTHING = Beside()


class PatchSource:
    """Batches by number; batch i depends only on (seed, rank, i).

    Args:
        store: preprocessed cases of the stage.
        ids: ids of the cases to draw from, with replacement.
        stage: stage with patch and batch size, oversampling and augmentation.
        labels: labels of the dataset; with an ignore label, every patch contains annotated voxels.
        augment: whether to augment; if not, patches are only cropped, for validation.
        seed: seed of the whole training.
        rank: rank of this process.
        ranks: total number of processes; batch_size is per process.
        beside: what there is of the same cases besides images and labels.

    Raises:
        PlanError: the stage is the second of a cascade, and there are no labels of the first.
    """

    def __init__(
        self,
        store: CaseStore,
        ids: Sequence[str],
        stage: Stage,
        *,
        labels: LabelSet,
        augment: bool,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        beside: Beside = NOTHING,
    ) -> None:
        step0, previous = beside.step0, beside.previous
        if stage.previous_stage is not None and previous is None:
            raise PlanError(
                "Patches of the second stage of a cascade need the labels of the first",
                where=f"previous_stage {stage.previous_stage}",
                remedy="Train it with rfmed_train, or draw patches of another stage",
            )
        self._step0, self._previous = step0, previous
        self._logits, self._labeled = dict[str, StoredLogits](), dict[str, StoredLogits]()
        self._store, self._ids, self._stage, self._labels = store, tuple(ids), stage, labels
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._cases: dict[str, StoredCase] = {}
        self._final = stage.patch_size
        self._read = read_size(stage.augmentation, self._final) if augment else tuple(self._final)
        known = () if previous is None else labels.values[1:]
        if augment:
            self._transforms = training_transforms(stage.augmentation, self._final, stage.normalization, previous=known)
            self._extensions = [make("augmentation", extension) for extension in stage.extensions.augmentation]
        else:
            self._extensions = []
            self._transforms = plain_transforms(stage.normalization, previous=known)

    def cases(self, step: int) -> tuple[str, ...]:
        """Ids of the cases of batch `step`, without reading them."""
        return self._drawn(self._rng(step))

    def batch(self, step: int) -> PatchBatch:
        """Read, crop and augment the samples of batch `step`.

        Positions are drawn from (seed, rank, step), augmentation from the global RNGs, which the caller has seeded.
        """
        rng = self._rng(step)
        ids = self._drawn(rng)
        images, targets, logits = zip(
            *(self._sample(name, self._forced(slot, rng), rng) for slot, name in enumerate(ids)), strict=True
        )
        return PatchBatch(
            image=torch.stack(images),
            target=torch.stack(targets),
            ids=ids,
            step0=None if self._step0 is None else torch.stack(logits),
        )

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, self._rank, step))

    def _drawn(self, rng: np.random.Generator) -> tuple[str, ...]:
        picks = rng.integers(len(self._ids), size=self._stage.batch_size)
        return tuple(self._ids[i] for i in picks)

    def _open(self, name: str) -> StoredCase:
        if name not in self._cases:
            self._cases[name] = self._store.open(name)
        return self._cases[name]

    def sample(self, name: str, slot: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One patch of a case, image (C, *patch) float32 and target (*patch) int16, as place `slot` of a batch has it.

        Its place is drawn from `rng`; random changes come from the global generators.
        """
        return self._sample(name, self._forced(slot, rng), rng)[:2]

    def view(self, name: str, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """View `number` of a case, the same at every call: image, target, and Step 0's class map if there is one.

        Views of a case contain foreground as often as samples of a batch. The global generators stay as they were.
        """
        place, share = zlib.crc32(name.encode()), self._stage.sampling.oversample_foreground
        count = place % 100 + number
        seed = (self._seed, place, number)
        with preserved():
            seed_all(*seed)
            forced = math.floor((count + 1) * share) > math.floor(count * share)
            return self._sample(name, forced, np.random.default_rng(seed))

    def _sample(self, name: str, forced: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """The patch as `sample` gives it, and Step 0's class map (K, *patch), moved and flipped as the image is."""
        try:
            case = self._open(name)
            box = self._box(case, forced, rng)
            image, label = read_padded(case, box)
            label = label[None] if self._previous is None else self._with_previous(self._previous, name, box, label)
            logits = None if self._step0 is None else self._read_logits(self._step0, name, box)
        except RfMedSamError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError(
                f"A preprocessed case cannot be read ({error})",
                where=name,
                remedy="Run rfmed_plan_and_preprocess again: it rebuilds damaged cases",
            ) from error
        if self._stage.is_2d:
            image, label = image[:, 0], label[:, 0]
        given = {} if logits is None else {"regression_target": torch.from_numpy(logits)}
        changed = self._transforms(
            image=torch.from_numpy(np.ascontiguousarray(image)),
            segmentation=torch.from_numpy(np.ascontiguousarray(label)),
            **given,
        )
        image, label = changed["image"], changed["segmentation"][0]
        for change in self._extensions:
            image, label = change(image, label)
        return image, label, None if logits is None else changed["regression_target"] + OUTSIDE_LOGIT

    def _read_logits(self, store: LogitsStore, name: str, box: Ranges) -> np.ndarray:
        """Step 0's class map in a box, less OUTSIDE_LOGIT: where it is padded, by a transform too, 0 is background."""
        if name not in self._logits:
            self._logits[name] = store.open(name)
        found = self._logits[name]
        inside, sides = _inside(box, found.shape)
        return np.pad(found.patch(inside) - OUTSIDE_LOGIT, [(0, 0), *sides])

    def _with_previous(self, store: LogitsStore, name: str, box: Ranges, label: np.ndarray) -> np.ndarray:
        """The label patch and the first stage's, (2, *patch) int16."""
        if name not in self._labeled:
            self._labeled[name] = store.open(name)
        found = self._labeled[name]
        inside, sides = _inside(box, found.shape)
        own = found.patch(inside)[0].astype(np.int16)
        return np.stack([label, np.pad(own, sides, constant_values=OUTSIDE_LABEL)])

    def _forced(self, slot: int, rng: np.random.Generator) -> bool:
        """nnU-Net's rules: the last samples of the batch of all ranks must contain foreground, or each by chance."""
        if self._stage.sampling.oversampling == "probabilistic":
            return rng.random() < self._stage.sampling.oversample_foreground
        total = self._stage.batch_size * self._ranks
        return self._rank * self._stage.batch_size + slot >= round(
            total * (1 - self._stage.sampling.oversample_foreground)
        )

    def _box(self, case: StoredCase, forced: bool, rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of the region to read, possibly beyond the volume."""
        read = (1, *self._read) if self._stage.is_2d else self._read
        final = (1, *self._final) if self._stage.is_2d else self._final
        # padding, so that patches also cover the border; more if the volume is smaller than the region
        margin = [max(r - f, r - n) for r, f, n in zip(read, final, case.shape, strict=True)]
        low = np.array([-m // 2 for m in margin])
        high = np.array([n + m // 2 + m % 2 - r for n, m, r in zip(case.shape, margin, read, strict=True)])
        center = self._center(case, forced, rng)
        anywhere = center is None
        start = rng.integers(low, high + 1) if anywhere else np.maximum(low, center - np.array(read) // 2)
        return tuple((int(s), int(s) + r) for s, r in zip(start, read, strict=True))

    def _center(self, case: StoredCase, forced: bool, rng: np.random.Generator) -> np.ndarray | None:
        """A voxel that the patch must contain, or None for any position."""
        places = {key: voxels for key, voxels in case.foreground.items() if len(voxels)}
        annotated = places.pop(ANNOTATED, None)
        if forced and places:
            keys = list(places)
            voxels = places[keys[int(rng.integers(len(keys)))]]
        elif self._labels.ignore is not None and annotated is not None:
            voxels = annotated
        else:
            return None
        flat = int(voxels[int(rng.integers(len(voxels)))])
        return np.array(np.unravel_index(flat, case.shape))


def read_padded(case: StoredCase, box: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Read `box` from a case, padded where it is outside the volume: image with 0, label with OUTSIDE_LABEL.

    Returns:
        image (C, *box) float32 and label (*box) int16.
    """
    inside, sides = _inside(box, case.shape)
    image, label = case.image_patch(inside), case.label_patch(inside)
    if any(before or after for before, after in sides):
        image = np.pad(image, [(0, 0), *sides])
        label = np.pad(label, sides, constant_values=OUTSIDE_LABEL)
    return image, label


def _inside(box: Ranges, shape: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The part of a box that is inside the volume, and what it lacks before and after along each axis."""
    inside = [(max(0, a), min(n, b)) for (a, b), n in zip(box, shape, strict=True)]
    return inside, [(i - a, b - j) for (a, b), (i, j) in zip(box, inside, strict=True)]
