"""Gathering what the validation of every trained fold has written: label maps and metrics.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rfmedsam2.arguments import option
from rfmedsam2.errors import UsageError, shortlist
from rfmedsam2.pipeline.evaluation.bootstrap import summarize
from rfmedsam2.pipeline.prediction.checkpoints import FOLD, VALIDATED, TrainedModel, find_models
from rfmedsam2.records.prediction import PREDICTIONS, PredictionsRecord
from rfmedsam2.records.report import CaseMetrics, Evaluation
from rfmedsam2.store.checkpoint_header import FINAL, read_record_of
from rfmedsam2.store.images import digest_of
from rfmedsam2.store.layout import Layout
from rfmedsam2.system.atomic import read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatedModel:
    """A trained model with the evaluation of every fold that was validated, or an ensemble of such models.

    Attributes:
        model: the model.
        folds: name of a fold -> scores of its validation cases.
        members: of an ensemble, its models.
    """

    model: TrainedModel
    folds: dict[str, Evaluation]
    members: tuple[ValidatedModel, ...] = ()

    @property
    def name(self) -> str:
        """PLAN__STAGE, joined by "+" for an ensemble."""
        return self.model.folder.name

    def validation(self, fold: str) -> Path:
        """Folder of a fold's label maps and metrics.json."""
        return self.model.folder / f"{FOLD}{fold}" / VALIDATED

    def label_map(self, fold: str, case: CaseMetrics) -> Path:
        """The label map of a scored case, wherever the folder lies now."""
        return self.validation(fold) / Path(case.prediction).name

    def changed(self, folds: Sequence[str], references: Mapping[str, Path | None]) -> Iterator[str]:
        """What is not as the validation found it: weights, and label maps that are there; as far as that is known."""
        for fold in folds:
            checkpoint, record = self.validation(fold).with_name(FINAL), self.validation(fold) / PREDICTIONS
            if checkpoint.is_file() and record.is_file():
                weights = {model.weights_sha256 for model in read_record(record, PredictionsRecord).models}
                if read_record_of(checkpoint).weights_sha256 not in weights:
                    yield f"the weights of fold {fold}"
            for case in self.folds[fold].cases:
                sides = {
                    "prediction": (self.label_map(fold, case), case.prediction_sha256),
                    "label": (references.get(case.id), case.reference_sha256),
                }
                for side, (path, known) in sides.items():
                    if known is not None and path is not None and path.exists() and digest_of([path]).hex() != known:
                        yield f"the {side} of {case.id} (fold {fold})"

    def pooled(self, folds: Sequence[str]) -> Evaluation:
        """One evaluation of the validation cases of all folds.

        Raises:
            UsageError: folds share cases, or were scored by different rules or classes.
        """
        parts = [self.folds[fold] for fold in folds]
        first = parts[0]
        rules = {(part.nsd_tolerance_mm, part.empty_policy, tuple(part.classes)) for part in parts}
        if len(rules) > 1:
            raise UsageError(
                "The folds were scored by different rules or for different classes",
                where=self.model.folder,
                remedy=f"Score them again with rfmed_evaluate into {FOLD}X/{VALIDATED}",
            )
        cases = sorted((case for part in parts for case in part.cases), key=lambda case: case.id)
        ids = [case.id for case in cases]
        if twice := sorted({one for one, other in pairwise(ids) if one == other}):
            raise UsageError(
                "Folds have validation cases in common, which a mean would count twice",
                where=self.model.folder,
                found=shortlist(twice),
                remedy=f"Name the folds of one cross-validation with {option('folds', flag='-f')}",
            )
        classes, mean = summarize(cases, tuple(first.classes))
        trained = tuple(sorted(id for part in parts for id in part.trained_on))
        changes = {"cases": tuple(cases), "classes": classes, "mean": mean, "trained_on": trained, "warnings": ()}
        return first.model_copy(update=changes)


def validated_models(layout: Layout, dataset: str, plans: Sequence[str] = ()) -> list[ValidatedModel]:
    """All trained models of a dataset, each with its validated folds, sorted by name.

    Args:
        layout: the folder layout.
        dataset: full folder name.
        plans: names of plans; empty: all.

    Raises:
        UsageError: no model was trained, or none with one of these plans.
        RecordError: a metrics.json is damaged.
    """
    models = find_models(layout.results, dataset)
    known = sorted({model.plan for model in models})
    if unknown := [plan for plan in plans if plan not in known]:
        raise UsageError(
            "No model was trained with this plan",
            where=layout.results / dataset,
            expected=f"one of {', '.join(known)}" if known else None,
            found=", ".join(unknown),
        )
    if not models:
        raise UsageError(
            "No model was trained", where=layout.results / dataset, remedy="Train the folds of one with rfmed_train"
        )
    return [_validated(model) for model in models if not plans or model.plan in plans]


def chosen_folds(models: Iterable[ValidatedModel], wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The folds that models are compared on: the wanted ones, else all numbered ones that any model has validated.

    Raises:
        UsageError: no fold was validated.
    """
    models = list(models)
    found = sorted({fold for model in models for fold in model.folds}, key=lambda fold: (len(fold), fold))
    folds = list(dict.fromkeys(wanted)) or [fold for fold in found if fold.isdigit()]
    if missing := [fold for fold in folds if fold not in found]:
        raise UsageError(
            "This fold was validated for none of the models",
            expected=f"one or several of {', '.join(found)}" if found else None,
            found=", ".join(missing),
            remedy="Train it with rfmed_train, which validates at the end",
        )
    if not folds:
        raise UsageError(
            "No fold has been validated",
            expected=f"{VALIDATED}/metrics.json in the folders of folds",
            found=f"{len(models)} model(s) without any",
            remedy="Run rfmed_train again, which validates a finished training",
        )
    return tuple(folds)


def _validated(model: TrainedModel) -> ValidatedModel:
    files = {fold: model.folder / f"{FOLD}{fold}" / VALIDATED / "metrics.json" for fold in model.folds}
    return ValidatedModel(
        model=model, folds={fold: read_record(file, Evaluation) for fold, file in files.items() if file.is_file()}
    )
