"""Predicting and scoring the validation cases of a fold as whole volumes, when its training ends or by itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from rfmedsam2.errors import CheckpointError, require_type, shortlist
from rfmedsam2.pipeline.datasets.label_agreement import LabelTable
from rfmedsam2.pipeline.datasets.splits import get_split
from rfmedsam2.pipeline.evaluation.evaluate import evaluate, write_evaluation
from rfmedsam2.pipeline.prediction.cascade import first_stage_labels
from rfmedsam2.pipeline.prediction.checkpoints import VALIDATED
from rfmedsam2.pipeline.prediction.predict import predict_files
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.pipeline.training.case_checks import learned_under_other_ids
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Plan, Split
from rfmedsam2.records.report import Evaluation
from rfmedsam2.store.checkpoint_header import BEST, FINAL, read_record_of
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import open_dataset
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.system.progress_bars import progress_bars

logger = logging.getLogger(__name__)
Which = Literal["final", "best"]
CHECKPOINT = {"final": FINAL, "best": BEST}
VALIDATION = {"final": VALIDATED, "best": f"{VALIDATED}_best"}
"""Folders of the predictions and scores of each checkpoint."""


def validate(
    layout: Layout,
    plan: Plan,
    stage: str,
    *,
    fold: str | int = "0",
    checkpoint: Which = "final",
    probabilities: bool = False,
    device: str = "auto",
    progress: bool | Track = False,
) -> Evaluation | None:
    """Predict and score the validation cases of a trained fold; its training, which may go on, is left as it is.

    Args:
        layout: the folder layout.
        plan: the plan that was trained.
        stage: name of its stage.
        fold: a number, "all" or the name of a split.
        checkpoint: final, whose scores are those that the training itself writes, or best, scored apart.
        probabilities: whether to keep the probabilities of every case, of which `rfmed_select` makes ensembles.
        device: auto, cpu, cuda, cuda:1, mps.
        progress: as in `TrainOptions`.

    Returns:
        The scores; None if the raw dataset does not exist or its labels are in several folders.

    Raises:
        CheckpointError: there is no such checkpoint, or it was trained with other cases than the fold has now.
        InUseError: another run validates this fold.
        RfMedSamError: errors of prediction and evaluation.
    """
    require_type(layout, Layout, "layout", remedy="Make one with Layout.under(root)")
    require_type(plan, Plan, "plan", remedy="Load it with Plan.load(path)")
    folder, fold = layout.fold_folder(plan.dataset, plan.name, stage, fold), str(fold)
    path = folder / CHECKPOINT[checkpoint]
    if not path.is_file():
        raise CheckpointError(
            "This fold has no such checkpoint",
            where=path,
            remedy="Train it with rfmed_train; a training that goes on has the best weights so far",
        )
    record = read_record_of(path)
    raw = layout.raw / plan.dataset
    cases = open_dataset(raw).training if raw.is_dir() else ()
    split = get_split(layout, plan.dataset, fold, ids=[case.id for case in cases])
    if record.cases is not None:
        learned = sorted(set(split.val) & set(record.cases.train) - set(split.train))
        if not learned:
            store = CaseStore(
                layout.cases_folder(plan.dataset, plan.cases_plan(stage), stage), plan.stage(stage).patch_size
            )
            validated = [case for case in cases if case.id in set(split.val) - set(split.train)]
            learned = learned_under_other_ids(record.cases, validated, store)
        if learned:
            raise CheckpointError(
                "The checkpoint was trained on cases that are validation cases now",
                where=path,
                found=shortlist(learned),
                remedy="Restore splits_final.json and the files of the cases as they were",
            )
    return validate_fold(
        layout,
        record.plan,
        folder,
        split,
        checkpoint=checkpoint,
        probabilities=probabilities,
        device=device,
        track=progress_bars(progress),
    )


def validate_fold(
    layout: Layout,
    plan: Plan,
    folder: Path,
    split: Split,
    *,
    checkpoint: Which = "final",
    probabilities: bool = False,
    device: str,
    track: Track = silent,
) -> Evaluation | None:
    """Predict the raw images of a fold's validation cases and score them; None if the raw dataset does not exist.

    Predictions and scores are written to folder/validation (validation_best for the best checkpoint); cases that the
    same model has already predicted are kept. A model prompted with boxes gets those of the reference labels, so its
    score is an upper bound. The second stage of a cascade gets the labels that it learns from: of the first's folds,
    which prediction averages, most were trained on these cases.
    """
    raw = layout.raw / plan.dataset
    if not raw.is_dir():
        logger.warning("The raw dataset is not in %s: skipping validation on whole volumes", raw)
        return None
    wanted = set(split.val)
    inputs = [case for case in open_dataset(raw).training if case.id in wanted]
    path = folder / CHECKPOINT[checkpoint]
    previous = first_stage_labels(layout, path, [case.id for case in inputs])
    predictor = Predictor.load([path], device=device, previous=previous)
    out = folder / VALIDATION[checkpoint]
    labels = {case.id: case.label for case in inputs}
    references = {path.parent for path in labels.values() if path is not None}
    model, boxes = predictor.config.model, None
    if isinstance(model, RFMedSam2Config) and model.generator == "gt":
        if len(references) != 1:
            logger.warning("Labels are in several folders: predict with rfmed_predict --boxes")
            return None
        boxes = next(iter(references))
    predict_files(
        predictor, inputs, out, boxes=boxes, continue_=True, overwrite=True, probabilities=probabilities, track=track
    )
    if len(references) != 1:
        logger.warning("Labels are in several folders: score the predictions in %s with rfmed_evaluate", out)
        return None
    # the labels may lie in another dataset's folder, whose dataset.json says nothing about these
    table = LabelTable(labels=plan.labels, source=f"the plan {plan.name}")
    scores = evaluate(out, references.pop(), table, cases=sorted(wanted), progress=track)
    learned = {*split.train, *read_record_of(path).known_from_before()}
    scores = scores.model_copy(update={"trained_on": tuple(sorted(wanted & learned))})
    write_evaluation(out, scores)
    return scores
