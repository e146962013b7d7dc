"""Training and validation batches of one fold, for all tasks on volumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from rfmedsam2.engine.loader import batches
from rfmedsam2.engine.runtime import Runtime, to_device
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Split, Stage
from rfmedsam2.store.frozen_features.views import ViewStore
from rfmedsam2.store.preprocessed import CaseStore, StoredCase
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.tasks.cached_views import ViewSource
from rfmedsam2.tasks.patches import NOTHING, Beside, PatchBatch, PatchSource
from rfmedsam2.transforms.previous_stage import stacked


class PatchFeed:
    """Patches of a stage, augmented for training and unchanged for validation.

    Args:
        stage: stage with patch and batch size, augmentation and training settings.
        labels: labels of the dataset, with the ignore label if any.
        store: preprocessed cases.
        split: training and validation cases.
        runtime: device and ranks.
        track: shows the progress over what is validated on.
        beside: what there is of all cases besides images and labels.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        labels: LabelSet,
        store: CaseStore,
        split: Split,
        runtime: Runtime,
        track: Track = silent,
        beside: Beside = NOTHING,
    ) -> None:
        self._track, self._beside = track, beside
        self._stage, self._labels, self._store, self._split, self._runtime = stage, labels, store, split, runtime
        self._augmented = self._source(split.train, augment=True)
        self._training: PatchSource | ViewSource = self._augmented
        self._validation = self._source(split.val, augment=False)

    def view(self, name: str, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """View `number` of a training case, see `PatchSource.view`."""
        return self._augmented.view(name, number)

    def use_views(self, views: ViewStore) -> None:
        """Train on cached views of the training cases from now on."""
        size, seed, rank = self._stage.batch_size, self._stage.train.seed, self._runtime.rank
        self._training = ViewSource(views, self._split.train, batch_size=size, seed=seed, rank=rank)

    def training(self, start: int) -> Iterator[PatchBatch]:
        """Training batches from number `start` on; batch i depends only on (seed, rank, i)."""
        train = self._stage.train
        return batches(
            self._training.batch,
            start,
            train.iterations * train.accumulation,
            workers=train.workers,
            seed=train.seed + self._runtime.rank,
            timeout_seconds=train.worker_timeout_seconds,
            describe=lambda step: ", ".join(self._training.cases(step)),
        )

    def validation(self) -> Iterator[PatchBatch]:
        """The validation batches on the device, always the same."""
        batches = validation_batches(self._stage)
        for step in self._track(range(batches), "validation patches", batches):
            yield to_device(self._validation.batch(step), self._runtime.device)

    def whole_cases(self) -> Iterator[tuple[StoredCase, torch.Tensor]]:
        """The validation cases predicted as whole volumes during training, with their labels (1, *shape)."""
        names = self._split.val[: self._stage.validation.cases_while_training]
        for name in self._track(names, "validation cases", len(names)):
            case = self._store.open(name)
            label = torch.from_numpy(case.label_patch(tuple((0, n) for n in case.shape)))
            yield case, label.clamp_min(0)[None]

    def whole_input(self, case: StoredCase) -> np.ndarray:
        """What a network is given of a whole case, (C, *shape) float32: its image, in a cascade the first's labels."""
        image, everything = case.image(), [(0, n) for n in case.shape]
        if self._beside.previous is None:
            return image
        return stacked(image, self._beside.previous.open(case.id).patch(everything)[0], self._labels)

    def _source(self, ids: Sequence[str], *, augment: bool) -> PatchSource:
        return PatchSource(
            self._store,
            ids,
            self._stage,
            labels=self._labels,
            augment=augment,
            seed=self._stage.train.seed + (0 if augment else 1),
            rank=self._runtime.rank if augment else 0,
            ranks=self._runtime.world_size if augment else 1,
            beside=self._beside,
        )


def validation_batches(stage: Stage) -> int:
    """Number of validation batches: the plan's, but no more than training steps since the last validation.

    A training of a few steps would otherwise spend nearly all of its time on them.
    """
    train = stage.train
    steps = train.iterations_per_epoch * min(train.epochs, train.validate_every_epochs)
    return min(stage.validation.patches_while_training, steps)
