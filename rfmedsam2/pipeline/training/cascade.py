"""What the second stage of a cascade learns from: labels that the first predicted in cases it was not trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.errors import ImageError
from rfmedsam2.inference.box_prompts import planned_label
from rfmedsam2.pipeline.prediction.cascade import predictions_of_others, require_label_map
from rfmedsam2.records.case import CaseRecord
from rfmedsam2.records.plan import Plan, Split, Stage
from rfmedsam2.store.images import digest_of, read_label
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.orientation import reoriented
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.step0_logits import FIRST_STAGE, LogitsStore
from rfmedsam2.system.progress import Track
from rfmedsam2.transforms.prepare import Restore

LARGEST_LABEL = 2048
"""Labels are stored in half precision, which holds whole numbers up to here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousLabels:
    """Labels of the first stage for all cases of a fold.

    Attributes:
        store: in the voxels of the preprocessed cases, one channel of label values.
        digest: of all of them.
    """

    store: LogitsStore
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstStage:
    """Takes the first stage's validation predictions to the grid of the second; what is there already is kept.

    Attributes:
        layout: the folder layout.
        plan: the plan of both stages.
        stage: name of the second.
        fold: fold of the second that is trained.
        split: its cases.
        store: its preprocessed cases.
        runtime: device and ranks; the main one writes.
        track: shows the cases.
    """

    layout: Layout
    plan: Plan
    stage: str
    fold: str
    split: Split
    store: CaseStore
    runtime: Runtime
    track: Track

    def run(self) -> PreviousLabels:
        """Find the label maps and store them.

        Raises:
            UsageError: cases were not predicted yet; names the folds of the first stage to train.
            ImageError: a label map cannot be read, or is of another image.
            StoreError: a folder cannot be written.
        """
        previous = self._config.previous_stage
        assert previous is not None
        files = predictions_of_others(self.layout, self.plan, previous, (*self.split.train, *self.split.val))
        digests = {case: digest_of([path]).hex() for case, path in sorted(files.items())}
        folder = self.store.folder / f"previous_stage_fold_{self.fold}"
        stored = LogitsStore(folder, self._config.patch_size, what=FIRST_STAGE)
        settings = hashlib.sha256(self._config.resampling.model_dump_json().encode()).hexdigest()[:16]
        if self.runtime.is_main:
            for case, digest in self.track(digests.items(), FIRST_STAGE, len(digests)):
                record = self.store.open(case).record
                if not stored.is_current(case, record, weights=digest, settings=settings):
                    labels = self._planned(files[case], record)
                    stored.write(case, labels, record, weights=digest, settings=settings)
        self.runtime.any(False)  # barrier: the labels are there
        digest = hashlib.sha256(repr((sorted(digests.items()), settings)).encode()).hexdigest()[:16]
        return PreviousLabels(store=stored, digest=digest)

    @property
    def _config(self) -> Stage:
        return self.plan.stages[self.stage]

    def _planned(self, path: Path, case: CaseRecord) -> np.ndarray:
        """A label map in the voxels of a preprocessed case, (1, a, b, c)."""
        label, _ = read_label(path)
        volume = label if self.plan.reorient is None else reoriented(label, self.plan.reorient)[0]
        restore = Restore.from_record(case.geometry)
        shape = volume.array.shape[1:]
        if shape != restore.source_grid.shape_zyx:
            raise ImageError(
                "A label map of the first stage is of another image than the preprocessed case",
                where=path,
                expected=f"{restore.source_grid.shape_zyx} (z, y, x)",
                found=shape,
                remedy=f"Remove {path.parent} and validate the fold again with rfmed_train",
            )
        require_label_map(volume.array[0], shape, self.plan.labels, where=str(path))
        if (largest := int(volume.array.max(initial=0))) > LARGEST_LABEL:
            raise ImageError("Labels are too large for a cascade", where=path, expected=LARGEST_LABEL, found=largest)
        return planned_label(volume.array[0], restore, self._config.resampling)[None]
