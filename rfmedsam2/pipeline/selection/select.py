"""Selecting a trained model: cross-validation pooled over folds, paired differences, and a postprocessing rule."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.errors import RfMedSamError, UsageError, shortlist
from rfmedsam2.pipeline.evaluation.compare import compare_evaluations
from rfmedsam2.pipeline.prediction.checkpoints import checkpoints_of
from rfmedsam2.pipeline.selection.cross_validation import ValidatedModel, chosen_folds, validated_models
from rfmedsam2.pipeline.selection.learning import Learned, ValidationCase, learn_rule
from rfmedsam2.records.prediction import POSTPROCESSING, PostprocessingRule
from rfmedsam2.records.report import Candidate, CandidateScore, Evaluation, Interval, Selection
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.lock import exclusive_lock
from rfmedsam2.store.raw import open_dataset
from rfmedsam2.system.atomic import atomic, is_taken, read_record, write_record
from rfmedsam2.system.csv_text import write_rows
from rfmedsam2.system.progress import Track, silent

logger = logging.getLogger(__name__)
LOCKED = "selection"
FILES = ("selection.json", "selection.csv")
SHOWN = ("dsc", "iou", "nsd", "hd95_mm")


def select(
    layout: Layout,
    dataset: str,
    *,
    plans: Sequence[str] = (),
    folds: Sequence[str] = (),
    postprocessing: bool = True,
    overwrite: bool = False,
    workers: int = 1,
    track: Track = silent,
) -> Selection:
    """Compare all trained models of a dataset by their validation, and learn a postprocessing rule for the best.

    Written are selection.json and selection.csv in the dataset's results, and the rule as postprocessing.json in the
    folder of the best model. Nothing is predicted or scored again, and label maps are held in memory, compressed.

    Args:
        layout: the folder layout.
        dataset: full folder name.
        plans: names of plans; empty: all.
        folds: names of folds; empty: all numbered ones that any model has validated. Models that lack one are left out.
        postprocessing: whether to learn a rule.
        overwrite: replace a rule of the best model that somebody wrote by hand.
        workers: number of cases processed in parallel.
        track: progress display over cases.

    Raises:
        UsageError: no model was trained, or none was validated on all folds; another run is at it.
        RfMedSamError: label maps of the validation or their references cannot be read.
    """
    models = validated_models(layout, dataset, plans)
    names = chosen_folds(models, folds)
    complete = [model for model in models if set(names) <= set(model.folds)]
    left_out = {model.name: f"fold(s) {', '.join(_lacking(model, names))}" for model in models if model not in complete}
    if not complete:
        raise UsageError(
            "No model was validated on all folds",
            where=layout.results / dataset,
            expected=f"folds {', '.join(names)}",
            found="; ".join(f"{name} lacks {what}" for name, what in left_out.items()),
            remedy=f"Train these folds, or choose some with {option('folds', flag='-f')}",
        )
    home = layout.results / dataset
    with exclusive_lock(home / LOCKED):
        pooled = {model.name: model.pooled(names) for model in complete}
        ranked = sorted(complete, key=lambda model: (-(pooled[model.name].mean["dsc"].mean or 0.0), model.name))
        best = ranked[0]
        learned = _learned(layout, best, names, workers=workers, track=track) if postprocessing else None
        notes = [*_notes(pooled)]
        if learned is not None:
            notes += _place(best.model.folder / POSTPROCESSING, learned.rule, overwrite=overwrite)
        selection = Selection(
            dataset=dataset,
            folds=names,
            candidates=tuple(_candidate(model, best, pooled) for model in ranked),
            left_out=left_out,
            scores=tuple(row for model in ranked for row in _rows(model, pooled[model.name], names)),
            rule=learned.rule if learned is not None and learned.rule.steps else None,
            unprocessed_dsc=None if learned is None else _mean(learned.before),
            postprocessed_dsc=None if learned is None else _mean(learned.after),
            notes=tuple(notes),
        )
        _write(home, selection)
    return selection


def _lacking(model: ValidatedModel, folds: Sequence[str]) -> list[str]:
    return [fold for fold in folds if fold not in model.folds]


def _candidate(model: ValidatedModel, best: ValidatedModel, pooled: dict[str, Evaluation]) -> Candidate:
    mean = pooled[model.name].mean["dsc"]
    if model is best:
        zero = None if mean.mean is None else 0.0
        return Candidate(
            name=model.name, dsc=mean, difference=Interval(mean=zero, low=zero, high=zero, cases=mean.cases)
        )
    sides = pooled[best.name], pooled[model.name]
    paired = compare_evaluations(*sides, names=(best.name, model.name)).mean["dsc"]
    return Candidate(name=model.name, dsc=mean, difference=paired.difference)


def _rows(model: ValidatedModel, pooled: Evaluation, folds: Sequence[str]) -> Iterator[CandidateScore]:
    for fold, evaluation in (("all", pooled), *((fold, model.folds[fold]) for fold in folds)):
        for name, found in (("mean", evaluation.mean), *evaluation.classes.items()):
            means = {metric: found[metric].mean for metric in SHOWN}
            yield CandidateScore(candidate=model.name, fold=fold, name=name, cases=found["dsc"].cases, **means)


def _learned(
    layout: Layout, best: ValidatedModel, folds: Sequence[str], *, workers: int, track: Track
) -> Learned | None:
    """The rule of a model, from its validation label maps against the raw labels; None without the raw dataset."""
    raw = layout.raw / best.model.dataset
    if not raw.is_dir():
        logger.warning("The raw dataset is not in %s: no postprocessing rule is learned", raw)
        return None
    references = {case.id: case.label for case in open_dataset(raw).training}
    cases: list[ValidationCase] = []
    faults: list[str] = []
    for fold in folds:
        for scored in best.folds[fold].cases:
            file, reference = best.validation(fold) / Path(scored.prediction).name, references.get(scored.id)
            if reference is None or not file.is_file():
                faults.append(f"{scored.id}: no {'label' if reference is None else 'prediction'}")
                continue
            cases.append(ValidationCase(id=scored.id, prediction=file, reference=reference))
    if faults:
        raise RfMedSamError(
            "A rule cannot be learned: validation cases have no label map any more",
            where=best.model.folder,
            found=shortlist(faults),
            remedy="Run rfmed_train again for these folds, or learn no rule (rfmed_select --no-postprocessing)",
        )
    labels = read_record_of(checkpoints_of(best.model.folder, folds=folds)[0]).plan.labels
    return learn_rule(cases, labels, best.model.dataset, workers=workers, track=track)


def _place(path: Path, rule: PostprocessingRule, *, overwrite: bool) -> Iterator[str]:
    """Write the rule into the model's folder; a rule without steps is none. Yields what is to be said."""
    if is_taken(path) and not overwrite:
        there = read_record(path, PostprocessingRule)
        if there.cases == 0 and there.digest != rule.digest:
            yield f"{path} was written by hand and stays; {option('overwrite', True)} replaces it by what was learned."
            return
    if rule.steps:
        write_record(path, rule)
    else:
        path.unlink(missing_ok=True)


def _notes(pooled: dict[str, Evaluation]) -> Iterator[str]:
    for name, evaluation in pooled.items():
        if evaluation.trained_on:
            yield f"{name} was trained on {len(evaluation.trained_on)} of its validation cases."
    cases = {name: frozenset(case.id for case in evaluation.cases) for name, evaluation in pooled.items()}
    if len(set(cases.values())) > 1:
        yield "The models were not validated on the same cases: differences are of those that both have."


def _mean(scores: dict[str, float]) -> float | None:
    defined = [score for score in scores.values() if not np.isnan(score)]
    return float(np.mean(defined)) if defined else None


def _write(home: Path, selection: Selection) -> None:
    """Write selection.json and selection.csv, both or neither."""
    fields = tuple(CandidateScore.model_fields)
    with atomic(home / FILES[1]) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            write_rows(stream, [fields, *([getattr(row, field) for field in fields] for row in selection.scores)])
        write_record(home / FILES[0], selection)
