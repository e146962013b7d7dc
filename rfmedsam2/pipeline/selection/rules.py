"""Rules of models and ensembles: learned from their validation label maps, and stored in their folders."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from rfmedsam2.arguments import option
from rfmedsam2.errors import RfMedSamError, shortlist
from rfmedsam2.pipeline.selection.cross_validation import ValidatedModel
from rfmedsam2.pipeline.selection.learning import Learned, ValidationCase, learn_rule
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PostprocessingRule
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.raw import open_dataset
from rfmedsam2.system.atomic import is_taken, read_record, write_record
from rfmedsam2.system.progress import Track

logger = logging.getLogger(__name__)


def references_of(layout: Layout, dataset: str) -> dict[str, Path | None] | None:
    """The raw labels of all training cases; None without the raw dataset."""
    raw = layout.raw / dataset
    return {case.id: case.label for case in open_dataset(raw).training} if raw.is_dir() else None


def learn_for(
    layout: Layout, model: ValidatedModel, labels: LabelSet, folds: Sequence[str], *, workers: int, track: Track
) -> Learned | None:
    """The rule of a model, from its validation label maps against the raw labels; None without the raw dataset.

    Raises:
        RfMedSamError: label maps of the validation or their references are not there or cannot be read.
    """
    references = references_of(layout, model.model.dataset)
    if references is None:
        logger.warning("The raw dataset is not in %s: no postprocessing rule is learned", layout.raw)
        return None
    cases: list[ValidationCase] = []
    faults: list[str] = []
    for fold in folds:
        for scored in model.folds[fold].cases:
            file, reference = model.label_map(fold, scored), references.get(scored.id)
            if reference is None or not file.is_file():
                faults.append(f"{scored.id}: no {'label' if reference is None else 'prediction'}")
                continue
            cases.append(ValidationCase(id=scored.id, prediction=file, reference=reference))
    if faults:
        raise RfMedSamError(
            "A rule cannot be learned: validation cases have no label map any more",
            where=model.model.folder,
            found=shortlist(faults),
            remedy="Run rfmed_train again for these folds, or learn no rule (rfmed_select --no-postprocessing)",
        )
    return learn_rule(cases, labels, model.model.dataset, workers=workers, track=track)


def place_rule(path: Path, rule: PostprocessingRule, *, overwrite: bool) -> Iterator[str]:
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
