"""Cross-fitted Step 0: fixed logits of U-Nets that were not trained on the case, for Steps 1 and 2 to learn from.

A U-Net knows its training cases by heart, so that its errors on them are not those that it makes on new cases. The
training cases are therefore divided into parts, and each part is predicted by a U-Net trained on the others. One more
U-Net, trained on all of them, predicts the validation cases and is the model's Step 0.

results/DATASET/PLAN__STAGE/step0_fold_FOLD/part_0 ... all/         the trainings of the U-Nets
preprocessed/DATASET/PLAN_STAGE/step0_fold_FOLD/CASE.b2nd ...       the logits

Whatever is there already and was made from the same cases, settings and weights is kept, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rfmedsam2.arguments import option
from rfmedsam2.engine.checkpoint import differences, provenance
from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.engine.task import Progress, Run
from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.inference.sliding_window import predict_logits
from rfmedsam2.models import load_network
from rfmedsam2.nn.refinement_state import relative_to_background
from rfmedsam2.pipeline.datasets.splits import make_splits
from rfmedsam2.pipeline.training.disk_check import require_room
from rfmedsam2.records.checkpoint import CheckpointRecord, TrainedCases
from rfmedsam2.records.model import CrossFit, RFMedSam2Config
from rfmedsam2.records.plan import Compute, Plan, Split, Stage
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.store.checkpoint_header import FINAL, LATEST, read_header
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.lock import exclusive_lock
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.step0_logits import ARRAY, LOGIT_BYTES, LogitsStore
from rfmedsam2.system.atomic import backup_folder
from rfmedsam2.system.progress import Track
from rfmedsam2.tasks.unet import UNetTask

logger = logging.getLogger(__name__)
ALL = "all"
STEP0 = "unet."
"""Names of Step 0's tensors in RFMedSAM 2 begin so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One U-Net: the cases that it is trained on, and those that it predicts."""

    name: str
    train: tuple[str, ...]
    predicted: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step0:
    """Cross-fitted Step 0 of a fold.

    Attributes:
        store: the logits of all cases.
        weights: checkpoint of the U-Net trained on all training cases.
        digest: identity of all logits.
    """

    store: LogitsStore
    weights: Path
    digest: str


def parts_of(
    split: Split, folds: int, *, others: Sequence[Split] = (), groups: Mapping[str, str] | None = None
) -> list[Part]:
    """The U-Nets of a fold: one for each part of its training cases, and one for all of them, which comes last.

    Args:
        split: the fold.
        folds: number of parts.
        others: the dataset's folds. Where the validation cases of exactly `folds` of them are the training cases of
            this one, these are the parts, which then keep patients together as the folds do.
        groups: case -> patient; cases of a patient stay in one part.

    Raises:
        UsageError: there are fewer cases, or patients, than parts.
    """
    train = set(split.train)
    parts = [tuple(case for case in other.val if case in train) for other in others]
    parts = [part for part in parts if part]
    if len(parts) != folds or sorted(case for part in parts for case in part) != sorted(train):
        of_case = {case: (groups or {}).get(case, case) for case in split.train}
        patients = len(set(of_case.values()))
        if patients < folds:
            words = f"{len(train)} training case(s)" + (f" of {patients} patient(s)" if patients < len(train) else "")
            raise UsageError(
                "There are fewer training cases than parts for cross-fitting Step 0",
                expected=f"at least {folds} cases of different patients, for {folds} parts",
                found=words,
                remedy="Set model.crossfit.folds to at most that number (at least 2), or train with "
                f"{option('model.step0', 'joint', flag='--step0')}",
            )
        parts = [part.val for part in make_splits(of_case, folds=folds)]
    found = [
        Part(name=f"part_{number}", train=tuple(c for c in split.train if c not in set(part)), predicted=part)
        for number, part in enumerate(parts)
    ]
    new = tuple(case for case in split.val if case not in train)
    return [*found, Part(name=ALL, train=split.train, predicted=new)]


def unet_plan(plan: Plan, stage: str) -> Plan:
    """The plan by which the U-Nets are trained: the stage with Step 0's network, and nothing that is SAM 2's."""
    config = plan.stages[stage]
    assert isinstance(config.model, RFMedSam2Config)
    assert config.model.unet is not None
    alone = config.model_copy(
        update={
            "model": config.model.unet,
            "sampling": config.sampling.model_copy(update={"max_prompted_objects": None}),
            "compute": Compute(),
            "train": _unet_train(config.train, config.model.crossfit),
        }
    )
    return plan.model_copy(update={"stages": {stage: alone}})


def _unet_train(train: TrainConfig, crossfit: CrossFit) -> TrainConfig:
    """The stage's training settings with the length and rate of a U-Net's; it is scored once, at its end."""
    iterations = crossfit.iterations or train.iterations
    each = min(train.iterations_per_epoch, iterations)
    epochs = math.ceil(iterations / each)
    return train.model_copy(
        update={
            "epochs": epochs,
            "iterations_per_epoch": each,
            "validate_every_epochs": epochs,
            "learning_rate": crossfit.learning_rate or train.learning_rate,
            "rate_factors": {
                name[len(STEP0) :]: factor
                for name, factor in train.rate_factors.items()
                if name.startswith(STEP0) or STEP0.startswith(name)
            },
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFitting:
    """Makes the cross-fitted Step 0 of one fold.

    Attributes:
        layout: the folder layout.
        plan: plan of the whole model.
        stage: name of its stage.
        fold: the fold.
        cases: training and validation cases, as they are preprocessed.
        store: preprocessed cases.
        parts: `parts_of` the fold.
        runtime: device and ranks.
        track: shows the progress.
    """

    layout: Layout
    plan: Plan
    stage: str
    fold: str
    cases: TrainedCases
    store: CaseStore
    parts: Sequence[Part]
    runtime: Runtime
    track: Track

    def run(self) -> Step0 | Progress:
        """Train and predict what is not there yet; the progress of a training that a signal has stopped.

        Raises:
            StoreError: the disk has too little room, or a folder cannot be written.
            UsageError: another run works on this fold.
        """
        folder = self.layout.cases_folder(self.plan.dataset, self.plan.name, self.stage) / f"step0_fold_{self.fold}"
        logits = LogitsStore(folder, self._config.patch_size)
        self._require_room(logits)
        for part in self.track(self.parts, "U-Nets of Step 0", len(self.parts)):
            progress = self._train(part)
            if progress is not None and progress.status == "stopped":
                return progress
            if self.runtime.is_main:
                self._predict(part, logits)
            self.runtime.any(False)  # barrier: the logits are there
        weights = {part.name: self._weights_of(part) for part in self.parts}
        made = [(case, weights[part.name]) for part in self.parts for case in sorted(part.predicted)]
        digest = hashlib.sha256(repr((made, self._settings())).encode()).hexdigest()[:16]
        return Step0(store=logits, weights=self._training_folder(self.parts[-1]) / FINAL, digest=digest)

    @property
    def _config(self) -> Stage:
        return self.plan.stages[self.stage]

    def _train(self, part: Part) -> Progress | None:
        """Train the U-Net of a part, or go on with it; None: it is trained."""
        plan, folder = unet_plan(self.plan, self.stage), self._training_folder(part)
        contents = self.cases.train | self.cases.val
        cases = TrainedCases(
            train={case: contents[case] for case in part.train}, val={case: contents[case] for case in part.predicted}
        )

        def record(step: int, scores: dict[str, float]) -> CheckpointRecord:
            fold = self.fold if part.name == ALL else f"{self.fold}-{part.name}"
            return CheckpointRecord(
                plan=plan, stage=self.stage, fold=fold, cases=cases, step=step, scores=scores, **provenance()
            )

        train = plan.stages[self.stage].train
        begun = _begun(folder)
        if self.runtime.any(begun is not None and bool(_changed(begun, record(0, {}), train))):
            if self.runtime.is_main:
                backup_folder(folder)
            self.runtime.any(False)
            begun = None
        if begun is not None and begun.step == train.iterations and (folder / FINAL).is_file():
            return None
        # a part without validation cases is scored on cases that it was trained on, which says that it learned
        split = Split(train=part.train, val=part.predicted or part.train)
        task = UNetTask(plan, self.stage, store=self.store, split=split, runtime=self.runtime, track=self.track)
        return fit(task, train, Run(folder=folder, record=record, runtime=self.runtime, track=self.track), resume=True)

    def _predict(self, part: Part, logits: LogitsStore) -> None:
        """Predict the cases of a part whose logits are missing or were made from something else."""
        settings, weights = self._settings(), self._weights_of(part)
        due = []
        for case in part.predicted:
            found = self.store.open(case).record
            if not logits.is_current(case, found, weights=weights, settings=settings):
                due.append(case)
        if not due:
            return
        _, network = load_network(self._training_folder(part) / FINAL, device=self.runtime.device)
        stage, labels = self._config, self.plan.labels
        with exclusive_lock(logits.folder):
            for case in self.track(due, "cases predicted by Step 0", len(due)):
                stored = self.store.open(case)
                outputs = predict_logits(
                    [network],
                    stored.image(),
                    patch_size=stage.patch_size,
                    inference=stage.inference,
                    mirror_axes=stage.augmentation.mirror_axes,
                    device=self.runtime.device,
                    outputs=labels.num_outputs,
                    regions=labels.has_regions,
                )
                class_map = relative_to_background(outputs[None], regions=labels.has_regions)[0].cpu().numpy()
                logits.write(case, class_map, stored.record, weights=weights, settings=settings)

    def _require_room(self, logits: LogitsStore) -> None:
        """Check that the logits that are missing fit the disk, before anything is trained."""
        missing = [case for part in self.parts for case in part.predicted]
        missing = [case for case in missing if not (logits.folder / (case + ARRAY)).is_file()]
        classes = len(self.plan.labels.foreground)
        shapes = [self.store.open(case).shape for case in missing]
        joint = option("model.step0", "joint", flag="--step0")
        require_room(
            sum(math.prod(shape) * classes * LOGIT_BYTES for shape in shapes),
            logits.folder,
            what="the logits of Step 0",
            amount=f"{len(missing)} case(s) of {classes} class(es)",
            instead=f"choose another {option('root')}, or train with {joint}",
            disk=self.store.folder,
        )

    def _settings(self) -> str:
        """Digest of what the logits depend on besides case and weights."""
        stage = self._config
        settings = (tuple(stage.patch_size), stage.inference.to_json(), stage.augmentation.mirror_axes)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def _weights_of(self, part: Part) -> str:
        return read_header(self._training_folder(part) / FINAL, CheckpointRecord).record.weights_sha256

    def _training_folder(self, part: Part) -> Path:
        model = self.layout.model_folder(self.plan.dataset, self.plan.name, self.stage)
        return model / f"step0_fold_{self.fold}" / part.name


def _begun(folder: Path) -> CheckpointRecord | None:
    """The record of the training in a folder, None if there is none that can be read."""
    for name in (LATEST, FINAL):
        try:
            return read_header(folder / name, CheckpointRecord).record
        except CheckpointError:
            continue
    return None


def _changed(before: CheckpointRecord, now: CheckpointRecord, train: TrainConfig) -> list[str]:
    """What differs between a U-Net's training and the one that is wanted."""
    unimportant = {"workers", "worker_timeout_seconds", "checkpoint_minutes", "compile"}
    then = before.plan.stages[before.stage].train.model_dump(mode="json", exclude=unimportant)
    cases = [None if found is None else found.model_dump() for found in (before.cases, now.cases)]
    return [
        *differences(before.identity(), now.identity()),
        *differences(then, train.model_dump(mode="json", exclude=unimportant), "train"),
        *differences(cases[0], cases[1], "cases"),
    ]
