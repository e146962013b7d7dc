"""What a training of refinement_evidence.py costs: processor seconds of each of its parts, every one measured once."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _harness.evidence_rows import PARTS, UNET_SHARE
from _harness.training_steps import labels_as_step0, processor_seconds
from rfmedsam2.engine.runtime import start_runtime
from rfmedsam2.inference.sliding_window import predict_logits
from rfmedsam2.pipeline.datasets.splits import read_splits
from rfmedsam2.pipeline.training.crossfit import unet_plan
from rfmedsam2.pipeline.training.pretrained import load_pretrained
from rfmedsam2.pipeline.training.view_cache import ViewCaching
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Plan, Split
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.progress import silent
from rfmedsam2.tasks.rfmedsam2 import RFMedSam2Task
from rfmedsam2.tasks.unet import UNetTask

WARM_UP = 1
UNET_STEPS, STEPS = 4, 4
"""Measured steps of a U-Net and of Steps 1 and 2, after the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Processor seconds.

    Attributes:
        unet_step: of a training step of a U-Net, alone or in cross-fitting; 0 where it is trained elsewhere or jointly.
        step: of a training step of Steps 1 and 2, on fixed logits and cached views where the plan has these; of a U-Net
            alone: as `unet_step`.
        logits: of predicting a case by a U-Net of the cross-fitting.
        view: of caching a view of a case.
        all: of the whole rehearsal.
    """

    unet_step: float
    step: float
    logits: float
    view: float
    all: float

    def iterations(self, seconds: float, *, train: int, cases: int, views: int, crossfit: bool) -> dict[str, int]:
        """Numbers of iterations that fill a row's processor time, by the name of their field.

        Args:
            seconds: the processor time.
            train: number of training cases.
            cases: of training and validation cases.
            views: cached views of a training case.
            crossfit: whether Step 0 is cross-fitted, by `PARTS` U-Nets and one of all cases.
        """
        made = train * views * self.view
        if not crossfit:
            return {"iterations": max(1, int((seconds - made) / self.step))}
        made += cases * self.logits
        return {
            "unet_iterations": max(1, int(UNET_SHARE * seconds / (PARTS + 1) / self.unet_step)),
            "iterations": max(1, int(((1 - UNET_SHARE) * seconds - made) / self.step)),
        }


def rehearse(root: Path, dataset: str, plan: str, stage: str, fold: int, sam: Path | None) -> Rehearsal:
    """Measure in a process of its own, whose memory is free again for the training.

    Args:
        root: folder with raw, preprocessed and results.
        dataset: name of the dataset's folder.
        plan: name of the plan.
        stage: its stage.
        fold: number of the fold.
        sam: published weights of the backbone; None: it has none.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_rehearsed, root, dataset, plan, stage, fold, sam).result()


def _rehearsed(root: Path, dataset: str, plan_name: str, stage: str, fold: int, sam: Path | None) -> Rehearsal:
    began, layout = time.process_time(), Layout.under(root)
    plan = read_record(layout.plan_file(dataset, plan_name), Plan).with_overrides(f"{stage}.train.workers=0")
    model = plan.stages[stage].model
    refined = isinstance(model, RFMedSam2Config)
    crossfit = refined and model.step0 == "crossfit"
    if refined and model.cached_views:
        plan = plan.with_overrides(f"{stage}.model.cached_views=1")
    config = plan.stages[stage]
    store = CaseStore(layout.cases_folder(dataset, plan_name, stage), config.patch_size)
    split = read_splits(layout.splits_file(dataset))[fold]
    split = Split(train=split.train[:1], val=split.train[:1])
    with start_runtime("cpu", precision=config.train.precision) as runtime:
        given = {"store": store, "split": split, "runtime": runtime}
        found = {"unet_step": 0.0, "logits": 0.0, "view": 0.0}
        if crossfit or not refined:
            unet = UNetTask(unet_plan(plan, stage) if refined else plan, stage, **given)
            found["unet_step"] = found["step"] = _mean(processor_seconds(unet, runtime, WARM_UP + UNET_STEPS))
            if crossfit:
                found["logits"] = _prediction(unet, store.open(split.train[0]).image())
        if refined:
            found |= _of_refinement(RFMedSam2Task(plan, stage, **given), given, sam)
    return Rehearsal(**found, all=time.process_time() - began)


def _prediction(unet: UNetTask, image: np.ndarray) -> float:
    """Processor seconds of predicting a case."""
    stage, began = unet.stage, time.process_time()
    unet.model.eval()
    predict_logits(
        [unet.model],
        image,
        patch_size=stage.patch_size,
        inference=stage.inference,
        mirror_axes=stage.augmentation.mirror_axes,
        device="cpu",
        outputs=unet.plan.labels.num_outputs,
    )
    return time.process_time() - began


def _of_refinement(task: RFMedSam2Task, given: dict[str, Any], sam: Path | None) -> dict[str, float]:
    """What Steps 1 and 2 cost, and the views that are cached before their training."""
    model, found = task.model, {}
    load_pretrained(model, task.plan, fold="0", sam=sam, unet=None)
    changed = labels_as_step0(model)
    with tempfile.TemporaryDirectory() as folder:
        if model.config.cached_views:
            began = time.process_time()
            views = ViewCaching(folder=Path(folder), task=task, step0=None, track=silent, **given).run()
            task.use_views(views)
            found["view"] = (time.process_time() - began) / views.count
        found["step"] = _mean(processor_seconds(task, given["runtime"], WARM_UP + STEPS, changed=changed))
    return found


def _mean(seconds: list[float]) -> float:
    return sum(seconds[WARM_UP:]) / len(seconds[WARM_UP:])
