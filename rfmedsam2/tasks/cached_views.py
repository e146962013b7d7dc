"""Training batches of augmented views whose frozen features were computed before (`store.frozen_features`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rfmedsam2.store.frozen_features.views import View, ViewStore
from rfmedsam2.tasks.patches import PatchBatch


class ViewSource:
    """Batches by number, as `PatchSource`; batch i depends only on (seed, rank, i).

    Args:
        store: the views.
        ids: ids of the cases to draw from, with replacement.
        batch_size: samples of a batch.
        seed: seed of the whole training.
        rank: rank of this process.
    """

    def __init__(self, store: ViewStore, ids: Sequence[str], *, batch_size: int, seed: int, rank: int = 0) -> None:
        self._store, self._ids, self._size = store, tuple(ids), batch_size
        self._seed, self._rank = seed, rank

    def cases(self, step: int) -> tuple[str, ...]:
        """Ids of the cases of batch `step`, without reading them."""
        return tuple(name for name, _ in self._drawn(step))

    def batch(self, step: int) -> PatchBatch:
        """Read the views of batch `step`."""
        drawn = self._drawn(step)
        views = [self._store.read(name, number) for name, number in drawn]
        return PatchBatch(
            image=torch.stack([view.image for view in views]),
            target=torch.stack([view.label for view in views]),
            ids=tuple(name for name, _ in drawn),
            step0=_stacked(views),
            levels=tuple(torch.cat(level) for level in zip(*(view.levels for view in views), strict=True)),
        )

    def _drawn(self, step: int) -> list[tuple[str, int]]:
        rng = np.random.default_rng((self._seed, self._rank, step))
        cases = rng.integers(len(self._ids), size=self._size)
        numbers = rng.integers(self._store.count, size=self._size)
        return [(self._ids[case], int(number)) for case, number in zip(cases, numbers, strict=True)]


def _stacked(views: Sequence[View]) -> torch.Tensor | None:
    found = [view.step0 for view in views if view.step0 is not None]
    return torch.stack(found) if found else None
