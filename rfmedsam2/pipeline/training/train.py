"""Training one fold, then predicting and scoring its validation cases as whole volumes, then the report."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rfmedsam2 import extensions
from rfmedsam2.arguments import option, path_of
from rfmedsam2.choices import TrackerName
from rfmedsam2.engine.checkpoint import provenance
from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.monitoring.trackers import Tracking
from rfmedsam2.engine.run_folder import training_folder
from rfmedsam2.engine.runtime import Runtime, start_runtime
from rfmedsam2.engine.task import Progress, Run, Task
from rfmedsam2.errors import RecordError, RfMedSamError, UsageError, require_type, shortlist
from rfmedsam2.pipeline.datasets.planned_cases import without_left_out
from rfmedsam2.pipeline.datasets.splits import get_split, groups_of, leaks, read_splits, require_folds_of_user
from rfmedsam2.pipeline.evaluation.report import write_report
from rfmedsam2.pipeline.training.cascade import FirstStage, PreviousLabels
from rfmedsam2.pipeline.training.case_checks import require_current, require_preprocessed, require_same_cases
from rfmedsam2.pipeline.training.crossfit import CrossFitting, Step0, parts_of
from rfmedsam2.pipeline.training.fine_tuning import require_same_start, start_from
from rfmedsam2.pipeline.training.memory_check import check_memory
from rfmedsam2.pipeline.training.pretrained import load_pretrained
from rfmedsam2.pipeline.training.validation import validate_fold
from rfmedsam2.pipeline.training.view_cache import ViewCaching
from rfmedsam2.records.checkpoint import CheckpointRecord, TrainedCases, merged_cases
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Plan, Split, Stage
from rfmedsam2.records.report import Evaluation
from rfmedsam2.reporting.training_curves import progress_png
from rfmedsam2.store.checkpoint_header import FINAL, newest_checkpoint, read_record_of
from rfmedsam2.store.checkpoints import read_weights
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.lock import shared_lock
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import RawDataset, open_dataset
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.system.progress_bars import progress_bars
from rfmedsam2.tasks.rfmedsam2 import RFMedSam2Task
from rfmedsam2.tasks.unet import UNetTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Options of a training run; none of them changes the trained weights, except initial weights.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps.
        restart: start over; existing results are moved aside.
        validate: whether to predict and score the validation cases at the end.
        probabilities: whether to keep their probabilities, of which `rfmed_select` makes ensembles.
        trackers: tensorboard, wandb, mlflow, which get the metrics too.
        weights: a trained model to fine-tune: a checkpoint, a fold's folder or a model folder, ours or nnU-Net's.
        sam: published weights of the backbone (RFMedSAM 2).
        unet: a trained U-Net that Step 0 starts from (RFMedSAM 2).
        progress: True: bars of steps, validation patches and cases, in terminal or notebook; a `Track`: shown by it.
    """

    device: str = "auto"
    restart: bool = False
    validate: bool = True
    probabilities: bool = False
    trackers: tuple[TrackerName, ...] = ()
    weights: Path | None = None
    sam: Path | None = None
    unet: Path | None = None
    progress: bool | Track = False

    def __post_init__(self) -> None:
        for name in ("weights", "sam", "unet"):  # programs give text, too
            object.__setattr__(self, name, None if (path := getattr(self, name)) is None else path_of(path, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        folder: folder of the fold.
        progress: result of the engine.
        evaluation: scores of whole volumes; None if not validated (stopped early, not requested, or not the main rank).
        seconds: duration of this call.
    """

    folder: Path
    progress: Progress
    evaluation: Evaluation | None
    seconds: float


def train(
    layout: Layout, plan: Plan, stage: str, *, fold: str | int = "0", options: TrainOptions | None = None
) -> TrainResult:
    """Train a stage of a plan on one fold; resumes an interrupted training of the same plan.

    Writes to results/DATASET/PLAN__STAGE/fold_FOLD: checkpoints, metrics.jsonl, metrics.csv, progress.png,
    validation/ (label maps, metrics.json, metrics.csv) and report.html. A script must call it under
    `if __name__ == "__main__":`, because worker processes import the script again (`train.workers` 0 needs none).

    Args:
        layout: the folder layout.
        plan: the plan.
        stage: name of one of its stages.
        fold: a number, "all" or the name of a split.
        options: options of the run.

    Raises:
        PlanError: the stage does not exist.
        ExtensionError: the plan names an extension that is not installed.
        UsageError: the fold does not exist, cases are not preprocessed, or their files or settings have changed since;
            another run trains this fold, or makes its cases.
        CheckpointError: the training in the folder was begun with other cases, or cannot be resumed.
        StoreError: preprocessed cases are damaged, or a folder cannot be written.
        RfMedSamError: errors of the engine, prediction and evaluation.
    """
    require_type(layout, Layout, "layout", remedy="Make one with Layout.under(root)")
    require_type(plan, Plan, "plan", remedy="Load it with Plan.load(path)")
    options, fold = TrainOptions() if options is None else options, str(fold)
    require_type(options, TrainOptions, "options", remedy="Give TrainOptions(restart=True, ...)")
    track, tracking = progress_bars(options.progress), _tracking(plan, stage, fold, options)
    began = time.monotonic()
    config = plan.stage(stage)
    extensions.check(config)
    store = CaseStore(layout.cases_folder(plan.dataset, plan.cases_plan(stage), stage), config.patch_size)
    folder = layout.fold_folder(plan.dataset, plan.name, stage, fold)
    with ExitStack() as held:
        held.enter_context(shared_lock(store.folder))
        raw = _raw_dataset(layout, plan, needed=options.validate)
        split = _split(layout, plan, fold, store, raw)
        cases = require_preprocessed(split, store, raw, plan, stage, track=track)
        runtime = held.enter_context(start_runtime(options.device, precision=config.train.precision))
        held.enter_context(training_folder(folder, runtime, restart=options.restart))
        require_same_cases(folder, cases)
        job = _Job(layout=layout, plan=plan, stage=stage, fold=fold, store=store, split=split, cases=cases, raw=raw)
        step0 = _step0(job, runtime, options, track)
        if isinstance(step0, Progress):
            return TrainResult(folder=folder, progress=step0, evaluation=None, seconds=time.monotonic() - began)
        previous = _previous(job, runtime, track)
        task = _task(job, runtime, options, track, step0, previous)
        start = _start(job, task, runtime, options, step0)
        _use_views(job, task, runtime, track, step0)
        learnt = {"step0": step0 and step0.digest, "previous_labels": previous and previous.digest}
        run = Run(
            folder=folder,
            record=lambda step, scores: describe(
                plan, stage, fold, step=step, scores=scores, cases=cases, **start, **learnt
            ),
            runtime=runtime,
            track=track,
            tracking=tracking,
        )
        progress = fit(task, config.train, run, resume=True)
        del task
        evaluation = None
        if runtime.is_main:
            progress_png(folder)
            if progress.status == "finished":
                evaluation = _finish(job, folder, runtime, options, track)
    return TrainResult(folder=folder, progress=progress, evaluation=evaluation, seconds=time.monotonic() - began)


def _tracking(plan: Plan, stage: str, fold: str, options: TrainOptions) -> Tracking:
    """Trackers and what they show, checked before hours of work."""
    title = f"{plan.dataset} {plan.name} {stage} fold {fold}"
    return Tracking(names=options.trackers, title=title, settings=plan.stage(stage).model_dump(mode="json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is trained: a stage of a plan on the cases of one fold; `raw`: None if the raw dataset cannot be used."""

    layout: Layout
    plan: Plan
    stage: str
    fold: str
    store: CaseStore
    split: Split
    cases: TrainedCases
    raw: RawDataset | None

    @property
    def config(self) -> Stage:
        return self.plan.stages[self.stage]

    @property
    def newest(self) -> Path | None:
        """The checkpoint that this training goes on from; None if it begins."""
        return newest_checkpoint(self.layout.fold_folder(self.plan.dataset, self.plan.name, self.stage, self.fold))


def _split(layout: Layout, plan: Plan, fold: str, store: CaseStore, raw: RawDataset | None) -> Split:
    """The cases of the fold; warns of patients on both sides."""
    if raw is None:
        return get_split(layout, plan.dataset, fold, ids=store.ids())
    split = get_split(layout, plan.dataset, fold, ids=[case.id for case in raw.training])
    require_folds_of_user(raw, layout)
    for leak in leaks({fold: split}, groups_of(raw)):
        logger.warning("%s", leak)
    return split


def _step0(job: _Job, runtime: Runtime, options: TrainOptions, track: Track) -> Step0 | Progress | None:
    """Make the cross-fitted Step 0, if the plan asks for it; the progress of a training that a signal has stopped."""
    model = job.config.model
    if not isinstance(model, RFMedSam2Config) or model.step0 != "crossfit":
        return None
    if options.unet is not None:
        raise UsageError(
            f"{option('model.step0', 'crossfit', flag='--step0')} trains the U-Nets of Step 0 itself",
            found=option("unet", str(options.unet)),
            remedy=f"Leave out {option('unet')}, or train with {option('model.step0', 'joint', flag='--step0')}",
        )
    if job.config.extensions.augmentation:
        raise UsageError(
            "Augmentations of other packages cannot move fixed logits of Step 0 with the image",
            where=f"{job.plan.name}, {job.stage}.extensions.augmentation",
            remedy=f"Remove them, or train with {option('model.step0', 'joint', flag='--step0')}",
        )
    others = read_splits(job.layout.splits_file(job.plan.dataset)) if job.fold.isdigit() else []
    groups = {} if job.raw is None else groups_of(job.raw)
    parts = parts_of(job.split, model.crossfit.folds, others=others, groups=groups)
    return CrossFitting(
        layout=job.layout,
        plan=job.plan,
        stage=job.stage,
        fold=job.fold,
        cases=job.cases,
        store=job.store,
        parts=parts,
        runtime=runtime,
        track=track,
    ).run()


def _previous(job: _Job, runtime: Runtime, track: Track) -> PreviousLabels | None:
    """Take the first stage's labels to the second of a cascade."""
    if job.config.previous_stage is None:
        return None
    if job.config.extensions.augmentation or job.config.extensions.task is not None:
        raise UsageError(
            "Tasks and augmentations of other packages do not know the second stage of a cascade",
            where=f"{job.plan.name}, {job.stage}.extensions",
            remedy="Remove them, or train another stage",
        )
    return FirstStage(
        layout=job.layout,
        plan=job.plan,
        stage=job.stage,
        fold=job.fold,
        split=job.split,
        store=job.store,
        runtime=runtime,
        track=track,
    ).run()


def _task(
    job: _Job,
    runtime: Runtime,
    options: TrainOptions,
    track: Track,
    step0: Step0 | None,
    previous: PreviousLabels | None,
) -> Task[Any]:
    """Make the task of a stage."""
    plan, stage, config = job.plan, job.stage, job.config
    given: dict[str, Any] = {"store": job.store, "split": job.split, "runtime": runtime}
    if config.extensions.task is None and isinstance(config.model, RFMedSam2Config):
        check_memory(plan, stage, runtime.free_bytes(), half=runtime.precision != torch.float32)
        return RFMedSam2Task(plan, stage, track=track, step0=None if step0 is None else step0.store, **given)
    if options.sam is not None or options.unet is not None:
        raise UsageError(
            f"{option('sam', flag='--sam2')} and {option('unet')} only apply to plans trained as RFMedSAM 2",
            where=f"{plan.name}, {stage}",
            remedy=f"Leave them out, or plan with {option('model', 'rfmedsam2')}",
        )
    if config.extensions.task is not None:
        return extensions.make("task", config.extensions.task, plan=plan, stage_name=stage, **given)
    return UNetTask(plan, stage, track=track, previous=None if previous is None else previous.store, **given)


def _start(job: _Job, task: Task[Any], runtime: Runtime, options: TrainOptions, step0: Step0 | None) -> dict[str, Any]:
    """Load initial weights, unless a checkpoint of this training exists; gives what its record says about them."""
    plan, config, fold = job.plan, job.config, job.fold
    newest = job.newest
    if runtime.any(newest is not None):
        begun = None if newest is None else read_record_of(newest)
        digest = None if begun is None else begun.started_from
        if options.weights is not None:
            require_same_start(newest or options.weights, digest, options.weights, fold=fold)
        return {"started_from": digest, "learned_before": {} if begun is None else begun.learned_before}
    model, unet_model, notes = None, None, list[str]()
    if options.weights is not None:
        model, notes = start_from(task.model, plan, config, options.weights, fold=fold)
    if isinstance(task, RFMedSam2Task) and isinstance(config.model, RFMedSam2Config):
        unet = options.unet if step0 is None else step0.weights
        if unet is None and options.weights is None and config.starts_from is not None:
            unet = job.layout.fold_folder(plan.dataset, plan.name, config.starts_from, fold) / FINAL
        known = options.weights is not None
        unet_model, said = load_pretrained(task.model, plan, fold=fold, sam=options.sam, unet=unet, known=known)
        notes += said
    before = merged_cases(one.learned() for one in (model, unet_model) if one is not None)
    if seen := sorted(job.cases.learned_in(before, plan.dataset) & (job.cases.val.keys() - job.cases.train.keys())):
        cases = f"{len(seen)} of the {len(job.cases.val)} validation cases ({shortlist(seen)})"
        notes.append(f"The initial weights have learned {cases}: their scores do not tell how new ones are segmented")
    for note in notes:
        logger.warning(note) if runtime.is_main else None
    return {"started_from": None if model is None else model.weights_sha256, "learned_before": before}


def _use_views(job: _Job, task: Task[Any], runtime: Runtime, track: Track, step0: Step0 | None) -> None:
    """Compute the frozen features of cached views, if the plan asks for them."""
    if not isinstance(task, RFMedSam2Task) or not task.model.config.cached_views:
        return
    if (newest := job.newest) is not None:  # the frozen weights are those that the training began with
        task.model.load_state_dict(read_weights(newest)[1])
    views = ViewCaching(
        folder=job.layout.cases_folder(job.plan.dataset, job.plan.name, job.stage) / f"views_fold_{job.fold}",
        task=task,
        store=job.store,
        split=job.split,
        step0=None if step0 is None else step0.digest,
        runtime=runtime,
        track=track,
    ).run()
    task.use_views(views)


def describe(
    plan: Plan,
    stage: str,
    fold: str,
    *,
    step: int,
    scores: dict[str, float],
    **known: Any,
) -> CheckpointRecord:
    """Make the record of a checkpoint; the digest is filled in when it is written.

    Args:
        plan: the plan.
        stage: its stage.
        fold: the fold.
        step: completed steps.
        scores: of the last validation.
        known: further fields, of what the training learns from and began with.
    """
    return CheckpointRecord(plan=plan, stage=stage, fold=fold, step=step, scores=scores, **known, **provenance())


def _finish(job: _Job, folder: Path, runtime: Runtime, options: TrainOptions, track: Track) -> Evaluation | None:
    layout, plan, split, store = job.layout, job.plan, job.split, job.store
    evaluation = None
    if options.validate:
        if (raw := _raw_dataset(layout, plan, needed=True)) is not None:
            # training takes hours, in which somebody may have corrected labels
            scored = {name: store.open(name).record for name in split.val}
            require_current(scored, raw, plan, job.stage, where=store.folder, track=silent)
        device, keep = str(runtime.device), options.probabilities
        evaluation = validate_fold(layout, plan, folder, split, probabilities=keep, device=device, track=track)
    images = layout.raw / plan.dataset / "imagesTr"
    write_report(
        folder / "report.html",
        title=f"{plan.dataset}: {plan.name}, {folder.name}",
        training=folder,
        evaluation=evaluation,
        images=images if images.is_dir() else None,
        labels=plan.labels,
    )
    return evaluation


def _raw_dataset(layout: Layout, plan: Plan, *, needed: bool) -> RawDataset | None:
    """The raw dataset without the cases left out; None if it does not exist, or cannot be used and is not needed."""
    folder = layout.raw / plan.dataset
    if not folder.is_dir():
        return None
    try:
        raw = open_dataset(folder)
    except RfMedSamError as error:
        if needed:
            raise
        logger.warning("%s Whether files have changed since they were preprocessed is not known.", error)
        return None
    with suppress(RecordError):
        return without_left_out(raw, layout)
    return raw
