"""Selecting a trained model or an ensemble: cross-validation pooled over folds, paired differences, learned rules."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.errors import UsageError, shortlist
from rfmedsam2.pipeline.evaluation.compare import compare_evaluations
from rfmedsam2.pipeline.prediction.checkpoints import checkpoints_of
from rfmedsam2.pipeline.prediction.ensembles import ensemble_folder, outputs_of
from rfmedsam2.pipeline.prediction.model_archive import export_model
from rfmedsam2.pipeline.selection.choice import gain_of, is_clear, scores_of
from rfmedsam2.pipeline.selection.cross_validation import ValidatedModel, chosen_folds, validated_models
from rfmedsam2.pipeline.selection.ensembles import pairs_of, validate_pairs
from rfmedsam2.pipeline.selection.learning import Learned
from rfmedsam2.pipeline.selection.page import write_page
from rfmedsam2.pipeline.selection.rules import learn_for, place_rule, references_of
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import ENSEMBLE, POSTPROCESSING, EnsembleRecord, PostprocessingRule
from rfmedsam2.records.report import Candidate, CandidateScore, Evaluation, Interval, Selection
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.lock import exclusive_lock, shared_lock
from rfmedsam2.system.atomic import atomic, is_taken, read_record, write_record
from rfmedsam2.system.csv_text import write_rows
from rfmedsam2.system.progress import Track, silent

logger = logging.getLogger(__name__)
LOCKED = "selection"
FILES = ("selection.json", "selection.csv", "selection.html")
SHOWN = ("dsc", "iou", "nsd", "hd95_mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOptions:
    """What is tried, and what is written besides the tables.

    Attributes:
        ensembles: whether to predict and score all pairs of models.
        postprocessing: whether to learn a rule for the best model and for an ensemble that is ahead of it.
        overwrite: replace a rule that somebody wrote by hand.
        archive: zip file to pack the selected model or ensemble into, with all that predicting needs.
        device: auto, cpu, cuda, cuda:1, mps; for ensembles.
        workers: number of cases processed in parallel.
    """

    ensembles: bool = True
    postprocessing: bool = True
    overwrite: bool = False
    archive: Path | None = None
    device: str = "auto"
    workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """The candidates, the selected one first, with what the choice rests on."""

    ranked: list[ValidatedModel]
    pooled: Mapping[str, Evaluation]
    learned: Mapping[str, Learned]
    gain: Interval | None
    single: ValidatedModel

    @property
    def best(self) -> ValidatedModel:
        return self.ranked[0]


def select(
    layout: Layout,
    dataset: str,
    *,
    plans: Sequence[str] = (),
    folds: Sequence[str] = (),
    options: SelectOptions | None = None,
    track: Track = silent,
) -> Selection:
    """Compare all trained models of a dataset and all pairs of them by cross-validation, and learn rules for the best.

    Single models are neither predicted nor scored again. The best ensemble is selected if its mean DSC, with its rule,
    is above that of the best single model, with its own, by a paired difference whose interval lies above 0; else the
    single model is, as the simpler one. Written are selection.json, .csv and .html in the dataset's results,
    postprocessing.json in the folder of the model that it was learned for, and the folder of a selected ensemble; that
    of one that an earlier selection chose is removed.

    Args:
        layout: the folder layout.
        dataset: full folder name.
        plans: names of plans; empty: all.
        folds: names of folds; empty: all numbered ones that any model has validated. Models that lack one are left out.
        options: what is tried and written.
        track: progress display over cases.

    Raises:
        UsageError: no model was trained, or none was validated on all folds; models have different labels; weights or
            label maps have changed since; another run is at it, or trains one of these folds.
        RfMedSamError: images, label maps of the validation or their references cannot be read.
    """
    options = options or SelectOptions()
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
    labels = _common_labels(complete, names)
    home = layout.results / dataset
    with exclusive_lock(home / LOCKED), _kept(complete, names):
        references = references_of(layout, dataset) or {}
        for model in complete:
            _require_as_validated(model, names, references)
        ensembles = _ensembles(layout, complete, names, options, track) if options.ensembles else []
        choice = _choose(layout, [*complete, *ensembles], labels, names, options, track)
        notes = [*_notes({model.name: choice.pooled[model.name] for model in complete}), *_about(choice)]
        notes += _place(home, choice, names, overwrite=options.overwrite)
        selected = choice.learned.get(choice.best.name)
        selection = Selection(
            dataset=dataset,
            folds=names,
            candidates=tuple(_candidate(model, choice) for model in choice.ranked),
            left_out=left_out,
            scores=tuple(row for model in choice.ranked for row in _rows(model, choice.pooled[model.name], names)),
            rule=selected.rule if selected is not None and selected.rule.steps else None,
            unprocessed_dsc=None if selected is None else _mean(selected.before),
            postprocessed_dsc=None if selected is None else _mean(selected.after),
            ensemble_gain=choice.gain,
            notes=tuple(notes),
        )
        if options.archive is not None:
            export_model(_folder(home, choice.best), options.archive, folds=names)
        _write(home, selection)
    return selection


@contextmanager
def _kept(models: Sequence[ValidatedModel], folds: Sequence[str]) -> Iterator[None]:
    """Keep trainings and validations out of these folds inside the `with` block: scores, rules and weights are of one.

    Raises:
        InUseError: a fold is being trained or validated.
    """
    with ExitStack() as held:
        for validation in (model.validation(fold) for model in models for fold in folds):
            held.enter_context(shared_lock(validation.parent))
            held.enter_context(shared_lock(validation))
        yield


def _lacking(model: ValidatedModel, folds: Sequence[str]) -> list[str]:
    return [fold for fold in folds if fold not in model.folds]


def _require_as_validated(model: ValidatedModel, folds: Sequence[str], references: Mapping[str, Path | None]) -> None:
    """Check that weights and label maps are those of the validation.

    Raises:
        UsageError: some were changed since; names them.
    """
    if changed := [*model.changed(folds, references)]:
        raise UsageError(
            "Weights or label maps have changed since the validation",
            where=model.model.folder,
            found=shortlist(changed),
            remedy="Validate these folds again: rfmed_train DATASET CONFIGURATION FOLD --validate-only",
        )


def _common_labels(models: Sequence[ValidatedModel], folds: Sequence[str]) -> LabelSet:
    """The labels of all models, which are to be the same."""
    tables = {m.name: read_record_of(checkpoints_of(m.model.folder, folds=folds)[0]).plan.labels for m in models}
    (first, labels), *others = tables.items()
    for name, other in others:
        if outputs_of(other) != outputs_of(labels):
            raise UsageError(
                f"{first} and {name} have different labels and cannot be compared",
                where=models[0].model.folder.parent,
                expected=f"one table: {shortlist(outputs_of(labels))}",
                found=f"{name}: {shortlist(outputs_of(other))}",
                remedy=f"Name plans of one table with {option('plans', flag='-p')}",
            )
    return labels


def _ensembles(
    layout: Layout, models: Sequence[ValidatedModel], folds: Sequence[str], options: SelectOptions, track: Track
) -> list[ValidatedModel]:
    """All pairs of models, validated."""
    pairs = pairs_of(models)
    if not pairs:
        return []
    raw = layout.raw / models[0].model.dataset
    if not raw.is_dir():
        logger.warning("The raw dataset is not in %s: ensembles are left out", raw)
        return []
    return validate_pairs(layout, pairs, folds, device=options.device, workers=options.workers, track=track)


def _choose(
    layout: Layout,
    candidates: Sequence[ValidatedModel],
    labels: LabelSet,
    folds: Sequence[str],
    options: SelectOptions,
    track: Track,
) -> _Choice:
    """Rank by mean DSC, learn rules, and take the best ensemble only if it is clearly better than the best model."""
    pooled = {one.name: one.pooled(folds) for one in candidates}
    ranked = sorted(candidates, key=lambda one: (-(pooled[one.name].mean["dsc"].mean or 0.0), one.name))
    single = next(one for one in ranked if not one.members)
    ensemble = next((one for one in ranked if one.members), None)
    # an ensemble that is behind without rules is none that users should need to wait for
    contenders = [single] if ensemble is None or ranked[0] is not ensemble else [single, ensemble]
    learned: dict[str, Learned] = {}
    for one in contenders if options.postprocessing else ():
        rule = learn_for(layout, one, labels, folds, workers=options.workers, track=track)
        if rule is not None:
            learned[one.name] = rule
    gain = None
    if ensemble is not None:
        sides = [
            learned[one.name].scores if one.name in learned and len(contenders) > 1 else scores_of(pooled[one.name])
            for one in (ensemble, single)
        ]
        gain = gain_of(sides[0], sides[1])
        if ensemble in contenders and is_clear(gain):
            ranked = [ensemble, *(one for one in ranked if one is not ensemble)]
        else:
            ranked = [single, *(one for one in ranked if one is not single)]
    return _Choice(ranked=ranked, pooled=pooled, learned=learned, gain=gain, single=single)


def _place(home: Path, choice: _Choice, folds: Sequence[str], *, overwrite: bool) -> Iterator[str]:
    """Write what was learned and, if it was selected, the ensemble; yields what is to be said."""
    _remove_earlier(home, choice.best)
    if choice.best.members:
        members = tuple(member.name for member in choice.best.members)
        record = EnsembleRecord(dataset=choice.best.model.dataset, members=members, folds=tuple(folds))
        write_record(_folder(home, choice.best) / ENSEMBLE, record)
    for one in (choice.single, choice.best) if choice.best.members else (choice.single,):
        if one.name in choice.learned:
            rule = choice.learned[one.name].rule
            yield from place_rule(_folder(home, one) / POSTPROCESSING, rule, overwrite=overwrite)


def _remove_earlier(home: Path, best: ValidatedModel) -> None:
    """Remove ensembles that an earlier selection wrote and this one does not name; of imported ones models are part."""
    for folder in sorted(home.glob(f"{ensemble_folder(home, '').name}*")):
        selected = best.members and folder == _folder(home, best)
        if selected or not (folder / ENSEMBLE).is_file() or any(path.is_dir() for path in folder.iterdir()):
            continue
        rule = folder / POSTPROCESSING
        (folder / ENSEMBLE).unlink()
        if is_taken(rule) and read_record(rule, PostprocessingRule).cases:
            rule.unlink()
        with suppress(OSError):  # what somebody has put there stays
            folder.rmdir()
        logger.warning("%s, which an earlier selection wrote, is removed", folder)


def _folder(home: Path, model: ValidatedModel) -> Path:
    return ensemble_folder(home, model.name) if model.members else model.model.folder


def _candidate(model: ValidatedModel, choice: _Choice) -> Candidate:
    mean, best = choice.pooled[model.name].mean["dsc"], choice.best
    if model is best:
        zero = None if mean.mean is None else 0.0
        difference = Interval(mean=zero, low=zero, high=zero, cases=mean.cases)
    else:
        sides = choice.pooled[best.name], choice.pooled[model.name]
        difference = compare_evaluations(*sides, names=(best.name, model.name)).mean["dsc"].difference
    learned = choice.learned.get(model.name)
    return Candidate(
        name=model.name,
        members=tuple(member.name for member in model.members),
        dsc=mean,
        difference=difference,
        rule=learned.rule if learned is not None and learned.rule.steps else None,
        unprocessed_dsc=None if learned is None else _mean(learned.before),
        postprocessed_dsc=None if learned is None else _mean(learned.after),
    )


def _rows(model: ValidatedModel, pooled: Evaluation, folds: Sequence[str]) -> Iterator[CandidateScore]:
    for fold, evaluation in (("all", pooled), *((fold, model.folds[fold]) for fold in folds)):
        for name, found in (("mean", evaluation.mean), *evaluation.classes.items()):
            means = {metric: found[metric].mean for metric in SHOWN}
            yield CandidateScore(candidate=model.name, fold=fold, name=name, cases=found["dsc"].cases, **means)


def _notes(pooled: Mapping[str, Evaluation]) -> Iterator[str]:
    for name, evaluation in pooled.items():
        if evaluation.trained_on:
            yield f"{name} was trained on {len(evaluation.trained_on)} of its validation cases."
    cases = {name: frozenset(case.id for case in evaluation.cases) for name, evaluation in pooled.items()}
    if len(set(cases.values())) > 1:
        yield "The models were not validated on the same cases: differences are of those that both have."


def _about(choice: _Choice) -> Iterator[str]:
    """Why an ensemble was selected, or none."""
    gain = choice.gain
    if gain is None or gain.mean is None:
        return
    name = next(one.name for one in (choice.ranked) if one.members)
    rules = ", each with its rule" if len(choice.learned) > 1 else ""
    ends = "" if gain.low is None or gain.high is None else f", 95 % interval {gain.low:+.4f} to {gain.high:+.4f}"
    yield f"DSC of the best ensemble, {name}, minus that of {choice.single.name}{rules}: {gain.mean:+.4f}{ends}."
    if not choice.best.members and gain.mean > 0:
        few = f"{gain.cases} cases are too few for an interval" if gain.low is None else "the interval reaches 0"
        yield f"The single model is selected, as the simpler one: {few}."


def _mean(scores: Mapping[str, float]) -> float | None:
    defined = [score for score in scores.values() if not np.isnan(score)]
    return float(np.mean(defined)) if defined else None


def _write(home: Path, selection: Selection) -> None:
    """Write selection.json, selection.csv and selection.html, all or none."""
    fields = tuple(CandidateScore.model_fields)
    with atomic(home / FILES[1]) as temporary, atomic(home / FILES[2]) as page:
        write_page(page, selection)
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            write_rows(stream, [fields, *([getattr(row, field) for field in fields] for row in selection.scores)])
        write_record(home / FILES[0], selection)
