"""Training one fold, then predicting and scoring its validation cases as whole volumes, then the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rfmedsam2 import extensions
from rfmedsam2.engine.checkpoint import provenance
from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.run_folder import training_folder
from rfmedsam2.engine.runtime import Runtime, start_runtime
from rfmedsam2.engine.task import Progress, Run, Task
from rfmedsam2.errors import RfMedSamError, StoreError, UsageError, shortlist
from rfmedsam2.pipeline.datasets.splits import get_split
from rfmedsam2.pipeline.evaluation.evaluate import evaluate
from rfmedsam2.pipeline.evaluation.report import write_report
from rfmedsam2.pipeline.prediction.predict import predict_files
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.pipeline.training.memory_check import check_memory
from rfmedsam2.pipeline.training.pretrained import load_pretrained
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Plan, Split
from rfmedsam2.records.report import Evaluation
from rfmedsam2.reporting.training_curves import progress_png
from rfmedsam2.store.checkpoint_header import FINAL, LATEST
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import open_dataset
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.system.progress_bars import progress_bars
from rfmedsam2.tasks.rfmedsam2 import RFMedSam2Task
from rfmedsam2.tasks.unet import UNetTask

logger = logging.getLogger(__name__)
VALIDATION = "validation"
CHECKS_AT_ONCE = 4
"""Number of cases whose files are checked in parallel before a training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Options of a training run; none of them changes the trained weights, except initial weights.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps.
        restart: start over; existing results are moved aside.
        validate: whether to predict and score the validation cases at the end.
        tensorboard: whether to write TensorBoard events.
        sam: published weights of the backbone (RFMedSAM 2).
        unet: a trained U-Net that Step 0 starts from (RFMedSAM 2).
        progress: True: bars of steps, validation patches and cases, in terminal or notebook; a `Track`: shown by it.
    """

    device: str = "auto"
    restart: bool = False
    validate: bool = True
    tensorboard: bool = False
    sam: Path | None = None
    unet: Path | None = None
    progress: bool | Track = False


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
        UsageError: the fold does not exist, cases are not preprocessed, or another run trains this fold.
        StoreError: preprocessed cases are damaged, or a folder cannot be written.
        RfMedSamError: errors of the engine, prediction and evaluation.
    """
    options, fold = options or TrainOptions(), str(fold)
    track = progress_bars(options.progress)
    began = time.monotonic()
    config = plan.stage(stage)
    extensions.check(config)
    store = CaseStore(layout.cases_folder(plan.dataset, plan.name, stage), config.patch_size)
    split = get_split(layout, plan.dataset, fold, ids=_case_ids(layout, plan, store))
    _require_preprocessed(split, store, plan, stage, track=track)
    folder = layout.fold_folder(plan.dataset, plan.name, stage, fold)
    with (
        start_runtime(options.device, precision=config.train.precision) as runtime,
        training_folder(folder, runtime, restart=options.restart),
    ):
        task = _task(layout, plan, stage, fold, store=store, split=split, runtime=runtime, options=options, track=track)
        run = Run(
            folder=folder,
            record=lambda step, scores: describe(plan, stage, fold, step=step, scores=scores),
            runtime=runtime,
            track=track,
            tensorboard=options.tensorboard,
        )
        progress = fit(task, config.train, run, resume=True)
        del task
        evaluation = None
        if runtime.is_main:
            progress_png(folder)
            if progress.status == "finished":
                evaluation = _finish(layout, plan, folder, split, runtime, options, track)
    return TrainResult(folder=folder, progress=progress, evaluation=evaluation, seconds=time.monotonic() - began)


def _task(
    layout: Layout,
    plan: Plan,
    stage: str,
    fold: str,
    *,
    store: CaseStore,
    split: Split,
    runtime: Runtime,
    options: TrainOptions,
    track: Track,
) -> Task[Any]:
    """Make the task of a stage; loads initial weights unless a checkpoint of this training exists."""
    config, folder = plan.stages[stage], layout.fold_folder(plan.dataset, plan.name, stage, fold)
    began = runtime.any(any((folder / name).is_file() for name in (LATEST, FINAL)))
    custom = config.extensions.task
    if custom is not None or not isinstance(config.model, RFMedSam2Config):
        if options.sam is not None or options.unet is not None:
            raise UsageError(
                "--sam2 and --unet only apply to plans that are trained as RFMedSAM 2",
                where=f"{plan.name}, {stage}",
                remedy="Leave these flags out, or plan with --model rfmedsam2",
            )
        given: dict[str, Any] = {"store": store, "split": split, "runtime": runtime}
        if custom is not None:
            return extensions.make("task", custom, plan=plan, stage_name=stage, **given)
        return UNetTask(plan, stage, track=track, **given)
    check_memory(plan, stage, runtime.free_bytes(), half=runtime.precision != torch.float32)
    task = RFMedSam2Task(plan, stage, store=store, split=split, runtime=runtime, track=track)
    if not began:
        unet = options.unet
        if unet is None and config.starts_from is not None:
            unet = layout.fold_folder(plan.dataset, plan.name, config.starts_from, fold) / FINAL
        for note in load_pretrained(task.model, plan, fold=fold, sam=options.sam, unet=unet):
            logger.warning(note) if runtime.is_main else None
    return task


def describe(plan: Plan, stage: str, fold: str, *, step: int, scores: dict[str, float]) -> CheckpointRecord:
    """Make the record of a checkpoint; the digest is filled in when it is written."""
    return CheckpointRecord(
        plan=plan,
        stage=stage,
        fold=fold,
        step=step,
        scores=scores,
        **provenance(),
    )


def validate_fold(
    layout: Layout, plan: Plan, folder: Path, cases: Sequence[str], *, device: str, track: Track = silent
) -> Evaluation | None:
    """Predict the raw images of a fold's validation cases and score them; None if the raw dataset does not exist.

    Predictions and scores are written to folder/validation; cases that the same model has already predicted are kept. A
    model prompted with boxes gets those of the reference labels, so its score is an upper bound.
    """
    raw = layout.raw / plan.dataset
    if not raw.is_dir():
        logger.warning("The raw dataset is not in %s: skipping validation on whole volumes", raw)
        return None
    wanted = set(cases)
    inputs = [case for case in open_dataset(raw).training if case.id in wanted]
    predictor = Predictor.load([folder / FINAL], device=device)
    out = folder / VALIDATION
    labels = {case.id: case.label for case in inputs}
    references = {path.parent for path in labels.values() if path is not None}
    model, boxes = predictor.config.model, None
    if isinstance(model, RFMedSam2Config) and model.generator == "gt":
        if len(references) != 1:
            logger.warning("Labels are in several folders: predict with rfmed_predict --boxes")
            return None
        boxes = next(iter(references))
    predict_files(predictor, inputs, out, boxes=boxes, continue_=True, track=track)
    if len(references) != 1:
        logger.warning("Labels are in several folders: score the predictions in %s with rfmed_evaluate", out)
        return None
    return evaluate(out, references.pop(), plan.labels, out=out, cases=sorted(wanted), progress=track)


def _finish(
    layout: Layout, plan: Plan, folder: Path, split: Split, runtime: Runtime, options: TrainOptions, track: Track
) -> Evaluation | None:
    evaluation = None
    if options.validate:
        device = str(runtime.device)
        evaluation = validate_fold(layout, plan, folder, split.val, device=device, track=track)
    raw = layout.raw / plan.dataset / "imagesTr"
    write_report(
        folder / "report.html",
        title=f"{plan.dataset}: {plan.name}, {folder.name}",
        training=folder,
        evaluation=evaluation,
        images=raw if raw.is_dir() else None,
        labels=plan.labels,
    )
    return evaluation


def _case_ids(layout: Layout, plan: Plan, store: CaseStore) -> tuple[str, ...]:
    """All training cases: those of the raw dataset if it exists, else the preprocessed ones."""
    try:
        return tuple(case.id for case in open_dataset(layout.raw / plan.dataset).training)
    except RfMedSamError:
        return store.ids()


def _require_preprocessed(split: Split, store: CaseStore, plan: Plan, stage: str, *, track: Track) -> None:
    there, wanted = set(store.ids()), sorted({*split.train, *split.val})
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(wanted)} cases are not preprocessed",
            where=store.folder,
            found=f"none of {shortlist(missing)}",
            remedy=f"Run rfmed_plan_and_preprocess -d {plan.dataset} -c {stage} with the options that made {plan.name}",
        )
    # a copied dataset has new modification times: then all files are read once
    sound = map_cases(
        store.looks_complete, wanted, workers=CHECKS_AT_ONCE, name=str, track=track, description="Checking cases"
    )
    damaged = [name for name, whole in zip(wanted, sound, strict=True) if not whole]
    if damaged:
        raise StoreError(
            f"{len(damaged)} of {len(wanted)} preprocessed cases are damaged or were modified",
            where=store.folder,
            found=shortlist(damaged),
            remedy="Run rfmed_plan_and_preprocess again with the same options: it rebuilds damaged cases",
        )
