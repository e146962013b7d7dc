"""Training patches as a PyTorch `Dataset`, for a plain `DataLoader` in other trainers."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as whole
from pathlib import Path
from typing import TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from rfmedsam2.arguments import names_of, path_of, whole_number
from rfmedsam2.engine.rng import preserved, seed_all
from rfmedsam2.errors import UsageError, require_type, shortlist
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.tasks.patches import PatchSource


class Patch(TypedDict):
    """One item: image (C, *patch) float32, target (*patch) int64 label values, id of the case."""

    image: Tensor
    target: Tensor
    id: str


class PatchDataset(Dataset[Patch]):
    """Patches of preprocessed cases, chosen and changed at random as the trainer of this package does it.

    Item i depends on (seed, i) alone, whatever the order and the number of worker processes, and leaves the global
    random generators as they were. `DataLoader` collates items to `batch["image"]` (B, C, *patch) float32,
    `batch["target"]` (B, *patch) int64 (the plan's ignore label keeps its value) and `batch["id"]`, the cases.

    Args:
        folder: the preprocessed cases of the stage (`Layout.cases_folder`).
        plan: the plan that they were preprocessed by.
        stage: name of the stage.
        cases: ids to draw from, or a single one; None: all in the folder.
        augment: random changes; False: patches as they are.
        length: number of items; None: as many as the plan's whole training draws. An item is the same each time it is
            asked for, so that a training of several epochs wants one dataset of all its items, not the same again.
        seed: of all randomness.

    Raises:
        PlanError: no such stage.
        UsageError: no preprocessed cases, cases that are not there, a length below 1, a negative seed.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Plan,
        stage: str,
        *,
        cases: Sequence[str] | str | None = None,
        augment: bool = True,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        require_type(plan, Plan, "plan", remedy="Load it with Plan.load(path)")
        config = plan.stage(stage)
        store = CaseStore(path_of(folder, "folder"))
        known = store.ids()
        self.cases = tuple(known) if cases is None else names_of(cases, "cases")
        missing = sorted(set(self.cases) - set(known))
        if not self.cases or missing:
            raise UsageError(
                "There are no preprocessed cases here" if not self.cases else "Cases are not preprocessed",
                where=folder,
                found=shortlist(missing) if missing else None,
                remedy="Run rfmed_plan_and_preprocess, and give the folder of its stage (Layout.cases_folder)",
            )
        train = config.train
        self.seed = whole_number(seed, "seed", least=0)
        self._slots = config.batch_size
        whole_training = train.iterations * train.accumulation * self._slots
        self._length = whole_training if length is None else whole_number(length, "length", least=1)
        self._source = PatchSource(store, self.cases, config, labels=plan.labels, augment=augment, seed=self.seed)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Patch:
        """Item `index`, counted from 0 (negative: from the end); NumPy's and a tensor's integers will do.

        Raises:
            TypeError: not a whole number.
            IndexError: beyond the length.
            StoreError: a case that cannot be read.
        """
        number = whole(index)
        number += self._length if number < 0 else 0
        if not 0 <= number < self._length:
            raise IndexError(f"patch {index} of {self._length}")
        places = np.random.default_rng((self.seed, number))
        name = self.cases[int(places.integers(len(self.cases)))]
        with preserved():
            seed_all(self.seed, number)
            # the last slots of a batch hold foreground, which keeps the plan's share in any order of items
            image, target = self._source.sample(name, number % self._slots, places)
        return {"image": image, "target": target.long(), "id": name}
